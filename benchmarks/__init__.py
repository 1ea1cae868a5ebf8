"""What flatGPT costs and gains: `python -m benchmarks.bench train` against other ways to do the same, and
`python -m benchmarks.zoo`, which trains every model and option for the table in docs/models.md.

    bench.py        what is measured, and in which turn     zoo.py      the table of models
    baselines.py    what people would use instead           ladder.py   what each part of the fast recipe is worth
    nanogpt.py      nanoGPT's own scripts, from a checkout  widths.py   the best learning rate at several widths
    kernels.py      what each thing that saves a GPU time gains
    scaling.py      steps on many GPUs, reckoned            rates.py    this machine's rates, to check that
    serve.py        what the page costs a run               scripts.py  runs our scripts, compares the ways
"""
