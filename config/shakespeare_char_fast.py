"""The loss of config/shakespeare_char_cpu.py in a tenth of its steps: the best recipe found for so few tokens.

    python prepare_data.py shakespeare_char
    python train.py config/shakespeare_char_fast.py

About half a minute on two cores; val loss 1.87 to 1.89 on the whole validation split (seeds 1337, 2, 3: 1.881, 1.886,
1.867), where nanoGPT's model reads 1.898 after its 2,000 steps. BENCHMARKS.md says what each part is worth, and
docs/log.md what was tried besides.
"""

out_dir = "out/shakespeare_char_fast"
eval_interval = 100
eval_iters = 20
log_interval = 10

dataset = "shakespeare_char"
# 1 x 12 x 64 = 768 tokens a step; 200 steps are 0.15 epochs
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

# A Qwen3, so transformers and llama.cpp read it
n_layer = 4
n_head = 4
n_embd = 128
pos = "rope"
qk_norm = True
norm = "rmsnorm"
mlp = "swiglu"
tie_embeddings = False

optimizer = "muon"
muon_lr = 2e-2
muon_momentum = 0.8  # a step sees few tokens and the run is short: 0.95 would average over a tenth of it
learning_rate = 1e-2  # of head, embeddings and norms
schedule = "linear"
max_iters = 200
lr_decay_iters = 200
min_lr = 0.0
warmup_iters = 20
beta2 = 0.99

device = "cpu"
compile = False
