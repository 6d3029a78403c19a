"""Does a test fail for every small change of the mathematics? Mutation testing, with mutmut.

mutmut makes mutants of the functions below, each with one small change (another operator, a number plus 1, an
argument left out), and runs the tests that reach it, of test_losses.py and of what else pyproject.toml names. A mutant
is killed when a test fails or does not end. One that no test can tell from the original stands in equivalents.txt, with
the reason. The exit status is 1 if another one survives, or if that file is out of date. Left out on purpose: the
training loops, which other tests watch, and the text of messages with values in them, which mutmut leaves alone.

    python -m lab.mutants                       # all functions: make mutants; or some, as in lab.mutants dpo.dpo_loss
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code
from tqdm import tqdm

FUNCTIONS = [f"{module}.{name}" for module, names in {
    "common": ("log_probs", "token_logps", "token_kl", "completion_mask", "masked_sum", "completion_logits",
               "centred_head", "sample", "draw", "update"),
    "reinforce": ("reinforce_loss", "leave_one_out"),
    "dpo": ("dpo_loss", "make_pair", "collate", "pair_logps", "accuracy", "batch_means"),
    "support.ranks": ("rank_slice", "micro_batches"),
    "support.loading": ("split_completions", "after_prompt", "widths"),
}.items() for name in names]
EQUIVALENTS = Path(__file__).with_name("equivalents.txt")
LINE = "{:33} {:>7} {:>8} {:>11} {:>9}"


def key(function):
    """The beginning of mutmut's names for a function's mutants: common.x_draw__mutmut_."""
    return "{}.x_{}__mutmut_".format(*function.rsplit(".", 1))


def source(function):
    return function.rpartition(".")[0].replace(".", "/") + ".py"


def results(function):
    """-> dict of mutmut's name of a mutant: "killed", "survived", "not checked" and the like."""
    data = SourceFileMutationData(path=source(function))
    data.load()
    found = {name: code for name, code in data.exit_code_by_key.items() if name.startswith(key(function))}
    return {name: status_by_exit_code[code] for name, code in found.items()}


def changed_text(name, function):
    """A mutant by what it changes, which stays the same when other lines do: function, old and new text."""
    diff = get_diff_for_mutant(name, path=source(function)).splitlines()[2:]
    old, new = (" ".join(line[1:].strip() for line in diff if line.startswith(sign)) for sign in "-+")
    return function, old, new


def read_equivalents(path):
    """-> Counter of changes. The file: blocks of lines, function, - old text, + new text (once or more), the reason."""
    found = Counter()
    for block in path.read_text().strip().split("\n\n")[1:]:
        function, old, *news, _ = block.splitlines()
        if function not in FUNCTIONS or old[:2] != "- " or not news or any(new[:2] != "+ " for new in news):
            sys.exit(f"{path}: cannot read the block\n{block}")
        found.update((function, old[2:], new[2:]) for new in news)
    return found


def run_mutmut(functions, children):
    """Runs mutmut from nothing: what it keeps from an earlier run does not see that a test has changed."""
    shutil.rmtree("mutants", ignore_errors=True)
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(children)]
    command += [key(function) + "*" for function in functions]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output, bar = [], None
    for line in process.stdout:  # also at a carriage return
        output.append(line)
        if "Running mutation testing" in line:
            bar = tqdm(total=sum(len(results(function)) for function in functions), unit="mutant", dynamic_ncols=True)
        if bar is not None and (done := re.search(r" (\d+)/\d+ ", line)):
            bar.update(int(done[1]) - bar.n)
    if process.wait() != 0:
        said = [line for line in output if not "\u2800" < line < "\u2900"]  # without the spinner's
        sys.exit("".join(said[-50:]) + "mutmut failed; do the tests that pyproject.toml names for it pass?")
    bar.close()


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("functions", nargs="*", default=FUNCTIONS, help="all of them (default)")
    flags.add_argument("--children", type=int, default=os.cpu_count(), help="mutants at a time (one a core)")
    args = flags.parse_args()
    equivalents = read_equivalents(EQUIVALENTS)
    run_mutmut(args.functions, args.children)

    total, survivors = Counter(), []
    print(LINE.format("", "mutants", "killed", "equivalent", "survived"))
    for function in args.functions:
        found = results(function)
        if not found:
            sys.exit(f"{function} has no mutants: mutmut passes decorated functions by, and misspelt ones")
        survived = [name for name, status in found.items() if status not in ("killed", "timeout")]
        alive = Counter(changed_text(name, function) for name in survived)
        argued = sum((alive & equivalents).values())
        survivors += sorted((alive - equivalents).elements())
        counted = len(found), len(found) - alive.total(), argued, alive.total() - argued
        total.update(dict(enumerate(counted)))
        equivalents -= alive
        print(LINE.format(function, *counted))
    print(LINE.format("total", *(total[column] for column in range(4))))
    stale = [listed for listed in equivalents.elements() if listed[0] in args.functions]
    for title, changes in (("survived", survivors), (f"in {EQUIVALENTS}, but killed or not a mutant", stale)):
        for function, old, new in changes:
            print(f"\n{title}:\n{function}\n    - {old}\n    + {new}")
    sys.exit(bool(survivors or stale))


if __name__ == "__main__":
    main()
