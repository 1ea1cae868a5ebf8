"""Text -> tokens -> batches.

    sources.py    where documents come from: files, folders, the Hugging Face hub
    tokenizer.py  text <-> ids, of every kind, as tokenizer.json
    pipeline.py   documents -> tokens, over many processes, always the same bytes
    staging.py    a data set that is being made: how ranks share the work, and what a kill leaves
    shards.py     .bin files of tokens: written, checked, opened
    loader.py     (seed, position) -> batch: the order of the data
"""
