"""Signs of trouble that can be seen in the loops of a solution without running them. For check.py; plain Python.

A sign is a reason to look, not a verdict: the check does not know what the lines around it do.
"""

import ast


def walk(function, kind):
    return [node for node in ast.walk(function) if isinstance(node, kind)] if function else []


def names_in(node):
    """All names and attributes in an expression, those that are called too."""
    return {part.id if isinstance(part, ast.Name) else part.attr for part in ast.walk(node)
            if isinstance(part, (ast.Name, ast.Attribute))}


def calls(function, *names):
    """Calls of a function or method of one of these names."""
    return [node for node in walk(function, ast.Call)
            if (getattr(node.func, "attr", None) or getattr(node.func, "id", None)) in names]


def wrong_count(function):
    """A sum over all batches, the ragged last one too, divided by the number of whole ones."""
    whole = {target.id for node in walk(function, ast.Assign) for target in node.targets
             if isinstance(target, ast.Name) and floors(node.value)}
    divisions = [(node, node.right) for node in walk(function, ast.BinOp) if isinstance(node.op, ast.Div)]
    divisions += [(node, node.value) for node in walk(function, ast.AugAssign) if isinstance(node.op, ast.Div)]
    for node, divisor in divisions:
        if floors(divisor) or names_in(divisor) & whole:
            yield node.lineno, (f"the ragged last batch: `{ast.unparse(node)}` divides by the number of whole batches "
                                "(//), but the last, smaller one is in the sum, too")


def floors(node):
    """x // y, the number of whole batches; not -(-x // y) or (x + y - 1) // y, which round up."""
    if isinstance(node, ast.Call) and node.args:  # int(...), max(...)
        node = node.args[0]
    return (isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv)
            and not isinstance(node.left, (ast.BinOp, ast.UnaryOp)))


def mean_of_means(function):
    """A batch's mean is added without the number of its rows."""
    for node in walk(function, ast.AugAssign):
        total = node.target.id if isinstance(node.target, ast.Name) else ""
        adds = isinstance(node.op, ast.Add) and any(word in total for word in ("loss", "reward", "total", "sum", "acc"))
        used, weighed = names_in(node.value), any(isinstance(part.op, ast.Mult) for part in walk(node.value, ast.BinOp))
        if adds and used & {"mean", "item"} and not used & {"sum", "len", "size", "shape"} and not weighed:
            yield node.lineno, (f"the ragged last batch: `{ast.unparse(node)}` counts a smaller last batch like a "
                                "whole one; weigh each mean by its rows (and divide by the number of rows, not before)")


def kept_graph(train, reward):
    """A reward that reaches the loss with its graph."""
    loose = {"detach", "no_grad", "inference_mode", "data", "tolist", "numpy"}
    thrown_away = [node.value for node in walk(train, ast.Expr) if isinstance(node.value, ast.Call)]
    used = names_in(train) | names_in(reward) if train and reward else loose
    detached = [node for node in calls(train, "detach") if node not in thrown_away]
    if not detached and not calls(reward, "detach"):  # a bare `reward.detach()` does nothing
        used = used - {"detach"}
    if calls(train, "compute_reward_for_mini_batch") and not used & loose:
        yield train.lineno, ("gradient into the reward: nothing detaches it, so the backward pass goes through the "
                             "reward model, too")


def dropout(function):
    for node in calls(function, "train"):
        if isinstance(node.func, ast.Attribute) and not node.args:
            yield node.lineno, (f"dropout on: `{ast.unparse(node)}` turns it on; what is scored is then not what was "
                                "sampled, and DPO's first loss is not ln 2")


def not_zeroed(function):
    if calls(function, "backward") and not calls(function, "zero_grad"):
        yield function.lineno, "no zero_grad(): the gradients of all steps before add up"


def not_a_copy(function):
    for node in walk(function, ast.Assign):
        for target in node.targets:
            both = isinstance(target, ast.Name) and isinstance(node.value, ast.Name)
            if both and node.value.id in ("model", "policy") and any(word in target.id for word in ("orig", "ref")):
                yield node.lineno, (f"`{ast.unparse(node)}` is no copy: the original trains along, and the KL and "
                                    "DPO's log-ratios are 0 for ever; load it again, or copy.deepcopy")


def subtracted(function):
    for node in walk(function, (ast.BinOp, ast.AugAssign)):
        penalty = node.right if isinstance(node, ast.BinOp) else node.value
        words = " ".join(names_in(penalty)).lower()
        if isinstance(node.op, ast.Sub) and "alpha" in words and isinstance(penalty, ast.BinOp):
            yield node.lineno, f"KL negated: `{ast.unparse(node)}` rewards the distance from the original"


def no_positions(function):
    for node in walk(function, ast.Call):
        given = {keyword.arg for keyword in node.keywords}
        if "attention_mask" in given and "position_ids" not in given and None not in given:
            yield node.lineno, ("missing position ids: GPT-2 does not make them from the attention mask, so padding on "
                                "the left is counted, and log-probs are off (to policy and reference alike)")


def of(functions):
    """{name: node} of the course's functions -> {name: [(line, sign)]} of those that are not judged."""
    get = functions.get
    found = {
        "evaluate": [*wrong_count(get("evaluate")), *mean_of_means(get("evaluate")), *dropout(get("evaluate"))],
        "train": [*kept_graph(get("train"), get("compute_reward_for_mini_batch")), *subtracted(get("train"))],
        "train_DPO": [*wrong_count(get("train_DPO")), *mean_of_means(get("train_DPO"))],
        "get_log_probs": [*no_positions(get("get_log_probs")), *dropout(get("get_log_probs"))],
    }
    for name in ("train", "train_DPO"):
        node = get(name)
        found[name] += [*dropout(node), *not_zeroed(node), *not_a_copy(node)]
    return found
