"""Judges one function of a solution, by executing it. For the child processes of check.py (judging.py starts them).

The cases are those of the files judge_*.py; here is what is made of a function that raises, is not written
yet, or needs what is not there.
"""

import ast
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch

from course import judge_data, judge_dpo, judge_kl, judge_reinforce, loop_signs, parse, tiny_models
from course.explain import BadAnswer, Unfinished, Verdict

JUDGES = {
    "compute_reinforce_loss": judge_reinforce.judge_reinforce,
    "compute_kl_divergence": judge_kl.judge_kl,
    "compute_DPO_loss": judge_dpo.judge_dpo,
    **judge_data.JUDGES,
}
REWARD = "compute_reward_for_mini_batch"


def judged(read, name, path):
    """-> {"status", "mistake", "expected", "got", "line", "notes"} of one function. Executes the solution's code."""
    namespace = parse.execute(read, tiny_models.given(name), path)
    function, line = namespace.get(name), read.functions[name].node.lineno
    try:
        verdict = JUDGES[name](function, namespace)
        if verdict.status == "wrong" and name == "create_labels_from_attention_mask":
            other = judge_data.judge_labels(function, namespace, "right")
            if other.status == "right" and loop_signs.may_pad_right(read.statements):
                verdict = other
        if judge_reinforce.NOT_DETACHED in verdict.notes:
            verdict = detached_elsewhere(verdict, read, path)
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == name]
        line = frames[-1].lineno if frames else line
        verdict = raised(read, name, error)
    stood_in = [f"`{part}` {note}" for part, note in namespace.notes
                if verdict.status not in ("right", "missing") and re.search(rf"\b{part}\b", read.functions[name].text)]
    return {**verdict._asdict(), "line": line, "notes": [*verdict.notes, *stood_in]}


def detached_elsewhere(verdict, read, path):
    """The Verdict on a loss that does not detach the reward, after a look at train() and at what makes the reward."""
    train, reward = (read.functions[name].node if name in read.functions else None for name in ("train", REWARD))
    if not train or not reward:
        return verdict
    if not any(loop_signs.kept_graph(train, reward)) or not reward_has_graph(read, path):
        return verdict._replace(notes=[note for note in verdict.notes if note != judge_reinforce.NOT_DETACHED])
    wrong = verdict._replace(status="wrong", mistake="gradient into the reward")
    return wrong if verdict.status == "right" else verdict


def reward_has_graph(read, path):
    """True if the solution's compute_reward_for_mini_batch returns a reward that a backward pass would follow."""
    namespace = parse.execute(read, tiny_models.given(REWARD), path)
    models = [namespace[part] for part in ("tokenizer", "model", "reward_tokenizer", "reward_model")]
    try:
        return namespace[REWARD](tiny_models.reviews(), *models)[0].requires_grad
    except Exception:
        return False


def raised(read, name, error):
    """The Verdict on a function that raises; on one that is not finished, or cannot be judged, if that is why."""
    lost, text = missing_stand_in(read, error), read.functions[name].text
    said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if lost:
        return Verdict("not judged", notes=[f"cannot be judged: it needs {lost}"])
    empty = isinstance(error, (NameError, NotImplementedError, Unfinished)) or re.search("NoneType|ellipsis", said)
    if str(error) == "returns ..." or ("TODO" in text and empty):
        return Verdict("missing", notes=[f"still TODO ({error if isinstance(error, Unfinished) else said})"])
    if isinstance(error, Unfinished):
        return Verdict("wrong", "shape", "an answer", str(error).removeprefix("returns "))
    if isinstance(error, BadAnswer):
        return Verdict("wrong", "shape", *error.args)
    if name == "_get_batch_logps" and "-100" in str(error):
        return Verdict("raises", got=said, notes=[
            "gather needs real indices: replace the labels of -100 by any token and mask their log-probs"])
    if name == "compute_reinforce_loss" and "must match the size of tensor" in said:
        return Verdict("raises", "reward broadcast over tokens", None, said, [
            "a reward (B,) beside log-probs (B, N): reward.unsqueeze(1)"])
    return Verdict("raises", got=said)


def missing_stand_in(read, error):
    """What a function needs that only a run of the whole file, or a real model, would have given it; else None."""
    if isinstance(error, NameError) and not isinstance(error, UnboundLocalError):
        for node in read.statements:
            if error.name in map(ast.unparse, parse.targets(node)):
                return f"`{error.name}`, which line {node.lineno} sets; that is not executed"
    if isinstance(error, AttributeError) and "'Forecasts' object" in str(error):
        return f"model.{error.name}, which the stand-in has not"
    return "something that is stood in for" if "MagicMock" in str(error) else None


def work(read, name, path, answers):
    """What a child does: judges one function, silently, and sends the answer."""
    os.setsid()  # so that whatever it starts can be stopped with it
    os.nice(5)  # what its parent still has to load comes first
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(silence, descriptor)
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != parse.HERE]
    sys.path.append(str(Path(path).resolve().parent))  # for what stands beside the solution ...
    for other, module in list(sys.modules.items()):  # ... and may be called as a file of this project
        if os.path.dirname(getattr(module, "__file__", None) or "") == str(parse.HERE):
            del sys.modules[other]
    torch.set_num_threads(1)  # threads do not survive a fork
    tiny_models.no_accelerator()
    try:
        answer = judged(read, name, path)
    except BaseException as error:  # SystemExit, too: the solution's code may say anything
        answer = {"status": "raises", "got": f"{type(error).__name__}: {error}", "notes": []}
    answers.send_bytes(json.dumps(answer, default=str).encode())


def end_with_parent(parent):
    """Ends this process, and what it has started, once its parent has ended: check.py itself may be killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)
