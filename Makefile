# The course in one command:  make baseline reinforce dpo
# Targets are result files: what is there is not run again, and what was cut off is run anew.
# Other settings go into another folder:  make reinforce RUNS=runs/short FLAGS="--limit 640 --eval-limit 640"

RUNS = runs/course
ALPHA = 0.02
BETA = 0.1

# Hub names or local folders; empty: the course's own (runs.py, COURSE).
POLICY =
REWARD_MODEL =
PROMPTS =
PAIRS =

# Added to every script's flags, to reinforce.py's, to dpo.py's.
FLAGS =
REINFORCE_FLAGS =
DPO_FLAGS =

# PYTHON=python3 uses that interpreter as it is; by default make builds its own environment in .venv.
ifeq ($(origin PYTHON),undefined)
PYTHON := .venv/bin/python
VENV := .venv/ready
DEV := .venv/ready-dev
endif

ifneq ($(words $(RUNS)),1)
$(error RUNS must be one path without white space, not "$(RUNS)"; the scripts' own --out takes any path)
endif

MODELS = $(if $(POLICY),--policy $(POLICY)) $(if $(REWARD_MODEL),--reward-model $(REWARD_MODEL)) \
         $(if $(PROMPTS),--prompts $(PROMPTS))
COMMON = $(MODELS) $(FLAGS)

.PHONY: help baseline reinforce dpo plot venv test lint clean
.DELETE_ON_ERROR:
.SECONDARY:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

baseline: $(RUNS)/baseline/eval.json ## section 1: evaluate the untouched policy

reinforce: $(RUNS)/alpha-0/eval.json $(RUNS)/alpha-$(ALPHA)/eval.json ## sections 2 and 3: REINFORCE without and with KL (ALPHA=0.02)
	$(PYTHON) plot.py $(RUNS)

dpo: $(RUNS)/beta-$(BETA)/eval.json ## section 4: DPO (BETA=0.1)
	$(PYTHON) plot.py $(RUNS)

plot: | $(VENV) ## draw the figures of all runs in RUNS
	$(PYTHON) plot.py $(RUNS)

$(RUNS)/baseline/eval.json: | $(VENV)
	$(PYTHON) reward.py $(COMMON) --out $(@D)

# The folder's name says the settings: alpha-0.02, loo-0.02, beta-0.25, and beta-0.1-lr-5e-5 for another --lr.
named = $(subst -lr-, --lr ,$*)

$(RUNS)/alpha-%/eval.json: | $(VENV)
	$(PYTHON) reinforce.py $(COMMON) --alpha $(named) $(REINFORCE_FLAGS) --out $(@D)

$(RUNS)/loo-%/eval.json: | $(VENV)
	$(PYTHON) reinforce.py $(COMMON) --advantage loo --alpha $(named) $(REINFORCE_FLAGS) --out $(@D)

$(RUNS)/beta-%/eval.json: | $(VENV)
	$(PYTHON) dpo.py $(COMMON) $(if $(PAIRS),--pairs $(PAIRS)) --beta $(named) $(DPO_FLAGS) --out $(@D)
