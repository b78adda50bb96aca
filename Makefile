# On a fresh machine `make quickstart` and `make test` do all the set-up. PYTHON=python3.12 picks another Python.

PYTHON ?= python3
PIP_FLAGS ?=
WORKERS ?= 2

ENV := .venv
RUN := $(ENV)/bin/python
STAMP := $(ENV)/.installed
ENV_21 := .venv-torch21
RUN_21 := $(ENV_21)/bin/python
STAMP_21 := $(ENV_21)/.installed
ENV_LLAVA := .venv-llava
RUN_LLAVA := $(ENV_LLAVA)/bin/python
STAMP_LLAVA := $(ENV_LLAVA)/.installed
ENV_LMMS := .venv-lmms
RUN_LMMS := $(ENV_LMMS)/bin/python
STAMP_LMMS := $(ENV_LMMS)/.installed

# The machine's cores are shared by the test workers; one thread each.
TEST_THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help env test lint format quickstart bench bench-gpu test-launcher test-torch21 test-llava test-lmms clean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

env: $(STAMP)  ## make .venv and install the project with everything it uses

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "make: needs Python 3.10 to 3.13 as $(PYTHON); name one, e.g. make PYTHON=python3.12 env" >&2; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(ENV) || \
		{ echo "make: $(PYTHON) cannot make virtual environments; install its venv package (Debian: apt install python3-venv)" >&2; \
		rm -rf $(ENV); exit 1; }
	@echo "installing the environment into $(ENV): some minutes, and some gigabytes of packages" >&2
	$(RUN) -m pip install --quiet $(PIP_FLAGS) -e '.[dev]'
	@touch $@

test: $(STAMP)  ## run the test suite
	$(TEST_THREADS) $(RUN) -m pytest -n $(WORKERS) --dist loadfile

lint: $(STAMP)  ## check style, format and types
	$(ENV)/bin/ruff check .
	$(ENV)/bin/ruff format --check .
	$(ENV)/bin/mypy

format: $(STAMP)  ## format the code and repair what can be repaired
	$(ENV)/bin/ruff check --fix .
	$(ENV)/bin/ruff format .

quickstart: $(STAMP)  ## bootstrap a 49-token SparseFormer from the embedded teacher, and let a small LLaVA see with it
	$(RUN) -m bootstrap.quickstart
	$(RUN) -m eval.quickstart

# OFFICIAL=DIR names a checkout of github.com/showlab/sparseformer to compare with.
OFFICIAL ?=
BENCH := $(RUN) -m eval.bench
BENCH_OFFICIAL := $(if $(OFFICIAL),--official $(OFFICIAL))

bench: $(STAMP)  ## measure speed on the CPU, in minutes: ratios in turn, records in runs/bench.jsonl
	$(BENCH) encoder $(BENCH_OFFICIAL) --rival open_clip:ViT-B-16 --batch 1 8 --rounds 5
	$(BENCH) encoder $(BENCH_OFFICIAL) --preset sparseformer_btsp_openai_clip_large \
		--rival open_clip:ViT-L-14-336 --batch 1 --rounds 3
	$(BENCH) parts --threads 1
	$(BENCH) training --rounds 3
	$(BENCH) memory
	$(BENCH) data
	$(BENCH) answer --rounds 3

bench-gpu: $(STAMP)  ## the same on a GPU, with every ViT and large batches
	$(BENCH) encoder --compile --device cuda --dtype bf16 $(BENCH_OFFICIAL) --preset sparseformer_btsp_openai_clip_large \
		--rival open_clip:ViT-L-14-336 --rival transformers:ViT-L-14-336 --rival open_clip:ViT-L-14 \
		--rival open_clip:ViT-B-16 --rival-graphs --batch 1 16 64 256
	$(BENCH) parts --device cuda --dtype bf16 --preset sparseformer_btsp_openai_clip_large --batch 1 256
	$(BENCH) kernels --device cuda --dtype bf16
	$(BENCH) training --device cuda --dtype bf16 --teacher vit_l_14 --batch 256 --decoded --steps 4
	$(BENCH) memory --device cuda --dtype bf16 --preset sparseformer_btsp_openai_clip_large \
		--teacher transformers:ViT-L-14
	$(BENCH) answer --device cuda --dtype bf16 --llm 7b --batch 1 8 64
	$(BENCH) answer --device cuda --dtype bf16 --llm 7b --batch 1 8 64 --graphs

