"""What comes from outside: models and data sets, from the hub or a local folder. Whatever is wrong becomes one line."""

import contextlib
import json
import logging
import os
import re
from pathlib import Path

from support.runs import UserError

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")  # no writer types them


@contextlib.contextmanager
def loading(flag, name, kind):
    """Around a library's loading call: checks a local path first; whatever goes wrong becomes one line."""
    import huggingface_hub  # here, so that importing this file stays cheap
    import transformers

    folder = Path(name).is_dir()
    if not folder and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"{flag} {name}: there is no such folder")
    transformers.utils.logging.disable_progress_bar()  # a bar for each weight read from disk
    huggingface_hub.utils.enable_progress_bars()  # but downloads show theirs
    logging.disable(logging.CRITICAL)  # the libraries' own warnings: what matters becomes the error below
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "DatasetGenerationError" and error.__cause__:
            error = error.__cause__  # it knows the row
        reason = " ".join(str(error).split()).partition(" for this kind of AutoModel")[0]  # a list of all kinds
        reason, advice = reason[:300] or type(error).__name__, ""
        if "SafetensorError" in (type(error).__name__, type(error.__cause__).__name__):
            advice = ": model.safetensors is cut off or broken, copy or download it anew"
        elif isinstance(error, UnicodeError):
            advice = ": save its files as UTF-8"
        elif "instantiate the backend tokenizer" in reason:
            advice = ": put a tokenizer's files beside the model's (save_pretrained)"
            reason = "nothing there can be read as one"
        elif isinstance(error, OSError) and not folder:  # other errors: it was found, but is wrong
            offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
            variable = "POLICY" if flag == "--reference" else flag.removeprefix("--").upper().replace("-", "_")
            advice = (f": no such folder here; check the name and the network{offline} and call again (what has been "
                      f"downloaded is kept), or give a local folder (to make: {variable}=FOLDER)")
            reason = re.split(r"\. | For more information", reason)[0]
        raise UserError(f"{flag} {name} cannot be loaded as {kind}{advice} ({reason})") from error
    finally:
        logging.disable(logging.NOTSET)


def load_columns(flag, name, split, columns):
    """The named text columns of a data set's split (hub name or local folder): lists of str.

    UserError with the row (from 0) and the column for what is no text. Any text is taken as it stands; if it holds
    control characters, as broken files do, that is said.
    """
    import datasets

    with loading(flag, name, "a data set"):
        splits = datasets.load_dataset(name)
    if split not in splits:
        raise UserError(f"{flag} {name} has no split {split!r}; it has {', '.join(splits)}")
    for column in columns:
        if column not in splits[split].column_names:
            has = ", ".join(splits[split].column_names)
            raise UserError(f"{flag} {name}, split {split}, has no column {column!r}; it has {has}")
    with loading(flag, name, "a data set"):
        texts = [splits[split][column][:] for column in columns]
        rows = json_rows(name, split)
    for column, values in zip(columns, texts, strict=True):
        given = [row.get(column) for row in rows] if len(rows) == len(values) else values
        for row, value in enumerate(given):
            if not isinstance(value, str):
                kind = "not a text" + (", but missing (so is an empty cell of a csv file)" if value is None else "")
                where = f"split {split}, row {row}, column {column}"
                raise UserError(f"{flag} {name}, {where}: {repr(value)[:80]} is {kind}; rows count from 0")
        if odd := [row for row, value in enumerate(values) if CONTROL.search(value)]:
            where = f"split {split}, column {column}: {len(odd)} of {len(values)} texts, the first in row {odd[0]}"
            print(f"{flag} {name}, {where}, hold control characters and are taken as they stand")
    return texts


def json_rows(name, split):
    """The rows of a local folder's .json or .jsonl files as they were written; [] for any other data.

    datasets gives all splits the types of the first rows: where those are texts, a later 42 would become "42".
    """
    import datasets

    rows = []
    for path in datasets.load_dataset_builder(name).config.data_files[split] if Path(name).is_dir() else ():
        if not path.endswith((".json", ".jsonl")):
            return []
        text = Path(path).read_text(encoding="utf-8-sig")
        try:
            found = [json.loads(line) for line in text.split("\n") if line.strip()]
        except ValueError:  # not an object a line, but one value
            found = [json.loads(text)]
        rows += found[0] if isinstance(found[0], list) else found
    return rows
