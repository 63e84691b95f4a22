# make train | test | bench | lint       in an environment of its own (.venv), made at first use with exact versions
# make train PYTHON=python               in the active environment (a GPU build of torch, say): adds what is missing
# make gpu                               on a machine with a GPU: nothing is installed

VENV ?= .venv
DATA ?= data/phantoms
RUN ?= runs/demo
RESULTS ?= benchmarks/results

ifdef PYTHON
READY := environment-in-use
else
PYTHON := $(VENV)/bin/python
READY := $(VENV)/ready
endif

export OMP_WAIT_POLICY ?= passive

.PHONY: train test bench lint floor gpu clean environment-in-use

train: $(READY)
	$(PYTHON) -m fmkernels phantom $(DATA)
	$(PYTHON) -m fmkernels train $(DATA) --out $(RUN)

test: $(READY)
	$(PYTHON) -m pytest -n auto --cov=fmkernels --cov-report=term

bench: $(READY)
	$(PYTHON) -m benchmarks.run

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

gpu: PYTHON := $(if $(filter environment-in-use,$(READY)),$(PYTHON),python3)
gpu:
	$(PYTHON) -m benchmarks.gpu --results $(RESULTS)

clean:
	rm -rf $(VENV)

$(VENV)/ready: setup.py constraints.txt
	python3 -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[train,dev]'
	touch $@

environment-in-use:
	$(PYTHON) -m pip install --quiet --editable '.[train,dev]'
