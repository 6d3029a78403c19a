"""Run folders written by hand, for what reads them: no model, no torch."""

import json


def write_run(folder, reward, kl, text, flags, logp=-2.0, metrics=(), **results):
    """A finished run: 20 completions that end in `text`, whose log-prob a token is `logp` and a little around it."""
    folder.mkdir(parents=True)
    given = {"policy": "distilgpt2", "reference": "distilgpt2", "seed": 0, "samples_per_prompt": 1, **flags}
    about = {"flags": given, "device": "cpu", "hardware": "EPYC, 2 threads", "precision": "fp32"}
    about["versions"] = {"torch": "2", "transformers": "5"}
    (folder / "config.json").write_text(json.dumps(about))
    k = given["samples_per_prompt"]
    rows = [{"number": i // k, "prompt": f"I saw {i // k}", "completion": f" {text} {i % 7}", "reward": (i % 8) / 8,
             "kl": kl, "reference_logp": 5 * (logp + i / 1000), "length": 5} for i in range(20 * k)]
    (folder / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    shown = [{key: row[key] for key in ("prompt", "completion", "reward")} for row in rows[::k][:5]]
    result = {"reward": reward, "reward_se": 0.01, "kl": kl, "kl_se": 0.02, "n": 20, "distinct_2": 0.5}
    (folder / "eval.json").write_text(json.dumps(result | {"samples": shown} | results))


def steps(count=8, **values):
    return [{"step": i + 1, **{key: value * i for key, value in values.items()}} for i in range(count)]


def write_course(folder):
    """The runs of a sweep -> the folder that holds them."""
    rows = steps(reward=0.1, kl=1.0)
    write_run(folder / "baseline", 0.5, 0, "it is", {})
    write_run(folder / "samples-16", 0.5, 0, "it is", {"samples_per_prompt": 16})
    write_run(folder / "train-samples-32", 0.9, 0, "so", {"samples_per_prompt": 32, "split": "train"})
    write_run(folder / "train", 0.9, 0, "so", {"split": "train"})
    reinforce = {"advantage": "reward", "lr": 1e-4}
    write_run(folder / "alpha-0", 0.95, 99, "big big", {**reinforce, "alpha": 0.0}, logp=-9, metrics=rows)
    write_run(folder / "alpha-0.02", 0.9, 12.5, "it was", {**reinforce, "alpha": 0.02}, metrics=rows)
    write_run(folder / "alpha-2", 0.55, 0.25, "it is", {**reinforce, "alpha": 2.0}, metrics=rows)
    write_run(folder / "alpha-9", 0.45, 50, "& %", {**reinforce, "alpha": 9.0}, logp=-9, metrics=rows)  # fell apart
    write_run(folder / "loo-0.02", 0.88, 5, "it was", {**reinforce, "alpha": 0.02, "advantage": "loo"}, metrics=rows)
    for beta, reward in ((0.1, 0.6), (0.25, 0.59), (0.4, 0.5)):
        trained = [{"epoch": 0, "test_loss": 0.693, "test_accuracy": 0.5, "test_margin": 0.0}]
        trained += steps(loss=0.1, accuracy=0.1, margin=0.1, chosen_logratio=-1.0, rejected_logratio=-2.0)
        trained += [{"epoch": 1, "test_loss": 0.6, "test_accuracy": 0.9, "test_margin": 0.2}]
        tested = {"test_loss": 0.7 - beta / 2, "test_accuracy": 0.9, "test_margin": 0.2}
        write_run(folder / f"beta-{beta}", reward, 0.1, "so", {"beta": beta, "lr": 5e-7}, metrics=trained, **tested)
    return folder
