# Set-up needs python3 (3.11 or newer) and this file; everything else is installed into .venv or .venv-oldest.
PYTHON ?= python3
RANKS ?= 4
EPOCHS ?= 12
# Processes that run tests side by side, each with four ranks of its own.
JOBS ?= 2
PYTEST = python -m pytest -n $(JOBS) --dist loadfile --durations 40
TRAIN = .venv/bin/python -m twolevel.torchrun --standalone --nproc-per-node $(RANKS) \
	-m twolevel train --model wrn-16-2 --conv gc2l --groups 4
TESTS =

# The oldest torch that pyproject.toml allows, and the torchvision that goes with it; they change with it.
OLDEST = torch==2.11.0 torchvision==0.26.0

help:
	@echo "make demo         install into .venv, then train GC-2L over $(RANKS) ranks on the bundled sample"
	@echo "make check        install into .venv, then check style and types"
	@echo "make test         the same, then run every test"
	@echo "make test-oldest  install $(OLDEST) into .venv-oldest, then run every test,"
	@echo "                  or some: make test-oldest TESTS='tests/ops tests/nn'"
	@echo "make docs         the same as far as installing, then build the documentation into build/docs"
	@echo "make clean        remove .venv, .venv-oldest and what a build left"

# $(1): what else is installed
define environment
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python3 is %d.%d; twolevel needs 3.11 or newer: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --editable '.[dev,mpi]' $(1)
	@touch $@
endef

.venv/installed: pyproject.toml
	$(call environment)

.venv-oldest/installed: pyproject.toml Makefile
	$(call environment,$(OLDEST))

demo: .venv/installed
	rm -rf runs/demo
	OMP_NUM_THREADS=1 $(TRAIN) --data sample --batch-size 100 --epochs $(EPOCHS) --lr-schedule cosine --log-steps 5 \
		--output runs/demo
	@echo
	@echo "Next, the real data (downloads CIFAR-10 into data/, 170 MB):"
	@echo "  $(TRAIN) \\"
	@echo "      --data cifar10 --download"

check: .venv/installed
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright --pythonpath .venv/bin/python

test: check
	.venv/bin/$(PYTEST)

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/$(PYTEST) $(TESTS)

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --config-file docs/mkdocs.yml
	@echo "build/docs/index.html is the first page"

clean:
	rm -rf .venv .venv-oldest build *.egg-info

.PHONY: help demo check test test-oldest docs clean
