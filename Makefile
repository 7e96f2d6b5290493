# Set-up needs python3 (3.11 or newer) and this file; everything else is installed into .venv.
PYTHON ?= python3
RANKS ?= 4
EPOCHS ?= 12
TRAIN = .venv/bin/python -m twolevel.torchrun --standalone --nproc-per-node $(RANKS) \
	-m twolevel train --model wrn-16-2 --conv gc2l --groups 4

help:
	@echo "make demo    install into .venv, then train GC-2L over $(RANKS) ranks on the bundled sample"
	@echo "make test    install into .venv, then check the style and run every test"
	@echo "make clean   remove .venv and what a build left"

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python3 is %d.%d; twolevel needs 3.11 or newer: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --editable '.[dev,mpi]'
	@touch $@

demo: .venv/installed
	rm -rf runs/demo
	OMP_NUM_THREADS=1 $(TRAIN) --data sample --batch-size 100 --epochs $(EPOCHS) --lr-schedule cosine --log-steps 5 \
		--output runs/demo
	@echo
	@echo "Next, the real data (downloads CIFAR-10 into data/, 170 MB):"
	@echo "  $(TRAIN) \\"
	@echo "      --data cifar10 --download"

test: .venv/installed
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/python -m pytest

clean:
	rm -rf .venv build *.egg-info

.PHONY: help demo test clean
