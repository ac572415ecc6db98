# Everything from a bare Python 3.10+: `make demo`, `make test`.
# The newest torch:  make test-next      the quick tests, in a .venv-next of its own (6 GB: the wheels for CUDA)
# Another torch:     make test TORCH=torch==2.14.0
# CPU wheels only:   PIP_INDEX_URL=https://download.pytorch.org/whl/cpu PIP_EXTRA_INDEX_URL=https://pypi.org/simple make test
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_NEXT ?= torch==2.14.1

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed-$(TORCH)

# Ranks are processes here; a pool of threads in each would only make them wait for one another.
export OMP_NUM_THREADS := 1
export TORCHINDUCTOR_COMPILE_THREADS := 1

.PHONY: demo test test-fast test-next test-all fuzz faults soak lint clean

demo: $(INSTALLED)
	$(BIN)/python examples/print_graph.py
	$(BIN)/python examples/quickstart.py

test: test-fast
	$(BIN)/python -m pytest -m "slow and not full"

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow and not full" -n 2

test-next:
	$(MAKE) test-fast VENV=.venv-next TORCH=$(TORCH_NEXT)

# Also every model with every attention implementation and every P, its coverage, and every program with every P.
test-all: test
	$(BIN)/python -m pytest -m full -n 2

# Random programs on one device and on ranks, 5,000 simulated and 100 with two processes: three hours.
fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz --programs 5000 --real 100

# Every fault of the table on three real ranks, a quarter of an hour; and a run of 1,000 steps on two.
faults: $(INSTALLED)
	$(BIN)/python -m tests.faults

soak: $(INSTALLED)
	$(BIN)/python -m tests.commands.soak

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and by itself, so that nothing else chooses its version.
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "$(TORCH)" --editable ".[test,examples]"
	rm -f $(VENV)/installed-*
	touch "$@"

clean:
	rm -rf $(VENV) .venv-next build *.egg-info
