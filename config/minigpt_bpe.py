"""A small GPT on a vocabulary of its own: 2,048 tokens that byte-pair encoding learns from the text.

    python prepare_data.py shakespeare --tokenizer=bpe --vocab_size=2048 --name=shakespeare_bpe --show_merges=True
    python train.py config/minigpt_bpe.py
    python sample.py --out_dir=out/minigpt_bpe --prompt="ROMEO:"

Losses of different vocabularies do not compare, because their tokens hold different amounts of text; bits per byte do:
`python eval.py --out_dir=out/minigpt_bpe` prints them.
"""

out_dir = "out/minigpt_bpe"
eval_interval = 250
eval_iters = 50
log_interval = 10

dataset = "shakespeare_bpe"
# 1 x 16 x 128 = 2,048 tokens a step; 1,000 steps are 6 epochs
gradient_accumulation_steps = 1
batch_size = 16
block_size = 128

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.1

learning_rate = 2e-3
max_iters = 1000
lr_decay_iters = 1000
min_lr = 2e-4
beta2 = 0.99  # a step sees few tokens, so its gradients are averaged over more of them
warmup_iters = 50
