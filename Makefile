# Everything runs in a virtual environment of its own, made on first use from the tested versions in constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_VERBOSITY := error

.PHONY: demo test check bench clean help

help:
	@echo "make demo    accelerate the shipped tiny-flux pipeline, print the table, write the pictures to outputs/demo"
	@echo "make test    static checks and the test suite"
	@echo "make bench   measure presets and rivals on tiny-flux (longer; results under pipelines/tiny-flux/results)"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python demos/quickstart.py

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: check
	$(BIN)/python -m pytest

bench: $(VENV)/.installed-bench
	$(BIN)/python -m dit_accel.bench.curves pipelines/tiny-flux --guidance 1 --out pipelines/tiny-flux/results
	$(BIN)/python -m dit_accel.bench.curves pipelines/tiny-flux --guidance 3 --out pipelines/tiny-flux/results
	$(BIN)/python -m dit_accel.bench.overhead pipelines/tiny-flux --out pipelines/tiny-flux/results

clean:
	rm -rf $(VENV) outputs
