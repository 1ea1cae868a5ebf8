"""A model of Python files that two CPU cores train in an hour: a Qwen3 of five million parameters.

    python prepare_data.py python_source --tokenizer=bpe --vocab_size=4096
    python train.py config/python_source.py
    python sample.py --out_dir=out/python_source --prompt="def read_json(path):" --max_new_tokens=110 --temperature=0.7

An hour on two cores with bfloat16 instructions; val loss 2.15 (the data's own bpe of 4,096 tokens).
"""

out_dir = "out/python_source"
eval_interval = 1200
eval_iters = 20
eval_tokens = 262144
log_interval = 20

dataset = "python_source"
# 1 x 16 x 256 = 4,096 tokens a step; 9,600 steps are 39 million tokens, a third of an epoch
gradient_accumulation_steps = 1
batch_size = 16
block_size = 256

# A Qwen3, so transformers and llama.cpp read it; BENCHMARKS.md has the sizes that were tried
n_layer = 4
n_head = 4
n_embd = 256
pos = "rope"
qk_norm = True
norm = "rmsnorm"
mlp = "swiglu"
tie_embeddings = False

optimizer = "muon"
muon_lr = 2e-2
muon_beta2 = 0.95
width_base = 128  # the width of the models that these rates were found on
learning_rate = 1e-2  # of the head (half of it at this width) and the norms
embed_lr = 1e-1
schedule = "linear"
max_iters = 9600
lr_decay_iters = 9600
min_lr = 0.0
warmup_iters = 250
weight_decay = 1e-2

device = "cpu"
compile = False
