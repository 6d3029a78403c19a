"""Judges one function of a solution, by executing it. For the child processes of check.py.

The cases are those of judge_losses.py and judge_data.py; here is what is made of a function that raises, is not written
yet, or needs what is not there.
"""

import ast
import os
import re
import sys
import threading
import time
import traceback
from pathlib import Path

from course import judge_data, judge_losses, loop_signs, parse, tiny_models
from course.explain import BadAnswer, Unfinished, Verdict


def judged(read, name, path):
    """-> {"status", "mistake", "expected", "got", "line", "notes"} of one function. Executes the solution's code."""
    namespace, notes = parse.execute(read, tiny_models.given(name), path)
    function, line = namespace.get(name), read.functions[name].node.lineno
    notes = [f"`{part}` {note}" for part, note in notes if re.search(rf"\b{part}\b", read.functions[name].text)]
    try:
        verdict = (judge_losses.JUDGES | judge_data.JUDGES)[name](function, namespace)
        if name == "create_labels_from_attention_mask" and verdict.status == "wrong" and may_pad_right(read):
            other = judge_data.judge_labels(function, namespace, "right")
            verdict = other if other.status == "right" else verdict
        if judge_losses.NOT_DETACHED in verdict.notes:
            nodes = {other: function.node for other, function in read.functions.items()}
            nodes = nodes.get("train"), nodes.get("compute_reward_for_mini_batch")
            if all(nodes) and not (any(loop_signs.kept_graph(*nodes)) and reward_has_graph(read, path)):
                verdict = verdict._replace(notes=[note for note in verdict.notes if note != judge_losses.NOT_DETACHED])
            elif all(nodes) and verdict.status == "right":
                verdict = verdict._replace(status="wrong", mistake="gradient into the reward")
        if verdict.status == "wrong" and not verdict.mistake:
            verdict = verdict._replace(notes=[*verdict.notes, *notes])
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == name]
        line = frames[-1].lineno if frames else line
        verdict = raised(read, name, error, notes)
    return {**verdict._asdict(), "line": line, "notes": [*verdict.notes]}


def raised(read, name, error, notes):
    """The Verdict on a function that raises; on one that is not finished, or cannot be judged, if that is why."""
    lost, text = missing_stand_in(read, error), read.functions[name].text
    said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if lost:
        return Verdict("not judged", notes=(lost, *notes))
    empty = isinstance(error, (NameError, NotImplementedError, Unfinished)) or re.search("NoneType|ellipsis", said)
    if str(error) == "returns ..." or ("TODO" in text and empty):
        return Verdict("missing", notes=(f"still TODO ({error if isinstance(error, Unfinished) else said})",))
    if isinstance(error, Unfinished):
        return Verdict("wrong", "shape", "an answer", str(error).removeprefix("returns "), notes)
    if isinstance(error, BadAnswer):
        return Verdict("wrong", "shape", *error.args, notes)
    if name == "_get_batch_logps" and isinstance(error, (IndexError, RuntimeError)) and "-100" in str(error):
        notes = ["gather needs real indices: replace the labels of -100 by any token and mask their log-probs"]
    if name == "compute_reinforce_loss" and "must match the size of tensor" in said:
        notes = ["a reward (B,) beside log-probs (B, N): reward.unsqueeze(1)"]
        return Verdict("raises", "reward broadcast over tokens", None, said, notes)
    return Verdict("raises", got=said, notes=notes)


def missing_stand_in(read, error):
    """What a function needs that only a run of the whole file, or a real model, would have given it; else None."""
    if isinstance(error, NameError) and not isinstance(error, UnboundLocalError):
        for node in read.statements:
            if error.name in parse.targets(node):
                return f"cannot be judged: it needs `{error.name}`, which line {node.lineno} sets; that is not executed"
    if isinstance(error, AttributeError) and "'Forecasts' object" in str(error):
        return f"cannot be judged: it needs model.{error.name}, which the stand-in has not"
    return "cannot be judged: it needs something that is stood in for" if "MagicMock" in str(error) else None


def reward_has_graph(read, path):
    """True if the solution's compute_reward_for_mini_batch returns a reward that a backward pass would follow."""
    name = "compute_reward_for_mini_batch"
    namespace, _ = parse.execute(read, tiny_models.given(name), path)
    models = [namespace[part] for part in ("tokenizer", "model", "reward_tokenizer", "reward_model")]
    try:
        return namespace[name](tiny_models.reviews(), *models)[0].requires_grad
    except Exception:
        return False


def may_pad_right(read):
    """True if the solution lets its tokenizer pad on the right at times, as GPT-2's does by itself."""
    parts = [part for node in read.statements for part in ast.walk(node)]
    sides = [part.value for part in parts if isinstance(part, ast.keyword) and part.arg == "padding_side"]
    sides += [part.value for part in parts if isinstance(part, ast.Assign)
              and any(getattr(target, "attr", "") == "padding_side" for target in part.targets)]
    texts = [side.value for side in sides if isinstance(side, ast.Constant)]
    loads = any(isinstance(part, ast.Call) and "Tokenizer" in ast.unparse(part.func) for part in parts)
    return "right" in texts or (loads and "left" not in texts)


def work(path, name, answers):
    """What a child does: judges one function, silently, and sends the answer."""
    os.setsid()  # so that whatever it starts can be stopped with it
    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(silence, descriptor)
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != parse.HERE]
    sys.path.append(str(Path(path).resolve().parent))  # for what stands beside the solution
    tiny_models.no_accelerator()
    try:
        answer = judged(parse.read_solution(path), name, path)
    except BaseException as error:  # SystemExit, too: the solution's code may say anything
        answer = {"status": "raises", "got": f"{type(error).__name__}: {error}", "notes": []}
    answers.send(answer)


def end_with_parent(parent):
    """Ends this process once its parent has ended, whatever the solution is doing: check.py itself may be killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
