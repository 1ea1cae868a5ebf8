"""As config/gpt2_124m.py, in half the steps: the recipe that won on the small bench, config/shakespeare_char_fast.py.

    python prepare_data.py fineweb_edu
    torchrun --nproc_per_node=8 train.py config/gpt2_124m_fast.py

Behind each choice stands what it gained there, for a model of 0.8 million parameters, in nats of val loss after 400
steps. At this size it was not measured, and its learning rates are a guess. Its checkpoints are flatGPT's alone:
transformers has no model of this shape.
"""

out_dir = "out/gpt2_124m_fast"
eval_interval = 250
eval_iters = 20
save_interval = 1000
log_interval = 10

dataset = "fineweb_edu"
# 524,288 tokens a step = 512 sequences x 1,024 tokens = 8 GPUs x 1 micro-batch x 64 sequences x 1,024 tokens;
# 9,536 steps x 524,288 tokens = 5.0e9 tokens, half of config/gpt2_124m.py's
total_batch_size = 524288
batch_size = 64
block_size = 1024

n_layer = 12
n_head = 12
n_embd = 768
pos = "rope"  # 0.136, against learned positions
norm = "rmsnorm"  # 0.018, against layernorm
qk_norm = True  # 0.091
mlp = "relu2"  # nothing, against gelu, but it takes less time and memory bandwidth
bias = False

optimizer = "muon"  # 0.143, against adamw
muon_lr = 2e-2
learning_rate = 3e-3  # of the embeddings and norms
schedule = "linear"  # 0.017, against cosine
max_iters = 9536
lr_decay_iters = 9536
min_lr = 0.0
warmup_iters = 250
weight_decay = 1e-2
