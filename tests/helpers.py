"""Small whole runs, as the tests start them: in this process, or in a child that can be killed.

Children are forked from a process that has loaded the scripts already, so that a run takes less than a second.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch

import demo.world
import dpo
import reinforce
import reward
from support import command, files

SCRIPTS = {"reward": reward, "reinforce": reinforce, "dpo": dpo}
TINY = demo.world.Size(reviews=80, test_reviews=20, pairs=20, test_pairs=7, policy_width=32, classifier_width=32,
                       layers=2, batch_size=16, epochs=4)


def labelled(texts):
    return [{"text": text, "label": int(i >= len(texts) / 2)} for i, text in enumerate(texts)]


def pair(n):
    words = {"positive_completion": f" is a joy, scene {n}.", "negative_completion": f" is a bore, scene {n}."}
    return {"prompt": f"Film {n}", **words}


def save_classifier(folder, reviews, labels):
    """A classifier with random weights and these label names."""
    tokenizer = demo.world.scorer_tokenizer(reviews)
    demo.world.save_model(folder, demo.world.new_classifier(tokenizer, TINY, labels), tokenizer)


def flags(world, script, out, *more, **replaced):
    """The command line of a small run: names in `replaced` take the place of the world's folders."""
    folders = {name: world / name for name in ("policy", "reward_model", "prompts", "pairs")} | replaced
    given = {"--out": out, "--policy": folders["policy"], "--prompts": folders["prompts"]}
    given |= {"--reward-model": folders["reward_model"], "--device": "cpu", "--precision": "fp32"}
    if script == "reward":
        given["--reference"] = given["--policy"]
    if script == "dpo":
        given["--pairs"] = folders["pairs"]
    return [str(part) for item in given.items() for part in item] + [str(part) for part in more]


def arguments(**values):
    """What the loading functions read of the command line: its defaults, and these values in their place."""
    given = vars(command.training_flags("", batch_size=1, lr=1, epochs=1).parse_args(["--out", "nowhere"]))
    return argparse.Namespace(**given | {name: str(value) if isinstance(value, Path) else value
                                         for name, value in values.items()})


def call(script, *argv):
    SCRIPTS[script].main(list(map(str, argv)))


def change(path, **values):
    """Puts values into a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


rows_of = files.read_rows


def without_times(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def refusal(script, *argv, capsys):
    """Runs a script as its last line does -> what it said on stderr. It must have stopped with a non-zero code."""
    with pytest.raises(SystemExit) as stopped:
        command.launch(lambda: call(script, *argv))
    assert stopped.value.code in (1, 2)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.splitlines()[-1]  # after progress bars, if any


# ---- in a child --------------------------------------------------------------------------------------------

SMALL = {"reinforce": ["--limit", 40, "--batch-size", 4, "--alpha", 0.1],  # 10 steps
         "dpo": ["--limit", 16, "--batch-size", 4, "--epochs", 3]}  # 12 steps, 4 an epoch
SMALL = {script: [*more, "--lr", 1e-2, "--save-every", 3, "--eval-limit", 8] for script, more in SMALL.items()}
STORES = []  # of the ranks, kept for as long as this process lives
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["reinforce", "dpo", "datasets", "tests.helpers"])


def small(world, script, out, *more):
    return flags(world, script, out, *SMALL[script], *more)


def run_in_child(script, argv, log, hook=None, environment=()):
    """What the child process does: the script's last line, with what it prints in a file."""
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [f"{script}.py"]
    if hook:
        hook[0](*hook[1:])
    command.launch(lambda: importlib.import_module(script).main(argv))


def start(script, argv, folder, hook=None):
    """-> the child's process. hook: a function of this file and its arguments, called before the script."""
    process = FORK.Process(target=run_in_child, args=(script, argv, folder.with_suffix(".log"), hook))
    process.start()
    return process


def finish_ranks(ranks, script, argv, folder, hook=None, restarts=0):
    """Runs them as torchrun does, with its store; a restart has that of the start -> exit codes, by rank.

    Ranks that wait for each other for ever are killed.
    """
    if not restarts:
        STORES.append(torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    shared = {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(STORES[-1].port), "TORCHELASTIC_RESTART_COUNT": str(restarts)}
    processes = []
    for rank in map(str, range(ranks)):
        environment = {**shared, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(ranks)}
        arguments = (script, argv, folder.with_suffix(".log"), hook, environment)
        processes.append(FORK.Process(target=run_in_child, args=arguments))
        processes[-1].start()
    for process in processes:
        process.join(120)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def finish(script, argv, folder, hook=None):
    """Runs it in a child, to its end -> exit code (minus the signal's number if one killed it)."""
    process = start(script, argv, folder, hook)
    process.join()
    return process.exitcode


def outcome(folder):
    """All that a run leaves, but for what it took in time and how often it was begun: file -> content."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found["metrics.jsonl"] = without_times(rows_of(folder / "metrics.jsonl"))
    found["eval.json"] = without_times([json.loads(found["eval.json"])])
    found["config.json"] = json.loads(found["config.json"])["script"]
    return found


def log_of(folder):
    return folder.with_suffix(".log").read_text()
