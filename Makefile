# `make demo` or `make test` alone sets everything up first; a second call starts at once. `make help` lists the targets.

PYTHON ?= python3
# The torch to install, and further arguments for pip (for example the index that serves a CPU or CUDA build of it).
TORCH ?= torch==2.13.0
PIP_ARGS ?=
# Passed on by demo, test, bench, gpu, paper and real: make test ARGS="-k toy -x".
ARGS ?=
# Of gpu: where its results go, and a folder of wheels that the machine's Python lacks.
OUT ?= gpu-results
WHEELS ?=
TIERS ?= unit distributed faults cluster e2e models
# How many files of tests run at a time; 0 runs them one after the other, as --pdb and -s need it.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))

VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin

# DeepSpeed looks for ninja on the path when it builds an operator.
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"
# accelerate would otherwise give a single process one thread.
export OMP_NUM_THREADS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench fuzz kills serve-test gpu paper real clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## create .venv with the tested versions

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: name a Python 3.10 to 3.13 with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) -V 2>&1): name a Python 3.10 to 3.13 with PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || { \
	  rm -rf $(VENV); echo "$(PYTHON) cannot create $(VENV): install its venv module (python3-venv on Debian)." >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade $(PIP_ARGS) pip
	@nvidia-smi >/dev/null 2>&1 || echo "No NVIDIA GPU found. Where pip's index has no CPU build of torch, name one that has it with PIP_ARGS=..."
	$(BIN)/python -m pip install $(PIP_ARGS) '$(TORCH)'
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	DS_BUILD_OPS=0 $(BIN)/python -m pip install $(PIP_ARGS) -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## damage and repair the embedded toy model; needs no GPU
	$(RUN) $(BIN)/accelerate launch --quiet --config_file launch/single.yaml oneshot/repair.py $(ARGS)

# Tiers run in order and the first that fails ends the run. pytest's status 5 says that ARGS selected nothing in a tier.
# tests/gpu is for TIERS=gpu alone, one file after the other, as there is one GPU; without one its tests are skipped.
# One thread per process: tests are small, and several run at a time. There is one Slurm cluster, so its tests take turns.
test: export TOKENIZERS_PARALLELISM := false
test: export HF_HUB_OFFLINE := 1
test: $(READY) ## run the tests, fastest tier first
	@status=5; for tier in $(TIERS); do \
	  test -d tests/$$tier || continue; \
	  case $$tier in cluster|gpu) workers=0 ;; *) workers=$(WORKERS) ;; esac; \
	  case $$tier in gpu) kind=gpu ;; *) kind="not gpu" ;; esac; \
	  echo "== tests/$$tier"; code=0; \
	  $(RUN) OMP_NUM_THREADS=1 $(BIN)/pytest -m "$$kind" -n $$workers --dist loadfile tests/$$tier $(ARGS) || code=$$?; \
	  case $$code in 0) status=0 ;; 5) ;; *) exit $$code ;; esac; \
	done; exit $$status

check: $(READY) ## lint, types, imports, lengths, spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/shape.py
	$(BIN)/codespell
	git ls-files -z '*.sh' .ci/run | xargs -0 -r $(BIN)/shellcheck

# what others of them use, what needs a GPU, and what takes long
NO_BENCH := benchmarks/gpu% benchmarks/random_llama.py benchmarks/plan_steps.py \
  $(addprefix benchmarks/,paper.py real.py large_vocabulary.py)
bench: $(READY) ## compare with the stock stack, side by side
	@for script in $(filter-out $(NO_BENCH),$(wildcard benchmarks/*.py)); do \
	  echo "== $$script"; $(RUN) $(BIN)/python "$$script" $(ARGS) || exit $$?; done

# On a machine that make setup has not been run on, such as one without a network, with that machine's own PYTHON.
gpu: PYTHON_HERE = $(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON))
gpu: ## all that one GPU can tell in 10 minutes, offline; without one a dry run at tiny sizes
	$(PYTHON_HERE) benchmarks/gpu.py --out '$(OUT)' $(if $(WHEELS),--wheels '$(WHEELS)') $(ARGS)

serve-test: $(READY) .vllm/.ready ## a real vLLM serves what oneshot writes, on CPUs; installs 3.5 GB into .vllm
	$(RUN) HF_HUB_OFFLINE=1 ONESHOT_VLLM=$(CURDIR)/.vllm/bin/vllm $(BIN)/pytest tests/serve $(ARGS)

# Without torchvision, torchaudio and torchcodec, whose builds on an index do not fit a CPU torch; and as vLLM looks for
# its version under its own name.
.vllm/.ready: tests/serve/install.py
	$(PYTHON) -m venv --clear .vllm
	.vllm/bin/python tests/serve/install.py $(PIP_ARGS)
	@touch $@

fuzz: $(READY) ## damage files at random, N times (300), and look at how every command takes it
	$(RUN) HF_HUB_OFFLINE=1 $(BIN)/python tests/faults/fuzz.py --count $(or $(N),300) $(ARGS)

kills: $(READY) ## kill commands at random moments, N times (60), and look at what they leave
	$(RUN) HF_HUB_OFFLINE=1 $(BIN)/python tests/faults/kills.py --count $(or $(N),60) --seed $(or $(SEED),0) $(ARGS)

paper: $(READY) ## every claim of the paper in miniature, in about 40 minutes; goes on where it was stopped
	$(RUN) $(BIN)/python benchmarks/paper.py $(ARGS)

real: $(READY) ## attacks and repairs of real models on public prompts, in hours; goes on where it was stopped
	$(RUN) $(BIN)/python benchmarks/real.py $(ARGS)

clean: ## remove .venv and caches; run folders stay
	rm -rf $(VENV) .vllm build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
