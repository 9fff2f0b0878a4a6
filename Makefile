# Every target sets up what it needs in .venv by itself; `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
# torch is installed first, and nothing that is installed later may replace it.
# A machine with a GPU gets its own build by these two, at the first set-up:
#   make demo TORCH_PIP_ARGS="--index-url <the index of the build for your GPU>"
# Another torch is given an environment of its own:
#   make test TORCH=torch==2.10.0 VENV=.venv-2.10
TORCH ?= torch==2.13.0
TORCH_PIP_ARGS ?=
# Further arguments for the program behind a target.
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS := $(VENV)/constraints.txt
SPHINX := $(BIN)/python -m sphinx -W -q

.PHONY: help demo omniglot reproduce test test-models wheel-test docs lint format bench worth clean asked-torch
# Two pips in one environment get into each other's way.
.NOTPARALLEL:

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.with-examples  ## iMAML on sinusoids: trains, then a table and a picture
	$(BIN)/python -m examples.imaml.sinusoid $(ARGS)

omniglot: $(VENV)/.with-examples  ## iMAML of the last layer on Omniglot, 5-way 1-shot: ten minutes; ARGS="--data-dir FOLDER", or --download
	$(BIN)/python -m examples.imaml.omniglot $(ARGS)

reproduce: $(VENV)/.with-examples  ## the whole comparison, as far as ARGS="--budget SECONDS" goes; writes results/
	$(BIN)/python -m reproduction.report $(ARGS)

# One thread each: as many workers as cores are already at work.
test: $(VENV)/.with-test  ## the tests, and the examples in the docstrings
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 $(ARGS)

# Beside the others, and not in .ci/run: transformers and peft are large. One thread, a few minutes.
test-models: $(VENV)/.with-models  ## GPT-2, Llama, BERT and ViT by transformers, LoRA by peft, against double backward
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests_models $(ARGS)

wheel-test: $(VENV)/.with-dev  ## build wheel and sdist, and test the wheel in an environment of its own
	PYTHON="$(PYTHON)" BUILD_PYTHON="$(BIN)/python" TORCH="$(TORCH)" \
		TORCH_PIP_ARGS="$(TORCH_PIP_ARGS)" .ci/wheel $(ARGS)

docs: $(VENV)/.with-docs  ## build the documentation and run its snippets
	$(SPHINX) -b html docs docs/_build/html
	$(SPHINX) -b doctest docs docs/_build/doctest
	@echo "The documentation is in docs/_build/html/index.html"

lint: $(VENV)/.with-dev  ## style, docstrings and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.with-dev  ## format the code, and mend what can be mended by itself
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.with-bench  ## the benchmarks
	$(BIN)/python -m benchmarks $(ARGS)

# With ARGS="--draw" nothing is measured: table and picture of what is stored.
worth: $(VENV)/.with-bench  ## is it worth it: random search, Optuna and hypergradients, ten minutes of one core
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.worth_it $(ARGS)

clean:  ## remove the environment, the caches and what was built
	rm -rf $(VENV) build dist docs/_build docs/gallery docs/howto .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A set-up is done when its stamp is there; one that was broken off runs again.
$(CONSTRAINTS):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed: make PYTHON=<path of one>" >&2; exit 1; }
	@echo "Setting up $(VENV): $(TORCH)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet $(TORCH_PIP_ARGS) "$(TORCH)"
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
		> $@.part
	@mv $@.part $@

# An environment keeps its torch. Who asks for one by name gets that one, or is told.
asked-torch: | $(CONSTRAINTS)
ifneq ($(origin TORCH),file)
	@$(BIN)/python -c 'import sys; from importlib.metadata import version; \
		from pip._vendor.packaging.requirements import Requirement; \
		sys.exit(not Requirement(sys.argv[1]).specifier.contains(version("torch"), True))' \
		"$(TORCH)" || { \
		echo "$(VENV) has $$(cat $(CONSTRAINTS)), and not $(TORCH). Name another environment, as in" \
			"'make test TORCH=$(TORCH) VENV=.venv-other', or 'make clean' first." >&2; exit 1; }
endif

$(VENV)/.with-%: pyproject.toml | $(CONSTRAINTS) asked-torch
	@echo "Setting up $(VENV): torch-hypergrad[$*]"
	@$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable ".[$*]"
	@touch $@
