"""teenyGPT's shape on tiny Shakespeare's characters: SwiGLU, learned positions that start as sinusoids, dropout.

    python prepare_data.py shakespeare_char
    python train.py config/teeny.py

For one GPU; a step is eleven times the tokens and four times the parameters of config/shakespeare_char_cpu.py. The data
is small: should it overfit, the best checkpoint, which sample.py takes, is not the last.
"""

out_dir = "out/teeny"
eval_interval = 250
eval_iters = 50
log_interval = 10
always_save_checkpoint = False  # only those with the best val loss

dataset = "shakespeare_char"
# 1 x 32 x 256 = 8,192 tokens a step; 2,500 steps are 20 epochs
gradient_accumulation_steps = 1
batch_size = 32
block_size = 256

n_layer = 4
n_head = 8
n_embd = 256
mlp = "swiglu"
pos = "learned_sinusoidal"
dropout = 0.2

learning_rate = 1e-3
max_iters = 2500
lr_decay_iters = 2500
min_lr = 1e-4
beta2 = 0.99  # a step sees few tokens, so its gradients are averaged over more of them
warmup_iters = 100
