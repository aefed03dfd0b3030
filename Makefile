# make setup   Python's packages into .venv; then, in each shell:  . .venv/bin/activate
# make demo    set up, pack digits, train on 2 CPU ranks (all GPUs where there are any), evaluate, say what to open
#              make demo OVERRIDES="train.steps=300": the same with other keys of its config
# make test    set up, lint, run the whole test suite;   make campaigns: the long ones
# make chaos   half an hour of kills, damage and starvation against a small job; the report is tests/chaos.md
# make test-slurm    trainings on a real SLURM of two nodes, started on this machine (root; Debian: slurm-wlm munge)
PYTHON ?= python3
BIN := .venv/bin
GPUS := $(shell nvidia-smi -L 2>/dev/null | wc -l)
ACCELERATORS := $(if $(filter 0,$(GPUS)),2,$(GPUS))
export PATH := $(CURDIR)/$(BIN):$(PATH)
# make's own PATH ends with it: the shell that it was called from finds no dtrain before this.
activation = [ "$$VIRTUAL_ENV" = "$(CURDIR)/.venv" ] || echo "type this first, in each shell:  . .venv/bin/activate"

.PHONY: setup demo test test-slurm campaigns chaos lint clean

setup: .venv/ready
	@$(activation)

demo: .venv/ready
	dtrain pack sklearn:digits data/digits --holdout 360
	$(if $(filter 0,$(GPUS)),DS_ACCELERATOR=cpu) deepspeed --quiet --num_accelerators $(ACCELERATORS) \
		launch/train.py configs/digits-dit.yaml $(OVERRIDES)
	@$(activation)

# Passive: a thread that waits leaves its core to another test.
test: .venv/ready lint
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python -m pytest -n 3 --dist worksteal tests

test-slurm: .venv/ready
	python -m pytest -m slurm tests/slurm

campaigns: .venv/ready
	python -m pytest -m campaign tests

chaos: .venv/ready
	dtrain chaos --minutes 30 --seed 0 --out tests/chaos.md

lint: .venv/ready
	ruff check .
	ruff format --check .

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "dtrain needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@echo "installing into .venv; most of it is torch, some 5 minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf .venv data runs
