"""The simplest language model, on tiny Shakespeare: what follows a character depends on that character alone.

    python prepare_data.py shakespeare_char
    python train.py config/bigram.py

Counts the pairs of the train split, which takes a second or two; val loss 2.4819 on the whole validation split, train
loss 2.4546. No table of pairs does much better, so here begins what is gained by looking further back.

    python train.py config/bigram.py --bigram_counts=False --out_dir=out/bigram_trained

trains the same table by gradient descent: seconds as well; val loss 2.4884.
"""

out_dir = "out/bigram"
eval_interval = 100
eval_iters = 20
log_interval = 10

dataset = "shakespeare_char"
model = "bigram"
bigram_counts = True

# If it is trained: 1 x 128 x 64 = 8,192 tokens a step; 200 steps are 1.6 epochs
gradient_accumulation_steps = 1
batch_size = 128
block_size = 64

learning_rate = 0.3  # the loss is convex, and AdamW's steps have to reach logits of -10
max_iters = 200
lr_decay_iters = 200
min_lr = 0.01
warmup_iters = 0
weight_decay = 0.0  # would pull rare pairs' logits to 0

device = "cpu"
compile = False
