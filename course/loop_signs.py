"""Signs of trouble that can be seen in the loops of a solution without running them. For check.py; plain Python.

A sign is a reason to look, not a verdict: the check does not know what the lines around it do. So what is spelled in
an unusual way gives none.
"""

import ast
import re

POLICY = re.compile(r"(policy|model|lm|gpt2?|actor|net)(_model|_lm)?", re.I)
ORIGINAL = re.compile(r"(^|_)(orig|ref(?!in)|init|frozen|base(?!line)|old)", re.I)
ITSELF = ("eval", "train", "to", "cuda", "cpu", "float", "half", "bfloat16", "double", "requires_grad_")


def walk(function, kind):
    return [node for node in ast.walk(function) if isinstance(node, kind)] if function else []


def name_of(node):
    """The last name of `x`, `self.x`, `x(...)` and `self.x(...)`; else ""."""
    node = node.func if isinstance(node, ast.Call) else node
    return getattr(node, "attr", None) or getattr(node, "id", None) or ""


def names_in(node):
    """All names and attributes in an expression, those that are called too."""
    return {name_of(part) for part in walk(node, (ast.Name, ast.Attribute))}


def calls(function, *names):
    """Calls of a function or method of one of these names, in the order of their lines."""
    return sorted((node for node in walk(function, ast.Call) if name_of(node) in names), key=lambda node: node.lineno)


def owner(call):
    """`x` of `x.method()`; None of a function's call."""
    return call.func.value if isinstance(call.func, ast.Attribute) else None


