"""The report: what the assignment wants plotted, tabulated and quoted, from the runs in a folder.

    python -m report.report runs/course     # results.md and the figures, beside the runs

What is missing is said, and which command makes it. "The student's" numbers are those of a report on the same
assignment, for comparison; they are theirs. Loads no torch.
"""

import re
from pathlib import Path

import numpy as np

import plot
from report.tables import (beside, brief, digits, generations, inline, made_with, make_command, side_by_side, spread,
                           table, what_lacks, with_error)
from report import measures
from report.run_folders import comparable, load_runs, require_runs, sample_rewards
from support.command import bare_flags, launch
from support.files import write_whole
from support.statistics import DISTINCT_TEXTS, distinct, mean_and_error

MOSTLY = 0.8  # share of natural completions from which on a run's text is called mostly natural
STUDENT_LOSSES = {0.1: "0.6521", 0.25: "0.6207", 0.4: "0.6044"}  # test loss by beta, lr 5e-7
BASELINE = ("the untouched policy", "baseline")  # what can be missing, and the target of make for it
REINFORCE = ("a finished run with alpha 0", "reinforce")
DPO = ("a finished DPO run", "dpo")
SETTINGS = ("advantage", "lr", "batch_size", "epochs", "limit", "eval_limit", "prompt_len", "completion_len", "max_len",
            "seed")
SPREADS = (("reward", "test reward", 3), ("kl", "KL, nats", 2), ("distinct_2", "distinct-2", 3),
           ("test_loss", "test loss", 3), ("test_accuracy", "accuracy", 3))  # key of eval.json, name, decimal places
MEASURES = f"""
reward: mean P(positive) of n test prompts, ± its standard error over the prompts. KL: to the original policy, nats
per completion. distinct-1, distinct-2: different words and word pairs over all, and repeated: share of the completions
that are there more than once; all three in the first {DISTINCT_TEXTS} completions. log-prob a token: the
original policy's, of this policy's text. natural: share of the completions whose log-prob a token lies where the
middle 95 % of the original's own lie, and which repeat their words no more than these (the original: about 0.93); from
{MOSTLY} up the text is called mostly natural.
"""
BETAS = """
The test loss is not comparable across beta: beta multiplies the margin inside it, so a larger beta can have a lower
loss for a smaller change. What compares is accuracy (how many pairs are ranked right), margin / beta (by how many
nats), KL (what it cost) and reward (what it is for).
"""


