"""A GPT of one million parameters on the Python standard library, for `make demo`: data that every machine has.

    python prepare_data.py python_stdlib
    python train.py config/demo.py

About two minutes on two cores; val loss 3.8 (the data's own bpe of 2,048 tokens).
"""

out_dir = "out/demo"
eval_interval = 200
eval_iters = 20
log_interval = 20

dataset = "python_stdlib"
# 1 x 16 x 128 = 2,048 tokens a step
gradient_accumulation_steps = 1
batch_size = 16
block_size = 128

n_layer = 4
n_head = 4
n_embd = 128

learning_rate = 2e-3
max_iters = 1000
lr_decay_iters = 1000
min_lr = 2e-4
warmup_iters = 50
beta2 = 0.99
compile = False  # takes longer than it gains in a run this short
