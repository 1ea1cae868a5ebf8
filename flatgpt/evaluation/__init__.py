"""How good a model is, besides its loss: scores on tasks, also beside a run that goes on.

    scoring.py      ln p(answer | question) of tokens, shared by the ranks
    questions.py    multiple choice of our own: HellaSwag
    tasks.py        a task by its name: ours or the harness's
    harness.py      the tasks of lm-evaluation-harness, over any model of ours
    watching.py     scores each checkpoint of a run that goes on, into evals.jsonl
"""