test-launcher: $(STAMP)  ## run the tests that start the deepspeed launcher (minutes)
	SPARSE_VLM_LAUNCHER=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -m launcher

# The library alone must also work beside an older torch, which upstream LLaVA pins.
test-torch21: $(STAMP_21)  ## run the library's tests on torch 2.1 (needs Python 3.10 or 3.11)
	PYTHONPATH=. $(TEST_THREADS) $(RUN_21) -m pytest -q -p no:cacheprovider tests/sparse_vlm

$(STAMP_21): Makefile
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 11))' || \
		{ echo "make: torch 2.1 needs Python 3.10 or 3.11; name one, e.g. make PYTHON=python3.11 test-torch21" >&2; exit 1; }
	test -x $(RUN_21) || $(PYTHON) -m venv $(ENV_21)
	$(RUN_21) -m pip install --quiet $(PIP_FLAGS) 'torch==2.1.2' 'numpy>=1.24,<2' 'Pillow>=9.5' 'safetensors>=0.4' \
		'pytest>=8' 'hypothesis>=6.100'
	@touch $@

# Upstream LLaVA pins a stack of its own. These versions are the leanest set on which its training and its
# generation both run, without a GPU too; llava-torch comes without its dependencies, which pin older ones.
LLAVA_STACK := torch==2.13.0 transformers==4.37.2 tokenizers==0.15.1 accelerate==0.34.2 peft==0.13.2 \
	deepspeed==0.16.9 sentencepiece==0.1.99 'numpy<2' protobuf einops==0.6.1 shortuuid requests Pillow \
	safetensors ninja setuptools 'pytest>=8'

test-llava: $(STAMP_LLAVA)  ## train and run upstream LLaVA with our tower (needs Python 3.10 or 3.11)
	PYTHONPATH=. SPARSE_VLM_PYTHON=$(abspath $(RUN)) $(TEST_THREADS) $(RUN_LLAVA) -m pytest -q -p no:cacheprovider tests/llava tests/llm_integration/test_tower.py

$(STAMP_LLAVA): Makefile
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 11))' || \
		{ echo "make: LLaVA's stack needs Python 3.10 or 3.11; name one, e.g. make PYTHON=python3.11 test-llava" >&2; exit 1; }
	test -x $(RUN_LLAVA) || $(PYTHON) -m venv $(ENV_LLAVA)
	$(RUN_LLAVA) -m pip install --quiet $(PIP_FLAGS) $(LLAVA_STACK)
	$(RUN_LLAVA) -m pip install --quiet $(PIP_FLAGS) --no-deps llava-torch==1.2.2.post1
	@touch $@

# lmms-eval brings some ninety packages of its own; the project is installed beside it for its entry point.
# Its release 0.7.3 reaches into filelock's insides, which filelock 4 has rearranged.
test-lmms: $(STAMP_LMMS)  ## run our models under lmms-eval and compare with our own engine
	PYTHONPATH=. $(TEST_THREADS) $(RUN_LMMS) -m pytest -q -p no:cacheprovider tests/lmms

$(STAMP_LMMS): Makefile pyproject.toml
	test -x $(RUN_LMMS) || $(PYTHON) -m venv $(ENV_LMMS)
	$(RUN_LMMS) -m pip install --quiet $(PIP_FLAGS) -e '.[lmms,eval]' 'lmms-eval==0.7.3' 'filelock<4' 'pytest>=8'
	@touch $@

clean:  ## remove caches and build outputs, but no environment and no results
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
