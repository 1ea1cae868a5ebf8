"""As config/gpt2_124m.py, in half the steps: the recipe that won on small models.

    python prepare_data.py fineweb_edu
    torchrun --nproc_per_node=8 train.py config/gpt2_124m_fast.py

BENCHMARKS.md says what each choice is worth for a model of 0.8 million parameters. At this size nothing was measured:
the learning rates follow from those of the small model by width_base, and the batch is a hundred times as large. Muon's
momentum is therefore the usual 0.95, where the small model with its small batches wants 0.8.
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

# A Qwen3, so transformers and llama.cpp read it
n_layer = 12
n_head = 12
n_embd = 768
pos = "rope"
norm = "rmsnorm"
qk_norm = True
mlp = "swiglu"
bias = False
tie_embeddings = False  # 39 million parameters more, and no more work: the head has them all in any case

optimizer = "muon"
muon_lr = 2e-2
muon_beta2 = 0.95
width_base = 128  # the width of the small models that these rates were found on
learning_rate = 1e-2  # of the head (a sixth of it at this width) and the norms
embed_lr = 1e-1
schedule = "linear"
max_iters = 9536
lr_decay_iters = 9536
min_lr = 0.0
warmup_iters = 250
weight_decay = 1e-2
