"""Run folders read back, finished or not: what plot.py draws and the report tells. Loads no torch.

runs.py writes them: config.json first, metrics.jsonl as training goes on, completions.jsonl, and eval.json last.
"""

import contextlib
import functools
import json
import sys

import numpy as np

from support.command import COURSE
from support.errors import UserError
from support.files import read_rows

RESULTS = ("reward", "reward_se", "kl", "kl_se", "n", "samples")  # what an eval.json must have; DPO's more
TESTED = ("test_loss", "test_accuracy", "test_margin")
COMPLETION = {"number", "prompt", "completion", "reward", "kl", "reference_logp", "length"}
BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError)  # what reading a folder that is no run's raises
ORDER = ("untouched", "REINFORCE", "REINFORCE, leave-one-out", "DPO", "evaluated", "samples of the original",
         "on train prompts")


class RunRecord:
    """A run's folder as it was read: name, flags, metrics, and once finished result (eval.json) and completions."""

    def __init__(self, folder):
        self.folder, self.name = folder, folder.name
        self.about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.flags = self.about["flags"]
        self.k = self.flags.get("samples_per_prompt", 1)  # a run from before there was this flag has 1
        self.metrics = read_rows(folder / "metrics.jsonl")
        self.result = None
        with contextlib.suppress(FileNotFoundError):
            self.result = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
            wanted = (*RESULTS, *TESTED) if "beta" in self.flags else RESULTS
            [self.result[key] for key in wanted]  # a KeyError here, not in the middle of a table

    @functools.cached_property
    def completions(self):
        return [row for row in read_rows(self.folder / "completions.jsonl") if set(row) >= COMPLETION]

    @property
    def method(self):
        """What was done, in words: one of ORDER."""
        if "beta" in self.flags:
            return "DPO"
        if "alpha" in self.flags:
            return "REINFORCE, leave-one-out" if self.flags["advantage"] == "loo" else "REINFORCE"
        if self.flags.get("split") == "train":
            return "on train prompts"
        if self.flags["policy"] != (self.flags["reference"] or COURSE["policy"]):
            return "evaluated"
        return "untouched" if self.k == 1 else "samples of the original"

    @property
    def position(self):
        """Sorts runs as in a table: by method, DPO then by learning rate, then by alpha or beta."""
        lr = self.flags["lr"] if self.method == "DPO" else 0
        return ORDER.index(self.method), lr, self.flags.get("alpha", self.flags.get("beta", 0)), self.name


def load_runs(folder):
    """-> list of RunRecord, in the course's order; a folder that is no run's is left out, aloud if it has a
    config.json."""
    found = []
    for path in folder.glob("*/config.json"):
        try:
            run = RunRecord(path.parent)
            found.append((run.position, run))
        except BROKEN as problem:
            reason = f"{type(problem).__name__}: {problem}"
            print(f"{path.parent} is left out: not a run's files, or broken ({reason}). A broken run is made again "
                  "after its folder has been removed", file=sys.stderr)
    return [run for _, run in sorted(found, key=lambda item: item[0])]


def require_runs(folder):
    """load_runs of the folder that a command line names; UserError if there is none in it."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the one that holds the runs, as in make report "
                        "RUNS=runs/toy for the toy world's")
    found = load_runs(folder)
    if not found:
        raise UserError(f"{folder} has no run: no folder in it holds a run's config.json")
    return found


def comparable(found):
    """The finished runs that evaluated a policy on one completion a test prompt."""
    return [run for run in found if run.result and run.method not in ("samples of the original", "on train prompts")]


@functools.cache
def samples_by_prompt(run):
    """-> {(number, prompt): the rows of its k completions}; of a run cut short only the prompts that are whole."""
    prompts = {}
    for row in run.completions:
        prompts.setdefault((row["number"], row["prompt"]), []).append(row)
    return {prompt: rows for prompt, rows in prompts.items() if len(rows) == run.k}


def means(groups, prompts, name="reward"):
    """-> (prompts,): the mean of what has that name, over the completions of each of the prompts."""
    return np.array([np.mean([row[name] for row in groups[prompt]]) for prompt in prompts])


def sample_rewards(found):
    """-> {(number, prompt): rewards of k samples of the original policy}, {} if there are none.

    Of several such runs the one with the most samples a prompt.
    """
    for run in sorted(found, key=lambda run: -run.k):
        if run.result and run.method == "samples of the original":
            whole = {prompt: [row["reward"] for row in rows] for prompt, rows in samples_by_prompt(run).items()}
            if whole:
                return whole
    return {}
