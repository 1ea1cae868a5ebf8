"""Text -> tokens -> batches.

    sources.py           what to read: named corpora, local files, data sets of the hub
    records.py           a document as it was found, and its text
    local_files.py       files and folders -> records
    hub.py               data sets of the Hugging Face hub -> records
    tokenizer.py         gpt2, char, byte, bpe and the tokenizers of other models: made and loaded
    hf_tokenizer.py      text <-> ids, by a tokenizer.json of any kind
    tokenizer_config.py  the special tokens and settings beside a tokenizer.json
    splits.py            which split a document falls in
    pipeline.py          documents -> tokens, over many processes, always the same bytes
    staging.py           a data set that is being made: how ranks share the work, and what a kill leaves
    shards.py            .bin files of tokens, and dataset folders: written, checked, opened
    nanogpt.py           nanoGPT's headerless train.bin and its meta.pkl
    documents.py         where documents begin in a shard
    order.py             a sequence's number -> a window, over an epoch or a mixture
    packing.py           the same for windows of whole documents
    loader.py            (seed, position) -> batch, on any number of ranks
"""
