"""Says what is right and what is wrong in somebody's solution of the course, function by function.

    make check SOLUTION=A3.py
    python check.py A3.ipynb --json

The functions are found by the course's names and called on cases known on paper (cases.py, cases_inputs.py). A wrong
answer is compared with what each usual mistake would give (explain.py), and named after it. The file is not run as a
whole (solution.py), but its functions are: a stranger's code runs with your rights, in a child process for each
function, with a time limit. That stops accidents, not malice.
Exit code 1: a judged function is wrong or raises; 2: the file cannot be read.
"""

import argparse
import ast
import contextlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import signs
import solution

JUDGED = ("compute_reward_for_mini_batch", "compute_reinforce_loss", "compute_kl_divergence", "compute_DPO_loss",
          "_get_batch_logps", "create_labels_from_attention_mask")
NOT_JUDGED = ("evaluate", "train", "get_log_probs", "train_DPO")

# What a mistake is, in a sentence; "function: mistake" where a function has its own.
MEANING = {
    "sign": "the sign is flipped: minimising it makes rewarded text *less* likely",
    "compute_DPO_loss: sign": "the sign is flipped: minimising it makes the chosen text *less* likely",
    "_get_batch_logps: sign": "the sign is flipped: these are minus the log-probabilities",
    "no shift": "the forecasts are not shifted: those in column t are for token t + 1",
    "logits shifted instead of targets": "shifted the wrong way: each token is looked up two forecasts too late",
    "off by one at the prompt": "the border of prompt and completion is off by one: the first token written is left "
                                "out, or the prompt's last one is in",
    "first eos dropped": "eos tokens are left out: the decision to stop is never trained (masks of targets by "
                         "`!= pad` do that)",
    "padding kept": "padding is counted, where the mask should hide it",
    "mask one column late": "the mask is one column late: it was made for tokens, and used on what is shifted by one",
    "mask one column early": "the mask is one column early",
    "prompt scored": "the prompt's tokens are scored, too: they must be -100",
    "mean for sum": "a mean over the tokens, where log p(text) is the sum",
    "sum for mean": "average_log_prob=True must divide by the number of tokens that count",
    "mean over padding": "a mean over all columns, also those that do not count",
    "reward broadcast over tokens": "shapes broadcast: each reward is multiplied with other rows' or tokens' log-probs",
    "reward forgotten": "the reward is not in it",
    "reward for negative text": "1 - reward: it trains towards negative text",
    "gradient into the reward": "the reward keeps its graph, here and in train: detach it",
    "KL reversed": "KL(original ‖ policy) instead of KL(policy ‖ original); F.kl_div's arguments are (q, p)",
    "KL negated": "the KL is negated: minimising it drives the policy away",
    "KL sampled and back-propagated": "log-ratios of the sampled tokens: their mean is the KL, but the mean of their "
                                      "gradient is 0",
    "KL sampled and back-propagated, squared":
        "half the squared log-ratio of the sampled tokens: its gradient is that of the KL on average, its value is not "
        "the KL; the exact sum over the vocabulary has less noise",
    "KL sampled and back-propagated, k3":
        "q/p - 1 - log(q/p) of the sampled tokens: its value is the KL on average, its gradient that of "
        "KL(original ‖ policy)",
    "only the sampled word in the KL": "p log(p/q) of the sampled token only: the sum over the vocabulary is missing",
    "KL without a gradient": "the penalty has no gradient: it changes nothing",
    "without a gradient": "no gradient reaches the policy: it will not learn",
    "another gradient": "the value is right, but its gradient is not that of the value",
    "batchmean over the wrong axis": "summed over the rows and averaged over the positions",
    "mean over the vocabulary, too": "averaged over the vocabulary, too: 50,257 times too small "
                                     "(F.kl_div's reduction='mean')",
    "chosen and rejected swapped": "chosen and rejected are swapped: it prefers what it should not",
    "beta forgotten": "beta is not used",
    "reference forgotten": "the reference's log-probs are not in it",
    "log(sigmoid)": "log(sigmoid(x)) is -inf for a large negative x, and log(1 + exp(-x)) overflows: "
                    "use F.logsigmoid",
    "log forgotten": "probabilities, where log-probabilities are needed",
    "softmax forgotten": "raw logits, where a softmax is needed",
    "softmax over the wrong axis": "the softmax is over another axis than the vocabulary's",
    "softmax in bf16": "computed in half precision: log-probs are off by a nat or so on 100 tokens; use .float() first",
    "misaligned gather": "forecasts and tokens that do not belong together: gather does not complain about an index "
                         "that is shorter than its input",
    "dropout on": "the model is in training mode: its forecasts are no longer those that were sampled from",
    "sum for mean over the batch": "summed over the batch, where the mean is asked for",
    "sum and mean swapped": "average_log_prob is taken the other way round",
    "one number for the batch": "one number for the whole batch, where one for each row is needed",
    "policy forgotten": "the policy's log-probs are not in it",
    "reference added": "the reference's log-probs are added, not subtracted (or those of the other side subtracted)",
    "rejected forgotten": "the rejected text is not in it",
    "log-probs divided, not subtracted": "the log of a ratio is a difference of logs",
    "beta outside the sigmoid": "beta multiplies the loss; it belongs into the sigmoid",
    "beta on one side only": "beta multiplies the chosen side only",
    "divided by beta": "the margin is divided by beta",
    "sigmoid forgotten": "minus the margin itself: without the sigmoid nothing ever is enough",
    "the weights p forgotten": "a sum of log-ratios, not weighted with p",
    "log of a log-probability": "it is nan: the log of something negative; F.kl_div takes that log by itself unless "
                                "log_target=True",
    "compared with itself": "it is always 0: a model is compared with itself",
    "prompt positions in the KL": "the KL is taken where nothing was written",
    "prompt counted from the row's start": "the prompt is taken from the row's first column, where the padding is",
    "the completion is hidden instead of the prompt": "prompt and completion are exchanged",
    "P(negative)": "the probability of the other label",
    "the label instead of its probability": "0 or 1, where a probability is asked for",
    "log-probability as reward": "the log of the probability",
    "sigmoid of one logit": "the sigmoid of one logit is not the softmax over two",
    "the completion alone is scored": "the classifier reads the completion without its prompt",
    "the prompt alone is scored": "the classifier reads what was not written",
    "the review itself is scored": "the classifier reads the review, not what was written",
    "probability of the likelier label": "the larger of the two probabilities, whichever label it is of",
    "likeliest token scored": "the log-prob of the likeliest token, not of the one that was drawn",
    "last token dropped": "the last token of the completion is not in it",
    "only the prompt's tokens": "the prompt's tokens are scored, and not the completion's",
    "the ragged last batch": "divided by a fixed batch size: the last batch of a split is smaller",
    "labels changed in place": "it writes into the labels that it is given: the second model that is asked sees no "
                               "-100 any more; clone() first",
    "input_ids changed in place": "it writes into input_ids, which the model reads next: clone() first",
    "mean before the sigmoid": "the sigmoid of the mean margin is not the mean loss",
    "log-probs as weights": "the log-ratios are weighted with log p instead of p",
    "policy and original at different positions": "the policy's forecast is compared with the original's at another "
                                                  "position",
    "everything is hidden": "no token is left to be scored",
    "one prompt length for all rows": "the longest prompt's length is taken for all rows",
    "labels shifted twice": "the labels are shifted here and in _get_batch_logps again",
    "labels are not the tokens": "the labels must be the token ids themselves",
    "0 instead of -100": "hidden labels must be -100: 0 is a word",
    "shape": "another kind of answer than the course's",
    "not sampled": "two calls give the same text",
    "another reward": "the reward is not P(positive) of the text",
    "greedy": "the most likely token each time, not a sample: do_sample=True",
    "top-k left on": "only the likeliest words are drawn: generate(do_sample=True), the assignment's own hint, keeps "
                     "top_k=50 unless told top_k=0, so what is scored is not what was sampled from",
    "temperature or top-p left on": "drawn from another distribution than softmax(logits)",
    "length": "another number of tokens than 10 + 20",
    "prompt": "the rows do not begin with the first 10 tokens of their reviews",
}


