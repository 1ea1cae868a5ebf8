"""How soon does a GPT of 124M parameters reach a val loss of 3.28 on FineWeb? Data, shape, batch and the tokens of the
evaluation are those of the public records, so that steps and tokens compare with theirs.

    .venv/bin/hf download kjj0/fineweb10B-gpt2 --repo-type=dataset --local-dir=data/fineweb10B
    torchrun --nproc_per_node=8 train.py config/record_124m.py

`make record` does both, on all GPUs of one node. The run ends, as finished, with the first evaluation at or below 3.28,
and says the steps, the tokens, the seconds of training, evaluations apart, and the machine. The recipe is that of
config/gpt2_124m_fast.py, and nobody has run it at this size: the number of steps is a guess. Public lines for this loss
are AdamW in 5,625 steps and a tuned Muon in 3,250 (modded-nanogpt's optimiser track).
"""

out_dir = "out/record_124m"
eval_interval = 125
eval_tokens = 10485760  # the first of the validation shard
target_val_loss = 3.28
save_interval = 1000
log_interval = 10

dataset = "fineweb10B"
tokenizer = "gpt2"
# 524,288 tokens a step = 512 sequences x 1,024 tokens = 8 GPUs x 1 micro-batch x 64 sequences x 1,024 tokens;
# 4,000 steps x 524,288 tokens = 2.1e9 tokens
total_batch_size = 524288
batch_size = 64
block_size = 1024

n_layer = 12
n_head = 12
n_embd = 768
pos = "rope"
norm = "rmsnorm"
qk_norm = True
mlp = "swiglu"
bias = False
tie_embeddings = False

optimizer = "muon"
muon_lr = 2e-2
muon_beta2 = 0.95
width_base = 128
learning_rate = 1e-2
embed_lr = 1e-1
schedule = "linear"
max_iters = 4000
lr_decay_iters = 4000
min_lr = 0.0
warmup_iters = 250
weight_decay = 1e-2
