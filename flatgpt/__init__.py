"""flatGPT's library, beneath the scripts at the top.

    data/       text -> tokens -> batches
    models/     batches -> loss; weights in and out; text
    planning/   what a run will take, before it runs
    training/   what a run needs around the model
    evaluation/ how good a model is, also beside a run
    options.py  config files and --key=value arguments -> validated dataclasses; files.py, small files on disk;
    run_folder.py, a run's records, scores and checkpoints, for all who read them;
    signals.py, streams and what asks a process to stop; launcher.py, what started it; machine.py, memory and cores;
    pickles.py, other people's pickles without running them

Imports point down: evaluation -> serving -> training -> planning -> models -> data -> the files here. model.py stands
at the top, beside models/.
"""
