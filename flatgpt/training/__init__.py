"""What a run needs around the model.

    device.py       which device, number type and attention kernel
    distributed.py  process groups, DDP and FSDP, compiling, reductions; hosts.py, how several hosts find each other
    optim.py        AdamW, Muon, learning rates, bad steps
    setup.py        a run's data, and its model on the device
    preflight.py    what a run will take, said before its first step
    checkpoint.py   the run folder: lock, find, save, delete; resume.py, what a run goes on from
    metrics.py      what is reported; terminal.py, its line on a terminal
    trackers.py     wandb and TensorBoard; plots.py, curves of several runs
"""
