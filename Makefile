PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test
INSTALLED = $(VENV)/.installed-$(EXTRAS)

.PHONY: demo pictures test chaos gpu lint format clean

demo: $(INSTALLED)  ## everything on a synthetic atlas, in a few minutes on two cores
	$(VENV)/bin/rayvaec demo --out demo-output --overwrite

test: $(INSTALLED)  ## the test suite, in two processes: what starts Ray in one of them
	$(VENV)/bin/pytest --numprocesses 2 --dist loadgroup

chaos: $(INSTALLED)  ## runs that are killed and disturbed, about a quarter of an hour on two cores
	$(VENV)/bin/pytest tests/chaos -m chaos

gpu: $(INSTALLED)  ## what needs a CUDA device: training on it, and inference held to a CPU's results
	$(VENV)/bin/pytest -m gpu

lint: $(INSTALLED)  ## style, docstrings and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

pictures: $(INSTALLED)  ## docs/img anew; needs chromium and chromedriver
	$(VENV)/bin/python docs/pictures.py

format: $(INSTALLED)  ## mend what ruff can mend
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove the virtual environment and the demo's output
	rm -rf $(VENV) demo-output

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@