def bindings(function):
    """-> list of (names, value, node): `a = b`, `a = b = c`, `a: T = b`, `(a := b)`, and each of `a, b = c, d`."""
    found = []
    for node in walk(function, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
        targets = getattr(node, "targets", None) or [node.target]
        if isinstance(targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
            found += [([name_of(one)], value, node)
                      for one, value in zip(targets[0].elts, node.value.elts, strict=False)]
        elif node.value:
            found.append(([name_of(target) for target in targets], node.value, node))
    return found


def mean_of_means(function):
    """A batch's mean is added, or put into a list that is averaged, without the number of its rows."""
    averaged = {name for call in calls(function, "mean", "fmean", "sum", "tensor", "array", "stack")
                if all(keyword.arg != "weights" for keyword in call.keywords) for name in names_in(call)}
    inner = {}  # statement -> the innermost loop around it
    for loop in walk(function, ast.For):  # outer ones come first
        inner |= dict.fromkeys(walk(loop, (ast.AugAssign, ast.Call)), loop)
    for node, loop in inner.items():
        if isinstance(node, ast.AugAssign):
            added = node.value
        elif name_of(node) == "append" and node.args and name_of(owner(node)) in averaged:
            added = node.args[0]
        else:
            continue
        means = calls(added, "item", "mean")
        weighed = "sum" in names_in(added) or any(isinstance(part.op, ast.Mult) for part in walk(added, ast.BinOp))
        of_one_row = any(name_of(owner(call)) in names_in(loop.target) for call in means)
        if means and not weighed and not of_one_row and not calls(loop, "backward"):  # while training it is a log
            yield node.lineno, (f"the ragged last batch: `{ast.unparse(node)}` counts a smaller last batch like a "
                                "whole one; weigh each mean by its rows (and divide by the number of rows, not before)")


def kept_graph(train, reward):
    """A reward that reaches the loss with its graph."""
    loose = {"detach", "no_grad", "inference_mode", "set_grad_enabled", "data", "tolist", "numpy"}
    if train and reward and calls(train, "compute_reward_for_mini_batch") and not (
            (names_in(train) | names_in(reward)) & loose or calls(reward, "item")):
        yield train.lineno, ("gradient into the reward: nothing detaches it, so the backward pass goes through the "
                             "reward model, too")


def dropout(function):
    for node in calls(function, "train"):
        mode = [*node.args, *(keyword.value for keyword in node.keywords)]
        on = not mode or (isinstance(mode[0], ast.Constant) and mode[0].value)
        if owner(node) and on and "trainer" not in name_of(owner(node)).lower():
            yield node.lineno, (f"dropout on: `{ast.unparse(node)}` turns it on; what is scored is then not what was "
                                "sampled, and DPO's first loss is not ln 2")


def not_zeroed(function, functions):
    helpers = [functions[name_of(node)] for node in walk(function, ast.Call) if name_of(node) in functions]
    zeroed = any(calls(part, "zero_grad") for part in (function, *helpers))
    zeroed |= any("grad" in names for names, _, _ in bindings(function))  # p.grad = None
    if calls(function, "backward") and not zeroed:
        yield function.lineno, "no zero_grad(): the gradients of all steps before add up"
    order = calls(function, "backward", "zero_grad", "step")
    for three in zip(order, order[1:], order[2:], strict=False):
        if [*map(name_of, three)] == ["backward", "zero_grad", "step"]:
            yield three[1].lineno, "zero_grad() between backward() and step(): each step's gradient is thrown away"


def itself(node):
    """The name of the model that an expression is no copy of: model.eval().to(device), copy.copy(model) -> model."""
    if not isinstance(node, ast.Call):
        return name_of(node)
    if ast.unparse(node.func) == "copy.copy" and node.args:
        return itself(node.args[0])
    return itself(owner(node)) if name_of(node) in ITSELF and owner(node) else ""


def not_a_copy(function):
    """A policy and an original that are one object, and stay so: no policy is made after it."""
    found = bindings(function)
    for names, value, node in found:
        same = [itself(value), *names]
        mine = next(filter(POLICY.fullmatch, same), None)
        if not mine or not any(map(ORIGINAL.search, same)) or isinstance(value, ast.Constant):
            continue
        later = [other.lineno for others, by, other in found
                 if mine in others and isinstance(by, ast.Call) and by is not value]
        later += [call.lineno for call in calls(function, "reset_model_optimizer")]  # it makes another `model`
        if max(later, default=0) < node.lineno:
            yield node.lineno, (f"`{ast.unparse(node)}` is no copy: the original trains along, and the KL and "
                                "DPO's log-ratios are 0 for ever; load it again, or copy.deepcopy")


def makes_models(function):
    """True if a function sets the policy or the original itself."""
    names = {name for names, _, _ in bindings(function) for name in names}
    return bool(calls(function, "reset_model_optimizer")) or any(
        POLICY.fullmatch(name) or ORIGINAL.search(name) for name in names)


def compared_with_itself(function):
    for node in calls(function, "compute_kl_divergence"):
        if len(node.args) > 2 and POLICY.fullmatch(itself(node.args[2])):
            yield node.lineno, f"compared with itself: `{ast.unparse(node)}` is 0 for ever"


def slope(node):
    """1 or -1: a sum rises or falls with the KL in it; 0 if none is seen. Means and sums are looked into."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -slope(node.operand)
    if isinstance(node, ast.BinOp):
        left, right = slope(node.left), slope(node.right)
        if isinstance(node.op, (ast.Mult, ast.Div)):
            minus = [isinstance(getattr(part, "op", None), ast.USub) for part in (node.left, node.right)]
            return left * (-1) ** minus[1] or right * (-1) ** minus[0]
        return left or (-right if isinstance(node.op, ast.Sub) else right)
    if isinstance(node, ast.Call) and owner(node) and name_of(node) in ("mean", "sum"):
        return slope(owner(node))
    return int(bool(re.search(r"\bkl|kl\b|_kl|diverg", " ".join(names_in(node)).lower())))


def subtracted(function):
    """A loss from which the KL is taken; not a reward from which it is."""
    losses = [(value, node) for names, value, node in bindings(function) if "loss" in names[0]]
    losses += [(ast.BinOp(node.target, node.op, node.value), node)  # loss -= ...
               for node in walk(function, ast.AugAssign) if "loss" in name_of(node.target)]
    losses += [(owner(node), node) for node in calls(function, "backward") if owner(node)]
    for value, node in losses:
        sums = any(isinstance(part.op, (ast.Add, ast.Sub)) for part in walk(value, ast.BinOp))
        if sums and slope(value) < 0:
            yield node.lineno, f"KL negated: `{ast.unparse(node)}` rewards the distance from the original"


def may_pad_right(statements):
    """True if a solution lets its tokenizer pad on the right at times, as GPT-2's does by itself."""
    whole = ast.Module(statements)
    sides = [value for names, value, _ in bindings(whole) if "padding_side" in names]
    sides += [part.value for part in walk(whole, ast.keyword) if part.arg == "padding_side"]
    sides = [side.value for side in sides if isinstance(side, ast.Constant)]
    pads = calls(whole, "pad_sequence") or any("Tokenizer" in ast.unparse(part.func) for part in walk(whole, ast.Call))
    return "right" in sides or bool(pads and "left" not in sides)


def no_positions(function, functions):
    for node in walk(function, ast.Call):
        given = {keyword.arg for keyword in node.keywords}
        if "attention_mask" in given and not given & {None, "position_ids"} and (
                name_of(node) not in ("dict", "BatchEncoding", *functions)):
            yield node.lineno, ("missing position ids: GPT-2 does not make them from the attention mask, so padding on "
                                "the left is counted, and log-probs are off (to policy and reference alike)")


def of(functions, statements=()):
    """{name: node} of a solution's functions, its statements -> {name: [(line, sign)]} of those that aren't judged."""
    found = {name: list(dropout(functions.get(name))) for name in ("evaluate", "train", "get_log_probs", "train_DPO")}
    for name in ("evaluate", "train_DPO"):
        found[name] += mean_of_means(functions.get(name))
    for name in ("train", "train_DPO"):
        node = functions.get(name)
        found[name] += [*not_zeroed(node, functions), *not_a_copy(node), *compared_with_itself(node)]
        if node and not makes_models(node):  # it trains what the top level has made
            found[name] += not_a_copy(ast.Module([part for part in statements if not hasattr(part, "body")]))
    train, reward = functions.get("train"), functions.get("compute_reward_for_mini_batch")
    found["train"] += [*kept_graph(train, reward), *subtracted(train)]
    if not may_pad_right(statements):
        found["get_log_probs"] += no_positions(functions.get("get_log_probs"), functions)
    return found
