"""A character-level GPT of 0.8 million parameters on tiny Shakespeare, for a laptop: nanoGPT's CPU settings.

    python prepare_data.py shakespeare_char
    python train.py config/shakespeare_char_cpu.py

About a minute on two cores; val loss 1.90 on the whole validation split.
"""

out_dir = "out/shakespeare_char_cpu"
eval_interval = 250
eval_iters = 20
log_interval = 10

dataset = "shakespeare_char"
# 1 x 12 x 64 = 768 tokens a step; 2,000 steps are 1.5 epochs
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

learning_rate = 1e-3
max_iters = 2000
lr_decay_iters = 2000
min_lr = 1e-4
beta2 = 0.99  # a step sees few tokens, so its gradients are averaged over more of them
warmup_iters = 100

device = "cpu"
compile = False
