"""The report: what the assignment wants plotted, tabulated and quoted, from the runs in a folder.

    python -m report.report runs/course     # results.md and the figures, beside the runs

What is missing is said, and which command makes it. "The student's" numbers are those of a report on the same
assignment, for comparison; they are theirs. Loads no torch.
"""

import functools
import re
from pathlib import Path

import numpy as np

import plot
from report.tables import (beside, brief, digits, generations, inline, made_with, make_command, plus_minus, short,
                           side_by_side, spread, table, what_lacks, with_error)
from report import measures
from report.run_folders import comparable, load_runs, means, require_runs, sample_rewards, samples_by_prompt
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
        self.samples = sample_rewards(found)

    def lacking(self, what, target):
        """A line on what is not there, and the command that makes it. make demo makes all of its runs at once."""
        return ["", f"*Not here: {what}. `{self.make(target)}` makes it.*", ""]

    @functools.cache  # noqa: B019
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
            rows.append(self.measured(run, alpha=short(alpha)) | {"reward - alpha KL": paid})
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
            ("low alpha", "poor text", "alpha 1e8 (1e-8 is probably meant)", poor),
            ("in between", "reward at least 0.80, mostly natural text", "alpha 0.0003", good),
        )
        yield from table([{"regime": regime, "the assignment's target": target, "a student's report (theirs)": student,
                           "here": ", ".join(f"`{run.name}`" for run in some) or "none of these runs (alpha above 0)"}
                          for regime, target, student, some in regimes], "regimes")
        if not (held and poor and good):
            yield from self.lacking("a run of each regime; more alphas", "sweep")
        yield "(The student's alphas probably belong to a KL of another unit.)\n"
        for regime, _, _, some in regimes:
            if some:
                yield f"**{regime}**\n"
                if some[0].metrics:
                    yield f"![reward and KL of {some[0].name}]({some[0].name}/curves.png)"
                yield from generations(some[0])

    def q_4(self):
        yield "## Q4.1: DPO, loss over time and on the test set"
        if any("beta" in run.flags and run.metrics for run in self.found):
            yield "\n![DPO loss against the step](dpo.png)\n"
        own = [(run, digits(run.result.get("test_loss"), 4)) for run in self.dpo]
        yield from beside("test loss", own, "", "0.5968") if own else self.lacking(*DPO)
        yield "## Q4.2: reward after DPO, beside REINFORCE"
        yield from self.against_baseline() if own else self.lacking(*DPO)
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
            yield "\n![DPO loss against the step](dpo.png)\n"
            yield "![accuracy, margin and log-probs against the step](dpo-margins.png)\n"
        rows = []
        for run in self.dpo:
            beta, result = run.flags["beta"], run.result
            student = STUDENT_LOSSES.get(beta, "") if run.flags["lr"] == 5e-7 else ""
            rows.append({"run": f"`{run.name}`", "beta": short(beta), "lr": short(run.flags["lr"]),
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
        if not self.samples:
            lacks = "samples of the original policy, for best-of-n and the limit"
            return (yield from self.lacking(lacks, "samples"))
        rewards = np.array([*self.samples.values()])
        prompts, k = rewards.shape
        limit, curve = measures.limit(rewards), measures.limit_curve(rewards, 1)
        yield f"\nBest of n samples of the original policy ({prompts} prompts, {k} samples each):\n"
        rows = []
        for n in measures.counts(k):
            best, kl = measures.best_of(rewards, n), measures.best_of_kl(n)
            most = measures.most_reward(*limit, kl)
            rows.append({"n": str(n), "reward": mean_of(best), "KL at most, nats": digits(kl, 2),
                         "the limit has more by": "" if most is None else mean_of(most - best)})
        yield from table(rows, "best-of-n")
        known = "The limit, pi\\* = ref exp(r / alpha) / Z,"
        enough = f"for {measures.PROMPTS:.0%} of the prompts at least {measures.ENOUGH} of {k} samples are effective"
        if not curve:
            return (yield f"{known} is not drawn: for no alpha is it so that {enough}.\n")
        kl, *reward = curve[-1]
        yield (f"{known} is estimated from the same samples, corrected for their number, down to alpha "
               f"{limit[0][-1]:.2g}, where it has {plus_minus(*reward, 3)} at {kl:.2f} nats: so far {enough}. Each run "
               "beside it, on the prompts that both have: what the limit's reward for the run's KL has over the run's, "
               "and how many times the KL is that the limit needs for the run's reward, with standard errors, prompt "
               "by prompt; - where the limit is not drawn, or the error is half the number.\n")
        yield from table([self.beside_the_limit(run) for run in self.compared if run.method != "untouched"], "limit")

    def beside_the_limit(self, run):
        groups = samples_by_prompt(run)
        both = [prompt for prompt in self.samples if prompt in groups]
        row = {"run": f"`{run.name}`", "prompts": str(len(both))}
        if len(both) < 2:
            return row
        limit = measures.limit(np.array([self.samples[prompt] for prompt in both]))
        reward, kl = means(groups, both), means(groups, both, "kl")
        row |= {"reward": mean_of(reward), "KL, nats": mean_of(kl, 2)}
        most, least = measures.most_reward(*limit, kl), measures.least_kl(*limit, reward)
        row["the limit's reward for this KL"] = "-" if most is None else digits(most.mean(), 3)
        row["more by"] = "-" if most is None else mean_of(most - reward)
        row["the limit's KL for this reward"] = "-" if least is None else digits(max(least.mean(), 0), 2)
        row["KL / the limit's KL"] = "-"
        if least is not None and least.mean() > 0:
            times = kl.mean() / least.mean()
            error = mean_and_error(kl - times * least)[1] / least.mean()
            row["KL / the limit's KL"] = plus_minus(times, error, 1) if 2 * error < times else "-"
        return row

    def against_baseline(self):
        """Every run's reward, and by how much it is above the untouched policy's."""
        rows = []
        for run in self.compared:
            rows.append(brief(run, method=run.method))
            if self.baseline and run is not self.baseline:
                above = plus_minus(*difference(run, self.baseline), 3, "+")
                rows[-1] |= {f"above `{self.baseline.name}`, prompt by prompt": above}
        return table(rows, "above-the-baseline")

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
    above = [(run, *difference(best, run)) for run in others]
    told = ", ".join(f"{plus_minus(mean, error, 3, '+')} over `{run.name}`" for run, mean, error in above)
    ties = ", ".join(f"`{run.name}`" for run, mean, error in above if not mean > 2 * error)
    ties = f"; not told apart from {ties}: within two standard errors" if ties else ""
    lowest = min(some, key=lambda run: run.result["test_loss"])
    return [f"At lr {short(lr)} the highest reward is that of `{best.name}` (prompt by prompt {told}{ties}); the "
            f"lowest test loss, that of `{lowest.name}`, does not choose between betas.\n"]


def mean_of(values, places=3):
    return plus_minus(*mean_and_error(values), places)


def difference(run, other):
    """-> the run's reward less the other's and its standard error: prompt by prompt, where both have the prompts."""
    own, others = samples_by_prompt(run), samples_by_prompt(other)
    both = [prompt for prompt in own if prompt in others]
    if len(both) > 1:
        return mean_and_error(means(own, both) - means(others, both))
    error = sum((one.result["reward_se"] or 0) ** 2 for one in (run, other)) ** 0.5  # as if independent
    return run.result["reward"] - other.result["reward"], error


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
    if lacking := re.findall(r"^## (Q[\d.]+):(?:(?!^## ).)*?^\*Not here", text, re.DOTALL | re.MULTILINE):
        title, rest = text.split("\n", 1)
        said = f"Not answered yet: {', '.join(lacking)}. `{report.make('sweep')}` makes what they lack."
        text = f"{title}\n\n{said} (Questions that want words: ANSWERS.md.)\n{rest}"
    write_whole(args.folder / "results.md", text)
    shown = [line for line in overview if not line.startswith("<!--")]
    print("\n".join([*shown, *side_by_side(report.compared, prompts=1)]))
    print(f"{args.folder / 'results.md'} has all of it, with the figures beside it")


if __name__ == "__main__":
    launch(main)