class Report:
    """All runs of a folder, by what was done. A method gives the lines of one section."""

    def __init__(self, found, folder):
        self.found, self.finished = found, [run for run in found if run.result]
        self.make = make_command(found, folder)
        self.compared = comparable(found)
        self.baseline = next((run for run in self.compared if run.method == "untouched"), None)
        self.originals = self.baseline.completions if self.baseline else []
        self.reinforce = [run for run in self.compared if "alpha" in run.flags]
        self.alpha_0 = next((run for run in self.reinforce if run.flags["alpha"] == 0), None)
        self.dpo = [run for run in self.compared if "beta" in run.flags]
        self.rewards = sample_rewards(found)

    def lacking(self, what, target):
        """A line on what is not there, and the command that makes it. make demo makes all of its runs at once."""
        return ["", f"*Not here: {what}. `{self.make(target)}` makes it.*", ""]

    def naturalness(self, run):
        return measures.natural(run.completions, self.originals) if run.completions and self.originals else None

    def measured(self, run, **more):
        """A run's row in a table: results, and measures of its text."""
        row = brief(run, **more) | {"n": f"{run.result['n']:,}"}
        if run.completions:
            texts = [line["completion"] for line in run.completions[:: run.k][:DISTINCT_TEXTS]]
            row |= {f"distinct-{n}": digits(distinct(texts, n), 3) for n in (1, 2)}
            row |= {"repeated": digits(measures.repeated(texts), 3)}
            row |= {"log-prob a token": digits(measures.logp_a_token(run.completions), 2)}
        return row | {"natural": digits(self.naturalness(run), 2)}

    def all_runs(self):
        rows = [self.measured(run, method=run.method) for run in self.compared]
        return ["## All runs", *(table(rows, "runs") if rows else ["", "None is finished."]), MEASURES]

    def q_1(self):
        yield "## Q1.1: average reward of the untouched policy"
        if not self.baseline:
            yield from self.lacking(*BASELINE)
        else:
            own = [(self.baseline, with_error(self.baseline.result, "reward", 4))]
            yield from beside("test reward", own, student="0.6231")
        yield "## Q1.2: five generations of the untouched policy"
        yield from generations(self.baseline) if self.baseline else self.lacking(*BASELINE)

    def q_2(self):
        yield "## Q2.1: REINFORCE, reward over time and on the test set"
        if any("alpha" in run.flags and run.metrics for run in self.found):
            yield "\n![reward and KL against the step](reinforce.png)\n"
        own = [(run, with_error(run.result, "reward", 4)) for run in self.reinforce if run.flags["alpha"] == 0]
        yield from beside("test reward", own, "at least 0.75", "0.7939") if own else self.lacking(*REINFORCE)
        yield "## Q2.2: five generations after REINFORCE"
        yield from generations(self.alpha_0) if self.alpha_0 else self.lacking(*REINFORCE)

    def q_3_1(self):
        yield "## Q3.1: KL over time without the penalty"
        run = next((run for run in self.found if run.flags.get("alpha") == 0 and run.metrics), None)  # finished or not
        steps = [row for row in run.metrics if {"step", "kl", "reward"} <= set(row)] if run else []
        if not steps:
            return (yield from self.lacking("the curve of a run with alpha 0", "reinforce"))
        yield f"\n![reward and KL against the step](reinforce.png)\n\nSingle batches of `{run.name}`:\n"
        shown = [steps[round(share * (len(steps) - 1))] for share in (0, 0.1, 0.25, 0.5, 0.75, 1)]
        yield from table([{"step": str(row["step"]), "KL, nats": f"{row['kl']:.2f}", "reward": f"{row['reward']:.3f}"}
                          for row in {row["step"]: row for row in shown}.values()], "kl-over-time")

    def q_3_2(self):
        yield "## Q3.2: three regimes of alpha\n\nalpha is the reward that a nat of a whole completion's KL costs."
        if len({run.flags["alpha"] for run in self.reinforce}) < 3:
            yield from self.lacking("three alphas", "sweep")
        if not self.reinforce:
            return
        rows = []
        for run in self.reinforce:
            alpha = run.flags["alpha"]
            paid = digits(run.result["reward"] - alpha * run.result["kl"], 3)
            rows.append(self.measured(run, alpha=f"{alpha:g}") | {"reward - alpha KL": paid})
        yield from table(rows, "alphas")
        judged = [(run, self.naturalness(run)) for run in self.reinforce]
        judged = [(run, natural) for run, natural in judged if natural is not None]
        if not judged:
            return (yield from self.lacking("completions of the untouched policy, to tell natural text by", "baseline"))
        held = [run for run, natural in judged
                if run.result["reward"] < 0.65 and run.flags["alpha"] > 0 and natural >= MOSTLY]
        poor = [run for run, natural in judged if natural < MOSTLY and run.flags["alpha"] > 0]
        good = sorted((run for run, natural in judged if run.result["reward"] >= 0.8 and natural >= MOSTLY),
                      key=lambda run: run.result["kl"])
        regimes = (
            ("high alpha", "reward stays below 0.65", "alpha 1000", held),
            ("low alpha", "poor text", "alpha 1e8 (1e-8 must be meant)", poor),
            ("in between", "reward at least 0.80, mostly natural text", "alpha 0.0003", good),
        )
        yield from table([{"regime": regime, "the assignment's target": target, "a student's report (theirs)": student,
                           "here": ", ".join(f"`{run.name}`" for run in some) or "none of the alphas above 0 run"}
                          for regime, target, student, some in regimes], "regimes")
        yield "(The student's alphas belong to a KL of another unit.)\n"
        for regime, _, _, some in regimes:
            if some:
                yield from [f"**{regime}**", *generations(some[0])]

    def q_4(self):
        yield "## Q4.1: DPO, loss over time and on the test set"
        if any("beta" in run.flags and run.metrics for run in self.found):
            yield "\n![DPO loss against the step](dpo.png)\n"
        own = [(run, digits(run.result.get("test_loss"), 4)) for run in self.dpo]
        yield from beside("test loss", own, "", "0.5968") if own else self.lacking(*DPO)
        yield "## Q4.2: reward after DPO, beside REINFORCE"
        yield from table([brief(run, method=run.method) for run in self.compared]) if own else self.lacking(*DPO)
        yield "## Q4.3: five generations after DPO"
        if not self.dpo:
            yield from self.lacking(*DPO)
        for lr in sorted({run.flags["lr"] for run in self.dpo}):  # one each, of the course's beta if it is there
            some = [run for run in self.dpo if run.flags["lr"] == lr]
            yield from generations(min(some, key=lambda run: abs(run.flags["beta"] - 0.1)))

    def q_4_4(self):
        yield "## Q4.4: three betas"
        if len({run.flags["beta"] for run in self.dpo}) < 3:
            yield from self.lacking("three betas", "sweep")
        if any("beta" in run.flags and run.metrics for run in self.found):
            yield "\n![accuracy, margin and log-probs against the step](dpo-margins.png)\n"
        rows = []
        for run in self.dpo:
            beta, result = run.flags["beta"], run.result
            student = STUDENT_LOSSES.get(beta, "") if run.flags["lr"] == 5e-7 else ""
            rows.append({"run": f"`{run.name}`", "beta": f"{beta:g}", "lr": f"{run.flags['lr']:g}",
                         "test loss": digits(result["test_loss"], 4), "a student's (theirs)": student,
                         "accuracy": digits(result["test_accuracy"], 3),
                         "margin / beta, nats": digits(result["test_margin"] / beta, 2),
                         "KL, nats": with_error(result, "kl", 3), "reward": with_error(result, "reward", 3)})
        if rows:
            yield from [*table(rows, "betas"), BETAS]
        for lr in sorted({run.flags["lr"] for run in self.dpo}):
            yield from best_beta(lr, [run for run in self.dpo if run.flags["lr"] == lr])

    def frontier(self):
        yield "## The frontier: what reward costs in KL"
        if any(run.method != "untouched" for run in self.compared):
            yield "\n![test reward against KL](frontier.png)\n"
        if self.rewards is None:
            lacks = "samples of the original policy, for best-of-n and the limit"
            return (yield from self.lacking(lacks, "samples"))
        prompts, k = self.rewards.shape
        yield f"\nBest of n samples of the original policy ({prompts} prompts, {k} samples each):\n"
        rows = []
        for n in measures.counts(k):
            reward = "{:.3f} ± {:.3f}".format(*mean_and_error(measures.best_of(self.rewards, n)))
            rows.append({"n": str(n), "reward": reward, "KL at most, nats": digits(measures.best_of_kl(n), 2)})
        yield from table(rows, "best-of-n")
        points = measures.limit(self.rewards)
        enough = f"at least {measures.ENOUGH} of the {k} samples a prompt are effective (mean over the prompts)"
        if not points:
            return (yield f"The limit, pi\\* = ref exp(r / alpha) / Z, is not drawn: for no alpha {enough}.\n")
        alpha, _, kl = points[-1]
        reward = "{:.3f} ± {:.3f}".format(*mean_and_error(measures.tilted(self.rewards, alpha)[0]))
        yield (f"The limit, pi\\* = ref exp(r / alpha) / Z, is estimated from the same samples for alpha from "
               f"{points[0][0]:g} down to {alpha:.2g}, where it has reward {reward} at {kl:.2f} nats: so far {enough}. "
               "Beyond, what it is made of has not been sampled, and the estimate is worthless. How far each run is "
               "from it: the reward that the limit has at the run's KL, and the KL that it needs for the run's reward; "
               "- where it is not drawn.\n")
        _, rewards, kls = zip(*points, strict=True)
        rows = []
        for run in self.compared:
            at_kl = digits(measures.between(run.result["kl"], kls, rewards), 3) or "-"
            at_reward = digits(measures.between(run.result["reward"], rewards, kls), 2) or "-"
            there = {"the limit's reward for this KL": at_kl, "the limit's KL for this reward": at_reward}
            rows += [brief(run) | there] if run.method != "untouched" else []
        yield from table(rows, "limit")

    def seeds(self, others):
        """The same runs with other seeds, in folders seed-*."""
        rows = []
        for own in self.finished:
            same = {run.flags["seed"]: run for run in (*reversed(others), own) if run.name == own.name and run.result}
            same = [same[seed] for seed in sorted(same)]
            row = {"run": f"`{own.name}`", "seeds": ", ".join(str(one.flags["seed"]) for one in same)}
            for key, name, places in SPREADS:
                values = [one.result[key] for one in same if one.result.get(key) is not None]
                row[name] = spread(values, places) if values else ""
            rows += [row] if len(same) > 1 else []
        return ["## Other seeds: mean (lowest to highest)", *table(rows, "seeds")] if rows else []

    def settings(self):
        """With which settings each run was made."""
        rows = []
        for run in self.found:
            flags = {key: str(run.flags[key]) for key in SETTINGS if run.flags.get(key) is not None}
            steps = str(max((row["step"] for row in run.metrics if "step" in row), default=""))
            rows.append({"run": f"`{run.name}`", "precision": run.about.get("precision", ""), "steps": steps, **flags})
        return ["## How they were made", "", made_with(self.found), *table(rows, "settings")]