# ---- in the child ------------------------------------------------------------------------------------------


def judged(read, name, path):
    """-> {"status", "mistake", "expected", "got", "line", "notes"} of one function. Executes the solution's code."""
    import cases
    import cases_inputs
    import standins

    given = standins.given(name)
    namespace, notes = solution.execute(read, given, path)
    function, line = namespace.get(name), read.functions[name].node.lineno
    try:
        verdict = (cases.JUDGES | cases_inputs.JUDGES)[name](function, namespace)
        if name == "create_labels_from_attention_mask" and verdict.status == "wrong" and may_pad_right(read):
            other = cases_inputs.judge_labels(function, namespace, "right")
            verdict = other if other.status == "right" else verdict
        if cases.NOT_DETACHED in verdict.notes:
            nodes = {other: function.node for other, function in read.functions.items()}
            nodes = nodes.get("train"), nodes.get("compute_reward_for_mini_batch")
            if all(nodes) and not (any(signs.kept_graph(*nodes)) and reward_has_graph(read, path)):
                verdict = verdict._replace(notes=[note for note in verdict.notes if note != cases.NOT_DETACHED])
            elif all(nodes) and verdict.status == "right":
                verdict = verdict._replace(status="wrong", mistake="gradient into the reward")
        found = verdict._asdict()
        if verdict.status == "wrong" and not verdict.mistake:
            text = read.functions[name].text
            found["notes"] = [*verdict.notes, *(n for n in notes if re.search(rf"\b{n.split('`')[1]}\b", text))]
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == name]
        line = frames[-1].lineno if frames else line
        found = raised(read, name, error, notes)
    return {**found, "line": line, "notes": [*found["notes"]]}


