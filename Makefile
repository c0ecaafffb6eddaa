# Edgewright. Every target does its own set-up in .venv, and does it again only when pyproject.toml has changed.
## MODEL: The network; edgewright models lists them.
## ARGS: Passed on to the program, such as ARGS='--threads 1'.
## WORKERS: Tests at a time; 2 if not given.
## PYTHON: The Python that makes .venv, 3.10 to 3.12.
## EXTRAS: Of pyproject.toml, into .venv.
MODEL ?= mobilenet_effnet_b0
ARGS ?=
WORKERS ?= 2
PYTHON ?=
EXTRAS ?= build,cpu,lite,sign$(if $(findstring Linux x86_64,$(shell uname -sm)),$(comma)rtx$(comma)openvino)

SHELL := /bin/sh
.SHELLFLAGS := -euc
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help engine bundle test lint bench zoo train test-oldest ort-gpu-env peers-env pycuda-wheel clean

comma := ,
VENV := .venv
OLDEST_VENV := .venv-oldest
ORT_GPU_VENV := .venv-ortgpu
PEERS_VENV := .venv-peers
KEY := $(shell echo "$(EXTRAS)" | cat - pyproject.toml | cksum | tr ' ' -)
OLDEST_KEY := $(shell cat pyproject.toml tests/oldest.txt | cksum | tr ' ' -)
ENGINE_STAMP := $(VENV)/.engine-$(KEY)
TEST_STAMP := $(VENV)/.test-$(KEY)
OLDEST_STAMP := $(OLDEST_VENV)/.test-$(OLDEST_KEY)
PYCUDA_STAMP := $(VENV)/.pycuda
PEERS_STAMP := $(PEERS_VENV)/.peers-$(shell cksum <benchmarks/peers.txt | tr ' ' -)
ORT_GPU_STAMP := $(ORT_GPU_VENV)/.gpu-$(shell cksum <pyproject.toml | tr ' ' -)

help:  ## This list.
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22
	@echo 'Variables, as in make engine MODEL=lenet:'
	@sed -n 's/^## \([A-Z]*\): /  \1\t/p' $(MAKEFILE_LIST) | expand -t 22

engine: $(ENGINE_STAMP)  ## Export, fold, calibrate, quantize, build and prove MODEL.
	@$(VENV)/bin/edgewright engine $(MODEL) $(ARGS)

test: $(TEST_STAMP)  ## The tests, WORKERS of them at a time.
	$(VENV)/bin/pytest --numprocesses $(WORKERS) --dist worksteal $(ARGS)

lint: $(TEST_STAMP)  ## Style, types and the direction of imports.
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: $(TEST_STAMP)  ## The figures, in one run; writes docs/benchmarks.md.
	$(VENV)/bin/python benchmarks/run.py $(ARGS)

zoo: $(TEST_STAMP)  ## Every network; writes docs/zoo.md. More than an hour.
	$(VENV)/bin/python benchmarks/zoo.py $(ARGS)

bundle: $(ENGINE_STAMP)  ## Pack MODEL for a device; ARGS=--archive for one file.
	@$(VENV)/bin/edgewright pack $(MODEL) $(ARGS)

train: $(ENGINE_STAMP)  ## Train MODEL on Fashion-MNIST by its recipe.
	$(VENV)/bin/edgewright train $(MODEL) $(ARGS)

test-oldest: $(OLDEST_STAMP)  ## The tests with the oldest Python and libraries.
	$(OLDEST_VENV)/bin/pytest --numprocesses $(WORKERS) --dist worksteal $(ARGS)

ort-gpu-env: $(ORT_GPU_STAMP)  ## onnxruntime-gpu for some tests (450 MB).

peers-env: $(PEERS_STAMP)  ## NNCF and ModelOpt for make bench (3 GB).

pycuda-wheel: $(PYCUDA_STAMP)  ## pycuda for some tests, compiled in minutes.

clean:  ## Remove engines, caches, .venv: all that these made.
	rm -rf $(VENV) $(OLDEST_VENV) $(ORT_GPU_VENV) $(PEERS_VENV) build dist src/edgewright.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call create,FOLDER,CANDIDATES,LOWEST,HIGHEST): a virtual environment, unless a working one is there. A candidate
# counts only if it runs (a version manager's shim may not), is Python 3.LOWEST to 3.HIGHEST, and can make one.
define create
@if ! $(1)/bin/python -m pip --version >/dev/null 2>&1; then \
  found=; \
  for candidate in $(2); do \
    if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, $(3)) <= sys.version_info[:2] <= (3, $(4)))' \
      2>/dev/null; then found=$$candidate; break; fi; \
  done; \
  if [ -z "$$found" ]; then \
    echo "error: none of $(2) is a Python 3.$(3) to 3.$(4) with venv; name one with PYTHON=" >&2; exit 1; \
  fi; \
  "$$found" -m venv --clear $(1); \
  echo '*' > $(1)/.gitignore; \
fi
@touch $@
endef

# $(call install,FOLDER,STAMP NAME,EXTRAS,OPTIONS): pip's own settings and variables apply.
define install
@echo 'Installing edgewright[$(3)] into $(1). The first time this takes minutes; PyTorch is most of it.' >&2
@$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(4) --editable '.[$(3)]'
@rm -f $(1)/.$(2)-* && touch $@
endef

$(VENV)/.created:
	$(call create,$(VENV),$(or $(PYTHON),python3.12 python3.11 python3.10 python3),10,12)

$(OLDEST_VENV)/.created:
	$(call create,$(OLDEST_VENV),$(or $(PYTHON),python3.10 $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python)),10,10)

$(ORT_GPU_VENV)/.created:
	$(call create,$(ORT_GPU_VENV),$(or $(PYTHON),python3.12 python3.11 python3.10 python3),10,12)

$(PEERS_VENV)/.created:
	$(call create,$(PEERS_VENV),$(or $(PYTHON),python3.12 python3.11 python3.10 python3),10,12)

$(ENGINE_STAMP): | $(VENV)/.created
	$(call install,$(VENV),engine,$(EXTRAS))

$(TEST_STAMP): | $(VENV)/.created
	$(call install,$(VENV),test,$(EXTRAS)$(comma)test)
	@rm -f $(VENV)/.engine-* && touch $(ENGINE_STAMP)

$(OLDEST_STAMP): | $(OLDEST_VENV)/.created
	$(call install,$(OLDEST_VENV),test,build$(comma)cpu$(comma)lite$(comma)test,--constraint tests/oldest.txt)

$(ORT_GPU_STAMP): | $(ORT_GPU_VENV)/.created
	$(call install,$(ORT_GPU_VENV),gpu,gpu)

# ModelOpt asks for onnxruntime-gpu, an older one, in whose place the one that everybody else uses is put.
$(PEERS_STAMP): benchmarks/peers.txt | $(PEERS_VENV)/.created
	@$(PEERS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement benchmarks/peers.txt
	@$(PEERS_VENV)/bin/python -m pip uninstall --quiet --yes onnxruntime-gpu
	@$(PEERS_VENV)/bin/python -m pip install --quiet --no-deps --force-reinstall onnxruntime
	@rm -f $(PEERS_VENV)/.peers-* && touch $@

$(PYCUDA_STAMP): .ci/pycuda-wheel | $(TEST_STAMP)
	@.ci/pycuda-wheel $(VENV) build/wheels
	@touch $@
