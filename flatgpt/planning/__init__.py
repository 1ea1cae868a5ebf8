"""What a run will take, before it runs, and what runs have told: no module here needs a GPU, data or weights.

hardware.py     accelerators and links, from their vendors' data sheets; 8xH100 in words
layout.py       where a process stands among the ranks
flops.py        parameters and floating-point operations, by part
memory.py       what takes how many bytes on a rank
traffic.py      what the ranks send each other in a step
laws.py         the loss to expect, by the scaling laws that others published
fit.py          a scaling law fitted to runs, and its intervals; fit_summary.py, as numbers and text
proposal.py     a shape, a batch and rates for a depth or a budget
summary.py      the whole plan, as numbers and as text
"""
