"""Batches -> loss; weights in and out; text. The GPT itself is model.py at the top.

    language_model.py  what every model has: loss, generation, files
    fused.py           the head and its loss in chunks, the recomputed activation: less memory, the same results
    attention.py       the kernels of attention, and what says which keys a query sees
    positions.py       positional encodings: the formulas of RoPE, ALiBi and sinusoids
    generate.py        caches, the loop that streams tokens, the decoding step as a CUDA graph
    prepacked.py       linear layers for generation on a CPU, their matrices in oneDNN's order
    sampling.py        logits -> the next token
    baselines.py       bigram, MLP and recurrent models to measure a GPT against; build, which makes any model
    families.py        the models that transformers knows (GPT-2, Llama, Mistral, Qwen): options and tensors' names
    weights.py         models in files: Hugging Face's folders, nanoGPT's ckpt.pt
    averaging.py       the average of several checkpoints
    inference.py       a model that the options name, with its tokenizer, and what it is given to read

model.py imports the first five, which do not import it; baselines.py, families.py and weights.py build on it.
"""