def best_beta(lr, some):
    """In words: which beta is best by what counts, of runs with one learning rate."""
    if len(some) < 2:
        return []
    best, *others = sorted(some, key=lambda run: -run.result["reward"])
    ties = ", ".join(f"`{run.name}`" for run in others if not clearly_better(best, run))
    tie = f" (not told apart from {ties}: within two standard errors, prompt by prompt)" if ties else ""
    lowest = min(some, key=lambda run: run.result["test_loss"])
    return [f"At lr {lr:g} the highest reward is that of `{best.name}`{tie}; the lowest test loss, that of "
            f"`{lowest.name}`, does not choose between betas.\n"]


def clearly_better(run, other):
    """True if the run's reward is above the other's by two standard errors of the difference, prompt by prompt."""
    own, others = ({(row["number"], row.get("prompt")): row["reward"] for row in one.completions}
                   for one in (run, other))
    if own.keys() == others.keys() and len(own) > 1 and run.k == other.k == 1:
        mean, error = mean_and_error(np.array([own[prompt] - others[prompt] for prompt in own]))
    else:  # other prompts: as if independent
        mean = run.result["reward"] - other.result["reward"]
        error = sum((one.result["reward_se"] or 0) ** 2 for one in (run, other)) ** 0.5
    return mean > 2 * error


