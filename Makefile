# make train                               trains a detector with and without unlabeled scans, 3 to 5 minutes on 2
#                                          cores with AVX-512; SEEDS=5 adds four seeds
# make test | bench | lint | types | docs | floor
#                                          in an environment of its own (.venv), made at first use with exact versions
# make help                                these lines
# make experiment                          the comparison of docs/results.md, JOBS runs at once; goes on where it was
#                                          stopped. make tuning: its settings, on other phantoms
# make train PYTHON=python                 in the active environment (a GPU build of torch, say): adds what is missing
# make compat                              the tests of the ops with the oldest and with the newest versions
# make gpu                                 on a machine with a GPU: checks, benchmarks and tuning, 9
#                                          minutes each (gpu-checks, gpu-bench, gpu-tune); installs nothing

VENV ?= .venv
DATA ?= data/demo
RUN ?= runs/demo
SCANS ?= 90
LABELED ?= 12
STEPS ?= 900
SEEDS ?= 1
RESULTS ?= benchmarks/results
CONSTRAINTS ?= constraints.txt
JOBS ?= 2

ifeq ($(origin PYTHON),command line)
READY := environment-in-use
TO_TRAIN := environment-in-use
else
PYTHON := $(VENV)/bin/python
READY := $(VENV)/ready
TO_TRAIN := $(or $(wildcard $(READY)),$(VENV)/ready-to-train)
endif
EXTRAS := train,dev

export OMP_WAIT_POLICY ?= passive

.PHONY: help train train-plan experiment tuning test nightly coverage bench lint types docs compat quick floor gpu gpu-checks gpu-bench gpu-tune clean environment-in-use

help:
	@sed -n '/^$$/q; s/^# //p' Makefile

train $(VENV)/ready-to-train: EXTRAS := train
train: train-plan $(TO_TRAIN)
	$(PYTHON) -m fmkernels phantom "$(DATA)" --scans $(SCANS)
	$(PYTHON) -m fmkernels compare "$(DATA)" --out "$(RUN)" --labeled $(LABELED) --seeds $(SEEDS) --jobs $(JOBS) \
		--steps $(STEPS) --validation-subsets=, --test-subsets=7,8,9
	@echo "Next: look at the last two pictures. make train SEEDS=5 repeats it with four more seeds;"
	@echo "fmkernels check FOLDER looks at scans of your own (docs/own_data.md)."

train-plan:
	@echo "This installs PyTorch and the rest (1 minute), makes $(SCANS) synthetic CT scans (1 minute), and trains a"
	@echo "detector on $(LABELED) labeled scans, then FocalMix on the others too (2 to 3 minutes on 2 cores with AVX-512)."

# the settings of docs/results.md
EXPERIMENT := --out runs/experiment --seeds 10 --jobs $(JOBS) --train-subsets=0,1,2,3,4,5,6,7 --validation-subsets=,
# $(call keep,FOLDER,NAME) keeps tables and pictures of a comparison
keep = mkdir -p $(RESULTS)/phantoms/$(2) && cp $(1)/table.* $(1)/runs.csv $(1)/timing.json $(1)/cpm.png $(RESULTS)/phantoms/$(2)

experiment: $(READY)
	$(PYTHON) -m fmkernels phantom data/experiment --seed 3 --scans 240 --test-scans 144
	$(PYTHON) -m fmkernels compare data/experiment $(EXPERIMENT) --labeled 12 24 6 --without mixup --all-labels
	$(call keep,runs/experiment,main)
	$(PYTHON) -m fmkernels compare data/experiment $(EXPERIMENT) --labeled 12 --all-labels \
		--without mixup image-mixup object-mixup soft-labels soft-loss views sharpening \
		--with burn-in fresh-supervised fresh-student supervised-mixup rotations plain-ops
	$(call keep,runs/experiment,parts)
	$(PYTHON) -m fmkernels phantom data/unlabeled --seed 2 --scans 240
	$(PYTHON) -m fmkernels compare data/experiment $(EXPERIMENT) --out runs/full \
		--labeled 192 --unlabeled-data=data/unlabeled
	$(call keep,runs/full,full)

# on phantoms of another seed, which the experiment does not see
tuning: $(READY)
	$(PYTHON) -m fmkernels phantom data/tuning --seed 1 --scans 240 --test-scans 144
	$(PYTHON) -m fmkernels compare data/tuning --out runs/tuning --seeds 3 --jobs $(JOBS) \
		--train-subsets=0,1,2,3,4,5,6,7 --validation-subsets=, --labeled 12 --all-labels \
		--without mixup image-mixup object-mixup \
		--with burn-in fresh-supervised fresh-student following-teacher unlabeled-mixup supervised-mixup \
		rotations contrast noise blur probable-boxes own-normalizer ignored-targets
	$(call keep,runs/tuning,tuning)

test: $(READY)
	@echo "all tests, about 15 minutes of CPU time shared by all cores; without a GPU kernels run in an interpreter"
	$(PYTHON) -m pytest -n auto

# long fault injection, many cases of each property, and fuzzing
nightly: $(READY)
	$(PYTHON) -m pytest -n auto -m nightly
	FMKERNELS_TEST_CASES=10 $(PYTHON) -m pytest -n auto -k test_any
	$(PYTHON) -m tests.fuzz --minutes 30

coverage: $(READY)
	$(PYTHON) -m pytest -n auto --cov=fmkernels --cov-report=term

# --limit drops the last ones first
LAST := $(patsubst %,benchmarks/bench_%.py,host_time focalmix_step growth)
SUITES := $(filter-out $(LAST),$(sort $(wildcard benchmarks/bench_*.py))) $(LAST)

bench: $(READY)
	mkdir -p $(RESULTS)/local
	rm -f $(RESULTS)/local/benchmarks.json
	$(PYTHON) -m pytest -q $(SUITES) --limit=600 --benchmark-max-time=0.2 --benchmark-quiet \
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

# the tests of the ops, with few cases of each property
OTHERS := benchmarks docs examples %floor fuzz gpu_run layering packaging tune types
OF_OPS := $(filter-out $(OTHERS:%=tests/test_%.py),$(wildcard tests/test_*.py))

quick: $(READY)
	FMKERNELS_TEST_CASES=0.02 $(PYTHON) -m pytest -n auto $(OF_OPS)

floor: $(READY)
	$(PYTHON) -m tests.support.floor

gpu: gpu-checks gpu-bench gpu-tune

gpu-checks gpu-bench gpu-tune: PYTHON := $(if $(filter environment-in-use,$(READY)),$(PYTHON),python3)
gpu-checks gpu-bench gpu-tune: gpu-%:
	$(PYTHON) -m benchmarks.gpu $* --results $(RESULTS)

clean:
	rm -rf $(VENV)

$(VENV)/ready $(VENV)/ready-to-train: setup.py $(CONSTRAINTS)
	python3 -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS)]'
	@touch $@ && echo "installed into $(VENV)"

environment-in-use:
	$(PYTHON) -m pip install --quiet --no-build-isolation --editable '.[$(EXTRAS)]' \
		|| $(PYTHON) -m pip install --quiet --editable '.[$(EXTRAS)]'
