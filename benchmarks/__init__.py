"""What flatGPT costs and gains: `python -m benchmarks.bench train` against other ways to do the same, and
`python -m benchmarks.zoo`, which trains every model and option for the table in docs/models.md.

    bench.py        what is measured, and in which turn     zoo.py      the table of models
    baselines.py    what people would use instead           scripts.py  runs our scripts, compares the ways
    kernels.py      what each thing that saves a GPU time gains
    scaling.py      steps on many GPUs, reckoned            rates.py    this machine's rates, to check that
"""
