# make train | test | bench | lint | types | docs | floor
#                                          in an environment of its own (.venv), made at first use with exact versions
# make help                                these lines
# make train PYTHON=python                 in the active environment (a GPU build of torch, say): adds what is missing
# make compat                              the tests with the oldest and with the newest versions of what is needed
# make gpu                                 on a machine with a GPU: checks, benchmarks and tuning, 9
#                                          minutes each (gpu-checks, gpu-bench, gpu-tune); installs nothing

VENV ?= .venv
DATA ?= data/phantoms
RUN ?= runs/demo
LABELED ?= 12
SEEDS ?= 1
RESULTS ?= benchmarks/results
CONSTRAINTS ?= constraints.txt

ifeq ($(origin PYTHON),command line)
READY := environment-in-use
else
PYTHON := $(VENV)/bin/python
READY := $(VENV)/ready
endif

export OMP_WAIT_POLICY ?= passive

.PHONY: help train test nightly coverage bench lint types docs compat quick floor gpu gpu-checks gpu-bench gpu-tune clean environment-in-use

help:
	@sed -n '/^$$/q; s/^# //p' Makefile

train: $(READY)
	$(PYTHON) -m fmkernels phantom "$(DATA)"
	$(PYTHON) -m fmkernels compare "$(DATA)" --out "$(RUN)" --labeled $(LABELED) --seeds $(SEEDS)

test: $(READY)
	@echo "all tests, about 25 minutes of CPU time shared by all cores; without a GPU kernels run in an interpreter"
	$(PYTHON) -m pytest -n auto

# long fault injection and fuzzing
nightly: $(READY)
	$(PYTHON) -m pytest -n auto -m nightly
	$(PYTHON) -m tests.fuzz --minutes 30

coverage: $(READY)
	$(PYTHON) -m pytest -n auto --cov=fmkernels --cov-report=term

# --limit drops the last ones first
LAST := $(patsubst %,benchmarks/bench_%.py,host_time focalmix_step growth)
SUITES := $(filter-out $(LAST),$(sort $(wildcard benchmarks/bench_*.py))) $(LAST)

bench: $(READY)
	mkdir -p $(RESULTS)/local
	rm -f $(RESULTS)/local/benchmarks.json
	$(PYTHON) -m pytest -q $(SUITES) --limit=240 --benchmark-max-time=0.2 --benchmark-quiet \
		--benchmark-json=$(RESULTS)/local/benchmarks.json; \
	status=$$?; $(PYTHON) -m benchmarks.plot $(RESULTS)/local/benchmarks.json && exit $$status

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: $(READY)
	$(PYTHON) -m mypy

docs: $(READY)
	$(PYTHON) -m sphinx --fail-on-warning --keep-going --quiet docs site

compat:
	$(MAKE) quick VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt
	$(MAKE) quick

# without what depends on the versions of compilers and tools, and with few cases of each property
quick: $(READY)
	FMKERNELS_TEST_CASES=0.02 $(PYTHON) -m pytest -n auto --ignore-glob='*floor*' --ignore=tests/triton_checked/test_compiled.py \
		--ignore=tests/test_docs.py --ignore=tests/test_types.py

floor: $(READY)
	$(PYTHON) -m tests.support.floor

gpu: gpu-checks gpu-bench gpu-tune

gpu-checks gpu-bench gpu-tune: PYTHON := $(if $(filter environment-in-use,$(READY)),$(PYTHON),python3)
gpu-checks gpu-bench gpu-tune: gpu-%:
	$(PYTHON) -m benchmarks.gpu $* --results $(RESULTS)

clean:
	rm -rf $(VENV)

$(VENV)/ready: setup.py $(CONSTRAINTS)
	python3 -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[train,dev]'
	touch $@

environment-in-use:
	$(PYTHON) -m pip install --quiet --no-build-isolation --editable '.[train,dev]' \
		|| $(PYTHON) -m pip install --quiet --editable '.[train,dev]'
