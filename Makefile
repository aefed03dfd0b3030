# make setup   Python's packages into .venv; then, in each shell:  . .venv/bin/activate
# make demo    set up, pack digits, train on 2 CPU ranks (all GPUs where there are any), evaluate, say what to open
#              make demo OVERRIDES="train.steps=300": the same with other keys of its config
# make trilemma  train a DiT, flows, GANs and a VAE on digits, and compare them by quality, diversity and speed; a run that
#              is finished stays as it is. OVERRIDES as above; PAIRS=2000 draws fewer of the pairs that the second flow needs
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

# Those of which there is a config, in this order: the second flow trains on what the first one draws.
TRILEMMA := dit flow reflow meanflow ddgan gan vae
KINDS := $(patsubst configs/digits-%.yaml,%,$(wildcard $(TRILEMMA:%=configs/digits-%.yaml)))
PAIRS ?= 20000
train := $(if $(filter 0,$(GPUS)),DS_ACCELERATOR=cpu) deepspeed --quiet --num_accelerators $(ACCELERATORS) launch/train.py

.PHONY: setup demo trilemma test test-slurm campaigns chaos lint clean

setup: .venv/ready
	@$(activation)

demo: .venv/ready
	dtrain pack sklearn:digits data/digits --holdout 360
	$(train) configs/digits-dit.yaml $(OVERRIDES)
	@$(activation)

trilemma: .venv/ready
	dtrain pack sklearn:digits data/digits --holdout 360
	@for kind in $(KINDS); do \
		run=$$(echo digits-$$kind | sed 's/-dit$$//'); \
		if grep -qs '"finished"' runs/$$run/outcome.json; then echo "runs/$$run is finished and stays"; continue; fi; \
		if [ $$kind = reflow ]; then \
			dtrain pairs digits-flow data/digits-pairs -n $(PAIRS) --sampler heun --steps 25 || exit; fi; \
		echo "$(train) configs/digits-$$kind.yaml $(OVERRIDES)"; \
		$(train) configs/digits-$$kind.yaml $(OVERRIDES) || exit; \
	done
	dtrain compare $(patsubst digits-dit,digits,$(KINDS:%=digits-%)) --n 2000 --features pixels --out runs/trilemma
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
