# Everything happens in .venv. `make quickstart` and `make test` set it up themselves.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.megalite-installed

.PHONY: help install quickstart quickstart-bert test test-all test-slurm lint benchmark-peers clean

help:
	@echo "make quickstart   from raw text to a trained, resumed and sampled GPT, on 8 CPU ranks; results in runs/"
	@echo "make quickstart-bert  the same steps for a BERT: pretrained on sentences, resumed, blanks filled in"
	@echo "make test         the tests"
	@echo "make test-all     the tests, also the slow ones"
	@echo "make test-slurm   the tests on a real SLURM, brought up on this machine (root; tests/slurm/cluster.sh install)"
	@echo "make lint         style (ruff) and the borders between packages (import-linter)"
	@echo "make benchmark-peers  an environment of its own for benchmarks/training.py --peers and pipeline.py peers"
	@echo "make install      create $(VENV) and install megalite there, editable, with all extras"
	@echo "make clean        delete $(VENV), caches and build folders; runs/ stays"

install: $(STAMP)

# The stamp is newer than its dependencies exactly when the last install succeeded.
# torch is installed first and the build is not isolated, so that the native kernels are built against this torch.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard megalite/kernels/csrc/*) | $(BIN)/pip
	$(BIN)/python -m pip install -c constraints.txt torch 'setuptools>=77'
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# Debian and Ubuntu ship venv without ensurepip unless python3-venv is installed; a pip of the system can stand in.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "megalite needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; choose another: make PYTHON=python3.12 ...")'
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	elif $(PYTHON) -m virtualenv --version >/dev/null 2>&1; then $(PYTHON) -m virtualenv $(VENV); \
	elif $(PYTHON) -m pip --version >/dev/null 2>&1 && $(PYTHON) -m venv --without-pip $(VENV) \
		&& $(PYTHON) -m pip --python $(BIN)/python install pip; then :; \
	else rm -rf $(VENV); echo 'Python cannot make a virtual environment here. Install its parts first, then run make again:' >&2; \
		echo '    sudo apt-get install python3-venv' >&2; exit 1; fi

quickstart: install
	$(BIN)/python examples/quickstart/run.py

quickstart-bert: install
	$(BIN)/python examples/quickstart/run.py bert

test: install
	@command -v slurmctld >/dev/null && echo "tests on SLURM: make test-slurm" || echo "tests on SLURM are left out: it is not installed"
	$(BIN)/python -m pytest -m "not slow and not slurm" --durations=10

test-all: install
	$(BIN)/python -m pytest -m "not slurm" --durations=10

test-slurm: install
	MUST_HAVE_SLURM=yes $(BIN)/python -m pytest -m slurm tests/slurm --durations=10

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

# megatron-core asks for Python 3.12 and more than it needs here, and has a file for 3.11.
# DeepSpeed compiles its all-reduce at the first start: here, in place of in a measurement.
PEERS := benchmarks/peers/.venv
benchmark-peers:
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install -c constraints.txt torch numpy 'setuptools>=77' ninja transformers==5.23.0 deepspeed==0.19.8
	$(PEERS)/bin/python -m pip install --no-deps --ignore-requires-python megatron-core==0.19.2
	PATH=$(CURDIR)/$(PEERS)/bin:$$PATH DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(CURDIR)/$(PEERS)/torch_extensions $(PEERS)/bin/python -c \
		"from deepspeed.accelerator import get_accelerator as cpu; cpu().create_op_builder('ShareMemCommBuilder').load()"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache megalite/kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
