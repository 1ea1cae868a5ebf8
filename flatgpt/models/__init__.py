"""Batches -> loss; weights in and out; text. The GPT itself is model.py at the top.

    baselines.py  bigram, MLP and recurrent models to measure a GPT against
    weights.py    other people's layouts: Hugging Face's GPT-2 and Llama, nanoGPT's ckpt.pt
    sampling.py   logits -> the next token
    inference.py  a model that the options name, with its tokenizer, and what it is given to read
"""
