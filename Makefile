# make demo      prepare a small corpus, train a small model on it, read what it writes (a few minutes on a laptop)
# make test      lint, tests, and the README's commands
# make soak      every way to kill, hang and starve a run that the tests know (eight minutes on two cores)
# make install   .venv with all that the program and the tests need
# Each makes .venv first where it is missing. PYTHON=python3.12 picks another interpreter, 3.10 or newer.

PYTHON ?= python3
PY = .venv/bin/python
ARGS =

.PHONY: demo test soak install lint

demo: .venv/.run
	$(PY) prepare_data.py python_stdlib
	$(PY) train.py config/demo.py $(ARGS)
	$(PY) sample.py --out_dir=out/demo --prompt="    def __init__(self," --num_samples=2 --max_new_tokens=150 --temperature=0.7

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal

soak: .venv/.dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal -m "soak or not soak" tests/test_faults.py tests/test_distributed.py

lint: .venv/.dev
	$(PY) -m ruff check .

install: .venv/.dev

.venv/.run: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "flatGPT needs Python 3.10 or newer; PYTHON=... picks one")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.dev: requirements-dev.txt .venv/.run
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
