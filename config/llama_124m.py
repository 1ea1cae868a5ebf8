"""A Llama of 124M parameters on FineWeb-Edu, 10 billion tokens once through, on one node of eight GPUs.

    python prepare_data.py fineweb_edu
    torchrun --nproc_per_node=8 train.py config/llama_124m.py

As config/gpt2_124m.py, but for the shape: rotary positions, RMSNorm, SwiGLU, no biases. Its checkpoints are
LlamaForCausalLM to transformers, vLLM and llama.cpp.
"""

out_dir = "out/llama_124m"
eval_interval = 250
eval_iters = 20
save_interval = 1000
log_interval = 10

dataset = "fineweb_edu"
# 524,288 tokens a step = 512 sequences x 1,024 tokens = 8 GPUs x 1 micro-batch x 64 sequences x 1,024 tokens;
# 19,073 steps x 524,288 tokens = 10.0e9 tokens
total_batch_size = 524288
batch_size = 64
block_size = 1024

# 123.6M parameters: no table of positions, and an MLP of 2,048 = 8/3 x 768 channels with three matrices
n_layer = 12
n_head = 12
n_embd = 768
pos = "rope"
norm = "rmsnorm"
mlp = "swiglu"
bias = False

learning_rate = 6e-4
max_iters = 19073
lr_decay_iters = 19073
min_lr = 6e-5
warmup_iters = 715  # 375 million tokens, as GPT-3 has it
weight_decay = 1e-1
