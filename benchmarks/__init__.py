"""What flatGPT costs and gains: `python -m benchmarks.bench train` against other ways to do the same, and
`python -m benchmarks.zoo`, which trains every model and option for the table in docs/models.md."""
