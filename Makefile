# make demo      prepare a small corpus, train a small model on it, read what it writes (a few minutes on a laptop)
# make test      lint, tests, and the README's commands
# make test-fast  the tests of single functions, for the loop of editing
# make soak      what takes longer: every way to kill, hang and starve a run that the tests know (half an hour on two cores)
# make test-gpu  the main job on a machine with an NVIDIA GPU; make bench-gpu measures it there
# make record    the record run: a val loss of 3.28 with 124M parameters, on all GPUs of one node
# make zoo       what every model and option is worth, as the table in docs/models.md (a quarter of an hour on two cores)
# make install   .venv with all that the program and the tests need
# Each makes .venv first where it is missing. PYTHON=python3.12 picks another interpreter, 3.10 or newer.

PYTHON ?= python3
PY = .venv/bin/python
ARGS =
DATA = python_stdlib

.PHONY: demo test test-fast soak test-gpu bench-gpu record zoo install lint

demo: .venv/.run
	$(PY) prepare_data.py $(DATA)
	$(PY) train.py config/demo.py $(ARGS)
	$(PY) sample.py --out_dir=out/demo --prompt="    def __init__(self," --num_samples=2 --max_new_tokens=150 --temperature=0.7
	@echo "To see the run and its model in the browser: make install, then $(PY) serve.py"

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal

test-fast: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal tests/data tests/models --ignore=tests/models/test_baselines.py tests/test_model.py tests/test_files.py tests/test_machine.py tests/training/test_optim.py tests/training/test_device.py

soak: .venv/.dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal -m soak

test-gpu: .venv/.dev
	$(PY) -m pytest -m gpu tests/test_gpu.py

bench-gpu: .venv/.dev
	$(PY) -m benchmarks.bench gpu --config=config/gpt2_124m.py

record: .venv/.run
	.venv/bin/hf download kjj0/fineweb10B-gpt2 --repo-type=dataset --local-dir=data/fineweb10B
	.venv/bin/torchrun --nproc_per_node=gpu train.py config/record_124m.py $(ARGS)

zoo: .venv/.run
	test -e data/shakespeare_char || $(PY) prepare_data.py shakespeare_char $(ARGS)
	$(PY) -m benchmarks.zoo

lint: .venv/.dev
	$(PY) -m ruff check .
	$(dir $(PY))lint-imports --no-logo --no-cache

install: .venv/.dev

.venv/.run: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "flatGPT needs Python 3.10 or newer; PYTHON=... picks one")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.dev: requirements-dev.txt .venv/.run
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
