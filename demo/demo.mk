# The toy world's settings, and runs that only it has (make demo, make demo-sweep, make broken ...): the same scripts in
# the toy world of demo/world.py, with lengths and learning rates that suit it, and with leave-one-out: on the raw
# reward it is chance which word alpha 0 ends in.

RUNS = runs/toy
ALPHA = 0.1
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
NEEDED = $(VENV) $(WORLD)/world.json
# Spin shorter while a thread waits (Linux): a fifth slower alone, five times faster beside another busy program.
export GOMP_SPINCOUNT = 10000

.PRECIOUS: $(WORLD)/world.json

everything: $(call finished,$(MAIN) $(SAMPLES) $(MORE))
	$(REPORT) --expect $(MAIN) $(SAMPLES) $(MORE)

$(WORLD)/world.json: | $(VENV)
	$(PYTHON) -m demo.world --out $(@D)

# Named for the mistake (of lab/mistakes.py, with dashes for its spaces). Their policies are evaluated without it.
BROKEN_REINFORCE = sign KL-negated no-shift reward-broadcast-over-tokens greedy
BROKEN_DPO = chosen-and-rejected-swapped no-shift mask-one-column-late reference-forgotten prompt-scored
BROKEN = lr-5e-3 $(BROKEN_REINFORCE) $(BROKEN_DPO:%=dpo-%)
broken-runs: $(call finished,alpha-0 alpha-0.1 beta-0.1 $(BROKEN:%=broken-measured/%))
	$(PYTHON) -m lab.broken $(RUNS)

$(call finished,$(BROKEN_REINFORCE:%=broken/%)): $(RUNS)/broken/%/eval.json: | $(NEEDED)
	$(call run,-m lab.mistakes "$*" reinforce.py $(MODELS) $(SUITED_REINFORCE) --alpha 0.1 $(FLAGS))

$(call finished,$(BROKEN_DPO:%=broken/dpo-%)): $(RUNS)/broken/dpo-%/eval.json: | $(NEEDED)
	$(call run,-m lab.mistakes "$*" dpo.py $(MODELS) $(call flag,--pairs,$(PAIRS)) $(SUITED_DPO) --beta 0.1 $(FLAGS))

$(call finished,broken/lr-5e-3): | $(NEEDED)
	$(call run,reinforce.py $(MODELS) $(SUITED_REINFORCE) --lr 5e-3 --alpha 0.1 $(FLAGS))

$(call finished,$(BROKEN:%=broken-measured/%)): $(RUNS)/broken-measured/%/eval.json: | $(RUNS)/broken/%/eval.json
	$(call run,reward.py $(MODELS) $(FLAGS) --policy $(RUNS)/broken/$*/model)
