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
RANKS =  # processes for each run, on as many GPUs, or CPUs (torchrun); empty: one
POLICY =  # hub names or local folders; empty: the names that the course uses
REWARD_MODEL =
PROMPTS =
PAIRS =
FLAGS =  # added to the flags of every script, of reinforce.py, of dpo.py
REINFORCE_FLAGS =
DPO_FLAGS =

# Without PYTHON=..., make builds an environment of its own in .venv; with it, that interpreter is used as it is.
VENV := $(if $(filter undefined,$(origin PYTHON)),.venv/ready)
DEV := $(VENV:ready=ready-dev)
PYTHON ?= .venv/bin/python
.DEFAULT_GOAL := help
finished = $(patsubst %,$(RUNS)/%/eval.json,$1)
flag = $(if $2,$1 "$2")
MAIN = baseline alpha-0 alpha-$(ALPHA) beta-$(BETA)
NEEDED = $(VENV)
include $(SETTINGS)  # of the toy world: demo/demo.mk
$(if $(filter 1,$(words $(RUNS))),,$(error RUNS is "$(RUNS)": make needs one path without white space; --out takes any))
SWEEP = $(MAIN) $(ALPHAS:%=alpha-%) $(LOOS:%=loo-%) $(BETAS:%=beta-%) $(SAMPLES)
REPORT = @$(PYTHON) -m report.report $(RUNS)
TOY = --no-print-directory SETTINGS=demo/demo.mk
MODELS = $(call flag,--policy,$(POLICY)) $(call flag,--reference,$(POLICY)) \
         $(call flag,--reward-model,$(REWARD_MODEL)) $(call flag,--prompts,$(PROMPTS)) $(SUITED)
define run  # $1: script and flags; shows the folder, with V=1 the command
@echo "$(@D)"
$(if $(V),,@)$(strip $(PYTHON) $(if $(RANKS),-m torch.distributed.run --standalone --nproc-per-node=$(RANKS)) $1 \
    --out $(@D))
endef

.PHONY: help demo baseline reinforce dpo sweep seeds samples pairs report broken check diff notebook test lint mutants \
        bench readme venv clean
.PRECIOUS: $(RUNS)/%/eval.json  # written whole: an interrupted make must not delete them

help: ## list the targets (this)
	@sed -n -E 's/^##@ (.*)/\n\1/p; s/^([a-z]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 18

##@ Run (V=1 shows the commands)
demo: ## the whole lesson in the toy world, which is made here: offline, minutes, two cores
	@test "$(MAKECMDGOALS)" = demo || { echo "error: demo goes alone; there are demo-sweep, demo-seeds, demo-samples," \
	    "demo-report" >&2; exit 1; }
	@$(MAKE) $(TOY) everything
demo-%:  # any target, in the toy world
	@$(MAKE) $(TOY) $*
baseline: $(call finished,baseline) ## section 1: evaluate the untouched policy
reinforce: $(call finished,alpha-0 alpha-$(ALPHA)) ## sections 2, 3: REINFORCE without and with the KL
	$(REPORT)
dpo: $(call finished,beta-$(BETA)) ## section 4: DPO
	$(REPORT)
sweep: $(call finished,$(SWEEP) $(MORE)) ## all ALPHAS and BETAS, and what is possible (make demo-sweep: toy world)
	$(REPORT) --expect $(SWEEP) $(MORE)
seeds: $(call finished,$(MAIN)) ## the main runs with two more seeds (make demo-seeds: toy world)
	@for seed in $(SEEDS); do $(MAKE) --no-print-directory baseline reinforce dpo RUNS=$(RUNS)/seed-$$seed \
	    FLAGS="$(FLAGS) --seed $$seed" || exit; done
	$(REPORT)
samples: $(call finished,$(SAMPLES)) ## of the untouched policy, 32 a prompt: for best-of-n and the limit
pairs: $(RUNS)/pairs/train.jsonl ## for DPO, of the policy's own samples: best and worst of 8 (docs/course.md)
report: | $(VENV) ## results.md and the figures, of all runs in RUNS, finished or not
	$(REPORT) --expect $(SWEEP)
broken: ## runs with mistakes in them, in the toy world, drawn
	@$(MAKE) $(TOY) broken-runs

$(RUNS)/baseline/eval.json: | $(NEEDED)
	$(call run,reward.py $(MODELS) $(FLAGS))
