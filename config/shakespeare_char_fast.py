"""The best loss in the fewest steps."""

out_dir = "out/shakespeare_char_fast"
eval_interval = 100
eval_iters = 20
log_interval = 10

dataset = "shakespeare_char"
# 1 x 12 x 64 = 768 tokens a step; 400 steps are 0.3 epochs
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
pos = "rope"
norm = "rmsnorm"
qk_norm = True
mlp = "relu2"

optimizer = "muon"
muon_lr = 2e-2
learning_rate = 1e-2
schedule = "linear"
max_iters = 400
lr_decay_iters = 400
min_lr = 0.0
warmup_iters = 20
beta2 = 0.99
weight_decay = 0.0

device = "cpu"
compile = False
