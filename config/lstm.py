"""A character-level LSTM of 0.8 million parameters on tiny Shakespeare, to measure a GPT against: as many parameters,
tokens and steps as config/shakespeare_char_cpu.py.

    python prepare_data.py shakespeare_char
    python train.py config/lstm.py

About two minutes on two cores; val loss 1.66 on the whole validation split (the GPT's is 1.90).
"""

out_dir = "out/lstm"
eval_interval = 250
eval_iters = 20
log_interval = 10

dataset = "shakespeare_char"
# 1 x 12 x 64 = 768 tokens a step; 2,000 steps are 1.5 epochs
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

model = "lstm"
n_layer = 2
n_embd = 224
dropout = 0.0
bias = True

learning_rate = 2e-3
max_iters = 2000
lr_decay_iters = 2000
min_lr = 2e-4
beta2 = 0.99  # a step sees few tokens, so its gradients are averaged over more of them
warmup_iters = 100

device = "cpu"
compile = False
