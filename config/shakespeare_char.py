"""A character-level GPT of 10.7 million parameters on tiny Shakespeare, for one GPU: nanoGPT's settings.

    python prepare_data.py shakespeare_char
    python train.py config/shakespeare_char.py

The data is small and the model is not: it overfits, and the best checkpoint, which sample.py takes, is not the last.
nanoGPT reports a best val loss of 1.47 with these settings.
"""

out_dir = "out/shakespeare_char"
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # only those with the best val loss

dataset = "shakespeare_char"
# 1 x 64 x 256 = 16,384 tokens a step; 5,000 steps are 82 epochs
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # a step sees few tokens, so its gradients are averaged over more of them
warmup_iters = 100
