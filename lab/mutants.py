"""Does a test fail for every small change of the mathematics? Mutation testing, with mutmut.

mutmut makes mutants of the functions below, each with one small change (another operator, a number plus 1, an
argument left out), and runs the tests of test_losses.py that reach it. A mutant is killed when a test fails or does
not end. One that no test can tell from the original stands in equivalents.txt, with the reason. The exit status is 1
if another one survives, or if that file is out of date. Left out on purpose: the training loops, which other tests
watch, and the text of messages with values in them, which mutmut leaves alone.

    python mutate.py                        # all functions: make mutants
    python mutate.py dpo.dpo_loss           # some of them
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
    "common": ("token_logps", "completion_mask", "masked_sum", "completion_logits", "sample", "draw"),
    "reinforce": ("reinforce_loss", "token_kl", "leave_one_out"),
    "dpo": ("dpo_loss", "split_completions", "make_pair", "collate", "pair_logps", "widths", "accuracy"),
    "support.fast": ("LogpsAndKL.pieces", "LogpsAndKL.forward", "LogpsAndKL.gradient", "logps_and_kl", "parts"),
}.items() for name in names]
EQUIVALENTS = Path(__file__).with_name("equivalents.txt")


def key(function):
    """The beginning of mutmut's names for a function's mutants: common.x_draw, fast.xǁLogpsAndKLǁpieces."""
    module, *names = function.split(".")
    return f"{module}.x_{names[0]}__mutmut_" if len(names) == 1 else f"{module}.xǁ{'ǁ'.join(names)}__mutmut_"


def results(function):
    """-> dict of mutmut's name of a mutant: "killed", "survived", "not checked" and the like."""
    data = SourceFileMutationData(path=function.split(".")[0] + ".py")
    data.load()
    codes = data.exit_code_by_key.items()
    return {name: status_by_exit_code[code] for name, code in codes if name.startswith(key(function))}


def change(name, function):
    """A mutant by what it changes, which stays the same when other lines do: function, old and new text."""
    diff = get_diff_for_mutant(name, path=function.split(".")[0] + ".py").splitlines()[2:]
    old, new = (" ".join(line[1:].strip() for line in diff if line.startswith(sign)) for sign in "-+")
    return function, old, new


def read_equivalents(path):
    """-> Counter of changes. The file: blocks of four lines, function, - old text, + new text, the reason."""
    blocks = [block.splitlines() for block in path.read_text().strip().split("\n\n") if not block.startswith("#")]
    for block in blocks:
        if len(block) != 4 or block[0] not in FUNCTIONS or (block[1][:2], block[2][:2]) != ("- ", "+ "):
            sys.exit("\n".join([f"{path}: cannot read the block", *block]))
    return Counter((function, old[2:], new[2:]) for function, old, new, _ in blocks)


def run(functions, children):
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
        sys.exit("".join(output[-50:]) + "mutmut failed")
    bar.close()


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("functions", nargs="*", default=FUNCTIONS, help="all of them (default)")
    flags.add_argument("--children", type=int, default=os.cpu_count(), help="mutants at a time (one a core)")
    args = flags.parse_args()
    equivalents = read_equivalents(EQUIVALENTS)
    run(args.functions, args.children)

    total, survivors = Counter(), []
    print(f"{'':28} mutants   killed  equivalent  survived")
    for function in args.functions:
        found = results(function)
        if not found:
            sys.exit(f"{function} has no mutants: mutmut passes decorated functions by, and misspelt ones")
        alive = Counter(change(name, function) for name, status in found.items() if status not in ("killed", "timeout"))
        argued = sum((alive & equivalents).values())
        survivors += sorted((alive - equivalents).elements())
        row = {"mutants": len(found), "killed": len(found) - alive.total(), "equivalent": argued}
        row["survived"] = alive.total() - argued
        total.update(row)
        equivalents -= alive
        print(f"{function:28} {row['mutants']:7} {row['killed']:8} {row['equivalent']:11} {row['survived']:9}")
    print(f"{'total':28} {total['mutants']:7} {total['killed']:8} {total['equivalent']:11} {total['survived']:9}")
    stale = [listed for listed in equivalents.elements() if listed[0] in args.functions]
    for title, changes in (("survived", survivors), (f"in {EQUIVALENTS}, but killed or not a mutant", stale)):
        for function, old, new in changes:
            print(f"\n{title}:\n{function}\n    - {old}\n    + {new}")
    sys.exit(bool(survivors or stale))


if __name__ == "__main__":
    main()
