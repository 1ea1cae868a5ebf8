"""What a run needs around the model.

    device.py       which device, number type and attention kernel
    distributed.py  the process group, and what the ranks tell each other; hosts.py, how several hosts find each other
    parallel.py     how a model lies over the ranks: DDP, FSDP and HSDP
    compiling.py    torch.compile of a model's parts, on all ranks or on none
    optim.py        AdamW, the learning rate of each step, bad steps; muon.py, Muon and how the ranks share it
    config.py       the options of a run, put together
    setup.py        a run's data, and its model on the device
    preflight.py    what a run will need, printed before its first step
    checkpoint.py   the run folder: lock, find, save, delete; resume.py, how a run continues from one
    profiling.py    what the time of a few steps goes to
    metrics.py      what is reported; terminal.py, its line on a terminal; samples.py, what the model writes meanwhile
    trackers.py     wandb and TensorBoard; plots.py, curves and pictures of runs, for the report page
    finished_runs.py what a scaling law is fitted to, of finished runs; fit_plots.py, the picture of it
"""
