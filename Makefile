# Two commands: `make demo` and `make test`. Each sets up what it needs, once, inside this folder.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
# which Detectron2: pinned (the republication) or git (upstream main); else the one in VENV, or pinned
DETECTRON2 ?=
# cpu: builds of torch without CUDA, 2 GB instead of 6; default: undoes that; else as before
TORCH ?=
DEMO ?= output/demo
BENCHMARK ?= output/benchmark
# three for two cores, as some tests wait for clocks
TEST_JOBS ?= 3
MASKS ?= output/demo-masks
# of `make benchmark` and `make test-cuda`: cuda for the targets on a GPU
DEVICE ?=

# torch's OpenMP workers spin while they wait, which makes a busy machine ten to thirty times slower
export OMP_WAIT_POLICY ?= passive
# caches that would otherwise be put into the home folder
export MPLCONFIGDIR ?= $(CURDIR)/.cache/matplotlib
export FVCORE_CACHE ?= $(CURDIR)/.cache/fvcore
export TORCH_HOME ?= $(CURDIR)/.cache/torch
export BLACK_CACHE_DIR ?= $(CURDIR)/.cache/black
export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/.cache/inductor

PY := $(VENV)/bin/python
# what `make benchmark` measures
R50 := configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml
D0 := configs/COCO-Detection/retinanet_R_50_BiFPN_D0_1x.yaml
FP32 := MODEL.CHANNELS_LAST True MODEL.FAST_ROI_ALIGN True TEST.FOLD_NORMS True SOLVER.FUSED True
# each lever alone, then what belongs together
LEVERS := --variant 'channels-last: MODEL.CHANNELS_LAST True' --variant 'amp: SOLVER.AMP.ENABLED True' \
  --variant 'amp in channels-last: SOLVER.AMP.ENABLED True MODEL.CHANNELS_LAST True' \
  --variant 'ROIAlign: MODEL.FAST_ROI_ALIGN True' --variant 'fp32: $(FP32)' --variant 'bf16: $(FP32) SOLVER.AMP.ENABLED True'
NECKS := --variant 'folded: TEST.FOLD_NORMS True' --variant 'recompute: MODEL.FPN.RECOMPUTE True' \
  --variant 'compiled: TEST.FOLD_NORMS True MODEL.CHANNELS_LAST True MODEL.COMPILE pyramid'
SOURCES := fpn_plugin tools tests datasets docs setup.py

.PHONY: help setup demo demo-masks benchmark test test-cuda test-slurm test-oldest docs lint format lock clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo "  Variables: PYTHON=$(PYTHON) VENV=$(VENV) DETECTRON2=$(DETECTRON2) (pinned or git) TORCH=$(TORCH) (cpu or default) DEVICE=$(DEVICE) (cpu or cuda)"

setup: ## make the environment (.venv, about 6 GB); the other targets do this by themselves
	@$(PYTHON) tools/setup_env.py --venv $(VENV) --detectron2 "$(DETECTRON2)" --torch "$(TORCH)"

demo: setup ## train a detector on photos of trees on the CPU, evaluate it, draw what it finds (10 minutes)
	@$(PY) tools/demo.py trees --output $(DEMO)

demo-masks: setup ## the same for instance masks, on micrographs of nuclei and micronuclei (10 minutes)
	@$(PY) tools/demo.py cells --output $(MASKS)

benchmark: setup ## measure Mask R-CNN against Detectron2's own, BiFPN against effdet's, each lever alone, on an idle machine (30 minutes); DEVICE=cuda: the targets on a GPU (7 minutes)
	@if [ "$(DEVICE)" = cuda ]; then PYTHON=$(PY) exec tests/gpu/run --only benchmark; fi; \
	failed=; run() { name=$$1; shift; $(PY) "$$@" --report $(BENCHMARK)/$$name --overwrite || failed="$$failed $$name"; }; \
	run inference tests/benchmarks/run.py --config-file $(R50) $(LEVERS) --variant 'folded: TEST.FOLD_NORMS True' --image-size 512 512 \
	  --what counts,neck,backbone,inference --floors; \
	run training tools/benchmark.py --config-file $(R50) $(LEVERS) --variant 'fused: SOLVER.FUSED True' --image-size 320 320 --batch 2 --what train; \
	run bifpn tests/benchmarks/run.py --config-file $(D0) $(NECKS) --baseline none --peers effdet --floors --image-size 512 512 \
	  --what counts,neck,neck_train; \
	run startup tests/benchmarks/run.py --startup; \
	if [ -n "$$failed" ]; then echo "refused or failed:$$failed"; exit 1; fi

test: setup ## run all tests, in TEST_JOBS processes of one thread each
	@mkdir -p .cache
	@OMP_NUM_THREADS=1 $(PY) -m pytest tests --basetemp=.cache/pytest -n $(TEST_JOBS) --dist worksteal

test-cuda: setup ## run what needs a GPU, on one of them; a rehearsal on any machine: DEVICE=cpu
	@PYTHON=$(PY) tests/gpu/run --only tests --device $(or $(DEVICE),cuda)

test-slurm: setup ## the script of docs/launching.md on a real SLURM of this host; root, installs slurm and munge
	@tests/slurm/run $(PY) || { code=$$?; [ $$code = 77 ] || exit $$code; }

# Left out: what needs minutes (training, exports, whole detectors, pages in a browser)
test-oldest: ## run the fast tests with the oldest versions that setup.py allows, in .venv-oldest
	@$(PYTHON) tools/setup_env.py --venv .venv-oldest --oldest
	@mkdir -p .cache
	@OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest tests/pyramid tests/bottom_up tests/checkpoint tests/config tests/data tests/modeling \
	  --basetemp=.cache/pytest-oldest -n $(TEST_JOBS) --dist worksteal

docs: setup ## build the documentation as one site, output/docs; a broken link is an error
	@$(PY) -m sphinx -W --keep-going -q -E -b html docs output/docs
	@echo "output/docs/index.html"

lint: setup ## black, isort, flake8 and mypy
	@$(PY) -m black --check --quiet $(SOURCES) || { echo "black: run 'make format'"; exit 1; }
	@$(PY) -m isort --check-only --quiet $(SOURCES) || { echo "isort: run 'make format'"; exit 1; }
	@$(PY) -m flake8 $(SOURCES)
	@$(PY) -m mypy fpn_plugin
	@MYPYPATH=datasets $(PY) -m mypy datasets/*.py

format: setup ## let black and isort rewrite the code
	@$(PY) -m isort --quiet $(SOURCES)
	@$(PY) -m black --quiet $(SOURCES)

lock: setup ## work out requirements.txt again from the ranges in setup.py and tools/detectron2_wheel
	@$(PY) tools/setup_env.py --venv $(VENV) --lock

clean: ## remove the environment and all caches; datasets/ and output/ are kept
	rm -rf .venv .venv-oldest .cache .mypy_cache .pytest_cache build *.egg-info
	find fpn_plugin tools tests datasets -name __pycache__ -type d -prune -exec rm -rf {} +