def raised(read, name, error, notes):
    """The verdict on a function that raises; on one that is not finished, if that is why."""
    text, said = read.functions[name].text, f"{type(error).__name__}: {error}"
    kind, said = type(error).__name__, said.splitlines()[0][:200]
    said = str(error) if kind == "Unfinished" else said
    notes = [note for note in notes if re.search(rf"\b{note.split('`')[1]}\b", text)]
    lost = missing_stand_in(read, error)
    if lost:
        return {"status": "not judged", "mistake": None, "expected": None, "got": None, "notes": [lost, *notes]}
    empty = isinstance(error, (NameError, NotImplementedError)) or re.search("NoneType|ellipsis", said)
    if str(error) == "returns ..." or ("TODO" in text and (empty or kind == "Unfinished")):
        return {"status": "missing", "mistake": None, "expected": None, "got": None, "notes": [f"still TODO ({said})"]}
    if kind in ("BadAnswer", "Unfinished"):
        expected, got = error.args if kind == "BadAnswer" else ("an answer", str(error).removeprefix("returns "))
        return {"status": "wrong", "mistake": "shape", "expected": expected, "got": got, "notes": notes}
    if name == "_get_batch_logps" and isinstance(error, (IndexError, RuntimeError)) and "-100" in str(error):
        notes = ["gather needs real indices: replace the labels of -100 by any token and mask their log-probs"]
    mistake = None
    if name == "compute_reinforce_loss" and "must match the size of tensor" in said:
        mistake, notes = "reward broadcast over tokens", ["a reward (B,) beside log-probs (B, N): reward.unsqueeze(1)"]
    return {"status": "raises", "mistake": mistake, "expected": None, "got": said, "notes": notes}


def missing_stand_in(read, error):
    """What a function needs that only a run of the whole file, or a real model, would have given it; else None."""
    if isinstance(error, NameError) and not isinstance(error, UnboundLocalError):
        for node in read.statements:
            if error.name in solution.targets(node):
                return f"cannot be judged: it needs `{error.name}`, which line {node.lineno} sets; that is not executed"
    if isinstance(error, AttributeError) and "'Forecasts' object" in str(error):
        return f"cannot be judged: it needs model.{error.name}, which the stand-in has not"
    return "cannot be judged: it needs something that is stood in for" if "MagicMock" in str(error) else None


