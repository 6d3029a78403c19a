# Everything in minutes, offline:  make demo          The course:  make baseline reinforce dpo
# A target is a result file: what is there is not run again, what was cut off goes on. Other settings go to another
# folder:  make reinforce RUNS=runs/short FLAGS="--limit 1600 --eval-limit 320"

RUNS = runs/course
ALPHA = 0.02
BETA = 0.1

# What `make sweep` and `make seeds` add. An alpha is the reward that a nat of a whole completion's KL costs.
ALPHAS = 0 0.002 0.02 0.1 0.5 2
LOOS = 0.02
BETAS = 0.1 0.25 0.4 0.5 0.1-lr-5e-5
SEEDS = 1 2
SAMPLES = samples-32

# Processes for each run, on as many GPUs, or CPUs (torchrun); empty: one.
RANKS =

# Hub names or local folders; empty: the names that the course uses.
POLICY =
REWARD_MODEL =
PROMPTS =
PAIRS =

# Added to the flags of every script, of reinforce.py, of dpo.py.
FLAGS =
REINFORCE_FLAGS =
DPO_FLAGS =

# The demo: the same runs in the small world of demo/world.py, with lengths and learning rates that suit it, and with
# leave-one-out: on the raw reward it is chance which word alpha 0 ends in. MORE="alpha-0.3 beta-0.5" adds runs.
ifneq ($(filter demo broken,$(MAKECMDGOALS))$(filter runs/toy%,$(RUNS)),)
RUNS = runs/toy
ALPHA = 0.1
BETA = 0.1
ALPHAS = 0 0.002 0.02 0.1 0.3 1
LOOS =
BETAS = 0.02 0.1 0.25 0.5 0.1-lr-5e-7
WORLD = build/toy
POLICY = $(WORLD)/policy
REWARD_MODEL = $(WORLD)/reward_model
PROMPTS = $(WORLD)/prompts
PAIRS = $(WORLD)/pairs
SUITED = --prompt-len 10 --completion-len 20 --precision fp32  # so small that bf16 is no faster
SUITED_REINFORCE = --advantage loo --batch-size 32 --lr 5e-4
SUITED_DPO = --batch-size 16 --lr 5e-5 --max-len 128
# Spin shorter while a thread waits (Linux): a fifth slower alone, five times faster beside another busy program.
export GOMP_SPINCOUNT = 10000
ifneq ($(filter-out demo sweep seeds samples report readme broken $(RUNS)/%,$(MAKECMDGOALS)),)
$(error in the small world there are only demo, sweep, seeds, samples, report, broken and run folders, and demo makes them)
endif
endif
NEEDED = $(VENV) $(addsuffix /world.json,$(WORLD))

RUN = $(strip $(PYTHON) $(if $(RANKS),-m torch.distributed.run --standalone --nproc-per-node=$(RANKS)))
finished = $(patsubst %,$(RUNS)/%/eval.json,$1)
MAIN = baseline alpha-0 alpha-$(ALPHA) beta-$(BETA)
SWEEP = $(MAIN) $(ALPHAS:%=alpha-%) $(LOOS:%=loo-%) $(BETAS:%=beta-%) $(SAMPLES)
REPORT = $(PYTHON) -m report.report $(RUNS)

# Without PYTHON=..., make builds an environment of its own in .venv; with it, that interpreter is used as it is.
ifeq ($(origin PYTHON),undefined)
PYTHON := .venv/bin/python
VENV := .venv/ready
DEV := .venv/ready-dev
endif

ifneq ($(words $(RUNS)),1)
$(error RUNS is "$(RUNS)": make needs one path without white space here; --out of the scripts takes any path)
endif

ifeq ($(filter check,$(MAKECMDGOALS))$(SOLUTION),check)
$(error which file? make check SOLUTION=path/to/A3.py)
endif

flag = $(if $2,$1 "$2")
MODELS = $(call flag,--policy,$(POLICY)) $(call flag,--reference,$(POLICY)) \
         $(call flag,--reward-model,$(REWARD_MODEL)) $(call flag,--prompts,$(PROMPTS)) $(SUITED)

.PHONY: help demo baseline reinforce dpo sweep seeds samples report readme broken venv check test lint mutants bench \
        clean
.PRECIOUS: $(WORLD)/world.json $(RUNS)/%/eval.json  # written whole: an interrupted make must not delete them

help: ## list the targets (this)
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

DEMO = $(if $(filter report,$(MAKECMDGOALS)),,$(call finished,$(MAIN) $(SAMPLES) $(MORE)))
demo: $(DEMO) ## the whole lesson in a small world made here: offline, minutes, two cores
	@$(if $(filter sweep seeds report,$(MAKECMDGOALS)),:,$(REPORT) --expect $(MAIN) $(SAMPLES) $(MORE))

baseline: $(call finished,baseline) ## section 1: evaluate the untouched policy

reinforce: $(call finished,alpha-0 alpha-$(ALPHA)) ## sections 2, 3: REINFORCE without and with the KL
	@$(REPORT)

dpo: $(call finished,beta-$(BETA)) ## section 4: DPO
	@$(REPORT)

sweep: $(call finished,$(SWEEP) $(MORE)) ## all ALPHAS, BETAS and what is possible (make demo sweep: in the small world)
	@$(REPORT) --expect $(SWEEP) $(MORE)

seeds: $(call finished,$(MAIN)) ## the main runs with two more seeds (make demo seeds: in the small world)
	@for seed in $(SEEDS); do $(MAKE) --no-print-directory $(or $(filter demo,$(MAKECMDGOALS)),baseline reinforce dpo) \
	    RUNS=$(RUNS)/seed-$$seed FLAGS="$(FLAGS) --seed $$seed" SAMPLES= || exit; done
	@$(REPORT)

