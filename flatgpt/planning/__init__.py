"""What a run will take, before it runs, and what runs have told: no module here needs a GPU, data or weights.

hardware.py     accelerators and links, from their vendors' data sheets
traffic.py      what the ranks send each other in a step
"""
