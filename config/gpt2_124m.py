"""GPT-2 small (124M) on FineWeb-Edu, 10 billion tokens once through, on one node of eight GPUs.

    python prepare_data.py fineweb_edu
    torchrun --nproc_per_node=8 train.py config/gpt2_124m.py
"""

out_dir = "out/gpt2_124m"
eval_interval = 250
eval_iters = 20
save_interval = 1000
log_interval = 10

dataset = "fineweb_edu"
# 524,288 tokens a step = 512 sequences x 1,024 tokens = 8 GPUs x 1 micro-batch x 64 sequences x 1,024 tokens;
# with fewer or smaller GPUs lower batch_size: more micro-batches are made of the same step.
# 19,073 steps x 524,288 tokens = 10.0e9 tokens
total_batch_size = 524288
batch_size = 64
block_size = 1024

# GPT-2's own shape
n_layer = 12
n_head = 12
n_embd = 768
bias = True
mlp = "gelu_tanh"

learning_rate = 6e-4
max_iters = 19073
lr_decay_iters = 19073
min_lr = 6e-5
warmup_iters = 715  # 375 million tokens, as GPT-3 has it
weight_decay = 1e-1