samples: $(call finished,$(SAMPLES)) ## of the untouched policy, 32 a prompt: for best-of-n and the limit

report: | $(VENV) ## results.md and the figures, of all runs in RUNS, finished or not
	@$(REPORT) --expect $(SWEEP)

readme: | $(VENV)  # puts RUNS' tables and figures into README.md, where it has places for them
	@$(REPORT) --readme README.md

# Named for the mistake (of lab/mistakes.py, with dashes for its spaces). Their policies are evaluated again without it.
BROKEN_REINFORCE = sign KL-negated no-shift reward-broadcast-over-tokens greedy
BROKEN_DPO = chosen-and-rejected-swapped no-shift mask-one-column-late reference-forgotten prompt-scored
BROKEN = lr-5e-3 $(BROKEN_REINFORCE) $(BROKEN_DPO:%=dpo-%)
broken: $(call finished,alpha-0 alpha-0.1 beta-0.1 $(BROKEN:%=broken-measured/%)) ## runs with mistakes in them, drawn
	$(PYTHON) -m lab.broken $(RUNS)

$(call finished,$(BROKEN_REINFORCE:%=broken/%)): $(RUNS)/broken/%/eval.json: | $(NEEDED)
	$(PYTHON) -m lab.mistakes "$*" reinforce.py $(MODELS) $(SUITED_REINFORCE) --alpha 0.1 $(FLAGS) --out $(@D)

$(call finished,$(BROKEN_DPO:%=broken/dpo-%)): $(RUNS)/broken/dpo-%/eval.json: | $(NEEDED)
	$(PYTHON) -m lab.mistakes "$*" dpo.py $(MODELS) $(call flag,--pairs,$(PAIRS)) $(SUITED_DPO) --beta 0.1 \
	    $(FLAGS) --out $(@D)

$(call finished,broken/lr-5e-3): | $(NEEDED)
	$(RUN) reinforce.py $(MODELS) $(SUITED_REINFORCE) --lr 5e-3 --alpha 0.1 $(FLAGS) --out $(@D)

$(call finished,$(BROKEN:%=broken-measured/%)): $(RUNS)/broken-measured/%/eval.json: | $(RUNS)/broken/%/eval.json
	$(RUN) reward.py $(MODELS) $(FLAGS) --policy $(RUNS)/broken/$*/model --out $(@D)

$(RUNS)/baseline/eval.json: | $(NEEDED)
	$(RUN) reward.py $(MODELS) $(FLAGS) --out $(@D)

# A folder's name is its settings: alpha-0.02, loo-0.02 (leave-one-out), beta-0.25, beta-0.1-lr-5e-5.
settings = $(subst -lr-, --lr ,$*)

$(RUNS)/alpha-%/eval.json: | $(NEEDED)
	$(RUN) reinforce.py $(MODELS) $(SUITED_REINFORCE) --alpha $(settings) $(FLAGS) $(REINFORCE_FLAGS) --out $(@D)

$(RUNS)/loo-%/eval.json: | $(NEEDED)
	$(RUN) reinforce.py $(MODELS) $(SUITED_REINFORCE) --advantage loo --alpha $(settings) \
	    $(FLAGS) $(REINFORCE_FLAGS) --out $(@D)

$(RUNS)/beta-%/eval.json: | $(NEEDED)
	$(RUN) dpo.py $(MODELS) $(call flag,--pairs,$(PAIRS)) $(SUITED_DPO) --beta $(settings) \
	    $(FLAGS) $(DPO_FLAGS) --out $(@D)

# 500 prompts, whatever FLAGS say of the other runs: times 32 that is as much as 16,000.
$(RUNS)/samples-%/eval.json: | $(NEEDED)
	$(RUN) reward.py $(MODELS) $(FLAGS) --samples-per-prompt $* --eval-limit 500 --out $(@D)

$(WORLD)/world.json: | $(VENV)
	$(PYTHON) -m demo.world --out $(@D)

venv: .venv/ready ## only make the environment

# The first Python of 3.11 or newer; transformers and numpy need that.
NEW = import sys; sys.exit(sys.version_info < (3, 11))
.venv/ready: requirements.txt
	@python=; for name in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	    if $$name -c '$(NEW)' 2>/dev/null; then python=$$name; break; fi; done; \
	if [ -z "$$python" ]; then echo "error: Python 3.11 or newer is needed; python3 here is" \
	    "$$(python3 --version 2>&1). With another one: make PYTHON=/path/to/python" >&2; exit 1; fi; \
	echo "making .venv with $$python (PyTorch is large: this can take minutes)" && $$python -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/ready-dev: requirements-dev.txt requirements.txt | .venv/ready
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

.venv/ready-bench: requirements-bench.txt requirements.txt | .venv/ready
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	@touch $@

check: | $(VENV) ## what is right and wrong in a solution of the course: make check SOLUTION=A3.py
	@$(PYTHON) -m course.check "$(SOLUTION)" $(FLAGS)

test: | $(DEV) ## everything that CI runs but lint; no network, no GPU
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 --dist worksteal

lint: | $(DEV) ## style and unused names
	$(PYTHON) -m ruff check .

mutants: | $(DEV) ## does a test fail for every small change of the mathematics? (four minutes)
	OMP_NUM_THREADS=1 $(PYTHON) -m lab.mutants $(FLAGS)

bench: | $(VENV) $(VENV:ready=ready-bench) ## speed and memory against the course's way and TRL (ten minutes on two cores)
	$(PYTHON) -m lab.bench $(FLAGS)

clean: ## remove the environment, the world of the demo and caches; runs stay
	rm -rf .venv build mutants __pycache__ .hypothesis .pytest_cache .ruff_cache