def reward_has_graph(read, path):
    """True if the solution's compute_reward_for_mini_batch returns a reward that a backward pass would follow."""
    import standins

    name = "compute_reward_for_mini_batch"
    namespace, _ = solution.execute(read, standins.given(name), path)
    models = [namespace[part] for part in ("tokenizer", "model", "reward_tokenizer", "reward_model")]
    try:
        return namespace[name](standins.reviews(), *models)[0].requires_grad
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
    import cases_inputs  # noqa: F401  before this project's folder leaves the path
    import standins

    sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != solution.HERE]
    sys.path.append(str(Path(path).resolve().parent))  # for what stands beside the solution
    standins.no_accelerator()
    try:
        answer = judged(solution.read(path), name, path)
    except BaseException as error:  # SystemExit, too: the solution's code may say anything
        answer = failure(f"{type(error).__name__}: {error}")
    answers.send(answer)


def end_with_parent(parent):
    """Ends this process once its parent has ended, whatever the solution is doing: check.py itself may be killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def failure(said, line=None, notes=()):
    return {"status": "raises", "mistake": None, "expected": None, "got": said, "line": line, "notes": [*notes]}


# ---- here --------------------------------------------------------------------------------------------------


def in_child(context, path, name, limit):
    """judged(), in a child process that is stopped after `limit` seconds."""
    receives, sends = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(path, name, sends), daemon=True)
    child.start()
    sends.close()
    try:
        return receives.recv() if receives.poll(limit) else failure(f"no answer within {limit:g} seconds")
    except EOFError:
        child.join()
        return failure(f"its process ended without an answer (exit code {child.exitcode})")
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.join()


def unfinished(function):
    """True for a body of nothing but a docstring, pass, ... or NotImplementedError."""
    body = [node for node in function.node.body
            if not isinstance(node, ast.Pass) and not isinstance(getattr(node, "value", None), ast.Constant)]
    return all(isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node) for node in body)


def check(path, limit=60, judge=None):
    """-> {name: verdict} for all of the course's functions. judge(name) -> verdict; by default in a child process."""
    read = solution.read(path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["check", "cases_inputs", "datasets", "matplotlib.pyplot"])
    if not judge:  # Ctrl-C is for this process, which stops the others
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        multiprocessing.forkserver.ensure_running()
        signal.signal(signal.SIGINT, interrupt)
    judge = judge or (lambda name: in_child(context, path, name, limit))
    trouble = signs.of({name: function.node for name, function in read.functions.items()})
    found = {}
    for name in (*JUDGED, *NOT_JUDGED):
        answer = dict.fromkeys(("mistake", "expected", "got", "line", "cell")) | {"status": "missing", "notes": []}
        unread = next((part for part in read.unread if name in part.functions), None)
        if name in read.functions:
            answer["line"] = read.functions[name].node.lineno
            if unfinished(read.functions[name]):
                answer["notes"] = ["still TODO: it has no body"]
            elif name in JUDGED:
                answer |= {key: value for key, value in judge(name).items() if value is not None}
            else:
                answer |= {"status": "not judged", "notes": [f"{sign} (line {line})" for line, sign in trouble[name]]}
            answer["cell"] = read.functions[name].cell
        elif unread and name in NOT_JUDGED:
            answer |= {"status": "not judged", "line": unread.line, "cell": unread.cell,
                       "notes": [f"it cannot be read: {unread.message}: {unread.text}"]}
        elif unread:
            answer |= {"status": "raises", "line": unread.line}
            answer["got"] = f"SyntaxError: {unread.message}: {unread.text}"
            if "TODO" in unread.piece and re.search("TODO|=$|= *#|^def|^$", unread.text):
                answer |= {"status": "missing", "got": None, "notes": [f"still TODO: {unread.text}".strip(": ")]}
            answer["cell"] = unread.cell
        else:
            inner = [node for statement in read.statements for node in ast.walk(statement)
                     if isinstance(node, ast.FunctionDef) and node.name == name]
            answer["notes"] = [f"there is one inside of another definition (line {node.lineno})" for node in inner]
        found[name] = answer
    return found, read.unread


