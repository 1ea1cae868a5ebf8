"""Fine-tune GPT-2 on the works of Shakespeare.

    python prepare_data.py shakespeare
    python train.py config/finetune_shakespeare.py                        from the 124M GPT-2
    python train.py config/finetune_shakespeare.py --init_from=gpt2-xl    from a larger one, or any GPT-2 folder

A few minutes on one GPU. The data is 300,000 tokens: more steps overfit.
"""

out_dir = "out/finetune_shakespeare"
init_from = "gpt2"
eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # only those with the best val loss

dataset = "shakespeare"
# 32 x 1 x 1,024 = 32,768 tokens a step; an epoch is 9 steps
gradient_accumulation_steps = 32
batch_size = 1

max_iters = 20
learning_rate = 3e-5
decay_lr = False