def main(argv=None):
    flags = bare_flags(__doc__)
    flags.add_argument("folder", type=Path, help="the folder that holds the runs")
    flags.add_argument("--expect", nargs="*", default=[], metavar="RUN", help="said to be missing if it is")
    args = flags.parse_args(argv)
    found = require_runs(args.folder)
    plot.save_figures(found, args.folder)
    report = Report(found, args.folder)
    others = [run for folder in sorted(args.folder.glob("seed-*")) for run in load_runs(folder)]
    overview = [*report.all_runs(), *what_lacks(found, args.expect, report.make)]
    lines = [f"# Results of {inline(args.folder.name)}\n", *overview]
    for section in (report.q_1(), report.q_2(), report.q_3_1(), report.q_3_2(), report.q_4(), report.q_4_4(),
                    report.frontier(), report.seeds(others)):
        lines += ["", *section]
    lines += ["## The same prompts, continued by every policy", *side_by_side(report.compared), *report.settings()]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"
    write_whole(args.folder / "results.md", text)
    shown = [line for line in overview if not line.startswith("<!--")]
    print("\n".join([*shown, *side_by_side(report.compared, prompts=1)]))
    print(f"{args.folder / 'results.md'} has all of it, with the figures beside it")


if __name__ == "__main__":
    launch(main)