# A folder's name is its settings: alpha-0.02, loo-0.02 (leave-one-out), beta-0.25, beta-0.1-lr-5e-5.
settings = $(subst -lr-, --lr ,$*)
$(RUNS)/alpha-%/eval.json: | $(NEEDED)
	$(call run,reinforce.py $(MODELS) $(SUITED_REINFORCE) --alpha $(settings) $(FLAGS) $(REINFORCE_FLAGS))
$(RUNS)/loo-%/eval.json: | $(NEEDED)
	$(call run,reinforce.py $(MODELS) $(SUITED_REINFORCE) --alpha $(settings) --advantage loo $(FLAGS) $(REINFORCE_FLAGS))
$(RUNS)/beta-%/eval.json: | $(NEEDED)
	$(call run,dpo.py $(MODELS) $(call flag,--pairs,$(PAIRS)) $(SUITED_DPO) --beta $(settings) $(FLAGS) $(DPO_FLAGS))
# 500 prompts, whatever FLAGS say of the other runs: times 32 that is as much as 16,000.
$(RUNS)/samples-%/eval.json: | $(NEEDED)
	$(call run,reward.py $(MODELS) $(FLAGS) --samples-per-prompt $* --eval-limit 500)
$(RUNS)/train-samples-%/eval.json: | $(NEEDED)
	$(call run,reward.py $(MODELS) --limit 4000 $(FLAGS) --samples-per-prompt $* --split train)
$(RUNS)/pairs/train.jsonl: | $(call finished,train-samples-8 samples-8)
	@$(PYTHON) -m report.pairs --train $(RUNS)/train-samples-8 --test $(RUNS)/samples-8 --out $(@D)

##@ Read your own solution
# Names of files are data: neither make nor the shell reads them, they go through the environment as they are.
$(foreach name,SOLUTION HTML REFERENCE,$(eval override export $(name) := $$(value $(name))))
given = $(if $(SOLUTION),,$(error which one? make $@ SOLUTION=path/to/A3.ipynb, or a folder))
check: | $(VENV) ## what is right and wrong in a solution of the course, or a folder of them: SOLUTION=A3.ipynb
	@$(given)$(PYTHON) -m course.check $(FLAGS) -- "$$SOLUTION"
diff: | $(VENV) ## it, beside course/A3.py or REFERENCE=theirs.py; HTML=page.html writes a page
	@$(given)$(PYTHON) -m course.compare $${HTML:+--html="$$HTML"} $${REFERENCE:+--reference="$$REFERENCE"} -- "$$SOLUTION"
notebook: | $(DEV) ## course/A3.ipynb, made from course/A3.py
	$(PYTHON) -m jupytext --to ipynb --update --output course/A3.ipynb course/A3.py

##@ Prove
test: | $(DEV) ## everything that CI runs but lint; no network, no GPU; the mathematics without AVX instructions, too
	ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q test_losses.py tests/test_precision.py
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 --dist worksteal
lint: | $(DEV) ## style and unused names
	$(PYTHON) -m ruff check .
mutants: | $(DEV) ## does a test fail for every small change of the mathematics? (four minutes)
	OMP_NUM_THREADS=1 $(PYTHON) -m lab.mutants $(FLAGS)
bench: | $(VENV) $(VENV:ready=ready-bench) ## speed and memory against the course's way and TRL (ten minutes)
	$(PYTHON) -m lab.bench $(FLAGS)
readme: | $(VENV)  # puts RUNS' tables and figures where README.md and docs/ have places for them
	@$(PYTHON) -m report.report $(RUNS) > /dev/null && $(PYTHON) -m lab.fill_in $(RUNS)
venv: .venv/ready ## only make the environment
clean: ## remove the environment, the toy world and caches; runs stay
	rm -rf .venv build mutants __pycache__ */__pycache__ .hypothesis .pytest_cache .ruff_cache

NEW = import sys; sys.exit(sys.version_info < (3, 11))  # transformers and numpy need it
.venv/ready: requirements.txt
	@for name in python3 python3.14 python3.13 python3.12 python3.11 python none; do \
	    if $$name -c '$(NEW)' 2>/dev/null; then break; fi; done; if [ $$name = none ]; then echo "error: Python 3.11 or" \
	    "newer is needed; python3 here is $$(python3 --version 2>&1). Another: make PYTHON=/path/to/python" >&2; exit 1; fi; \
	echo "making .venv with $$name (PyTorch is large: this can take minutes)" && $$name -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r $< && touch $@
.venv/ready-%: requirements-%.txt requirements.txt | .venv/ready
	.venv/bin/pip install --quiet --disable-pip-version-check -r $< && touch $@