def sentence(name, verdict):
    """What is wrong, in words."""
    said = verdict["got"]
    if verdict["status"] == "wrong":
        mistakes = (verdict["mistake"] or "").split(" + ")
        said = "; ".join(MEANING.get(f"{name}: {mistake}", MEANING.get(mistake, mistake)) for mistake in mistakes)
        said = said or "it equals none of the usual mistakes"
        said += ". Expected {}, got {}".format(*shown(verdict["expected"], verdict["got"]))
    return f"{name}: {said} ({place(verdict)})"


def place(verdict):
    """Where a function stands. Lines of a notebook are counted in each code cell, and code cells from 1."""
    return f"code cell {verdict['cell']}, line {verdict['line']}" if verdict["cell"] else f"line {verdict['line']}"


def shown(*values):
    """-> each value as text; of lists what stands around the first place in which they differ."""
    if all(isinstance(value, list) for value in values):
        place = next((i for i, both in enumerate(zip(*values, strict=True)) if both[0] != both[1]), 0)
        first = max(0, place - 2)
        parts = [", ".join(f"{x:+.3f}" if isinstance(x, float) else str(x) for x in value[first : first + 8])
                 for value in values]
        return [f"[{'..., ' * (first > 0)}{part}{', ...' * (len(values[0]) > first + 8)}]" for part in parts]
    return [f"{value:+.3f}" if isinstance(value, float) else str(value) for value in values]


def report(path, found, unread):
    """-> lines of text."""
    width = max(map(len, found))
    yield f"{path}"
    yield ""
    for name, verdict in found.items():
        signs_seen = f"look: {len(verdict['notes'])} sign(s) of trouble"
        said = signs_seen if verdict["status"] == "not judged" and verdict["notes"] else verdict["mistake"] or ""
        yield f"  {name:<{width}}  {verdict['status']:<10}  {said}".rstrip()
    for name, verdict in found.items():
        if verdict["status"] in ("wrong", "raises"):
            yield ""
            yield sentence(name, verdict)
        elif verdict["notes"]:
            yield ""
            yield f"{name}: {verdict['status']}"
        yield from (f"    - {note}" for note in verdict["notes"])
    for part in (part for part in unread if not part.functions):
        yield ""
        yield f"{place(part._asdict())}: cannot be read, the rest was: {part.message}: {part.text}"
    counts = Counter(verdict["status"] for verdict in found.values())
    yield ""
    yield ", ".join(f"{count} {status}" for status, count in counts.items())
    if counts["missing"] == len(found):
        yield "None of the course's functions is there: is this the right file?"


def main(argv=None):
    description, _, more = __doc__.partition("\n\n")
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=more, formatter_class=style)
    parser.add_argument("solution", type=Path, help="a .py export of the course's notebook, or the .ipynb itself")
    parser.add_argument("--json", action="store_true", help="print the verdicts as one JSON object")
    parser.add_argument("--limit", type=float, default=60, help="seconds that a function may take (%(default)s)")
    args = parser.parse_args(argv)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                   "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(solution.HERE)}  # for the children
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that they are stopped
    sys.stdout.reconfigure(errors="replace")  # for ‖ where the terminal has none
    try:
        found, unread = check(args.solution, args.limit)
    except (OSError, ValueError) as error:
        print(f"check.py: error: {args.solution}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 2
    if args.json:
        for verdict in found.values():
            verdict["notes"] += [place(verdict)] * bool(verdict["cell"])
            del verdict["cell"]
        print(json.dumps({"functions": found}, indent=1))
    else:
        print(*report(args.solution, found, unread), sep="\n")
    return int(any(verdict["status"] in ("wrong", "raises") for verdict in found.values()))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("check.py: interrupted")
    except BrokenPipeError:  # | head
        os._exit(1)
