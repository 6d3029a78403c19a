"""What a long loop shows and how it is stopped: a bar on a terminal or a line a minute, and Ctrl-C between steps."""

import contextlib
import os
import signal
import time

import torch
from tqdm import tqdm

from support.ranks import all_reduce_max, rank

MINUTE = 60  # seconds between two lines where there is no terminal


class Bar:
    """Iterates over items under tqdm's bar; in a log file and the like it prints a line a minute instead."""

    def __init__(self, items, desc, unit="batch", before=0):
        """before: how many items were done in an earlier run."""
        self.items, self.desc, self.before, self.beside = items, desc, before, {}
        self.total = before + len(items)
        self.bar = tqdm(None, desc, self.total, initial=before, unit=unit, dynamic_ncols=True, disable=None)

    def __iter__(self):
        begun = said = time.perf_counter()
        try:
            for done, item in enumerate(self.items, start=1):
                yield item
                with contextlib.suppress(OSError):  # as when the terminal is gone
                    self.bar.update()
                    now = time.perf_counter()
                    if self.bar.disable and now - said > MINUTE:
                        said, left = now, (now - begun) / done * (len(self.items) - done)
                        beside = "".join(f", {name} {value}" for name, value in self.beside.items())
                        where = f"{self.before + done} of {self.total}"
                        print(f"{self.desc}: {where}{beside}; {left / 60:.0f} minutes left", flush=True)
        finally:  # of an error, too, whose line must not stand behind the bar
            with contextlib.suppress(OSError):
                self.bar.close()

    def show(self, **values):
        """Beside the bar."""
        self.beside = {name: f"{value:.4g}" for name, value in values.items()}
        with contextlib.suppress(OSError):
            self.bar.set_postfix(self.beside)


class Progress:
    """The steps of a training run, and the checkpoints between them.

    parts: what a checkpoint has to hold, by name: a model, an optimizer, a torch.Generator, or tensors as they are
    (in lists and dicts). If the run goes on from a checkpoint (run.saved), the first three get their state back here.
    step: the number of steps done. end: the last step of the epoch that the loop is in.
    """

    def __init__(self, run, parts):
        self.run, self.parts = run, parts
        self.step, self.end, self.epoch = run.saved.get("step", 0), 0, 0
        for name, part in parts.items() if self.step else ():
            if isinstance(part, torch.Generator):
                part.set_state(run.saved["parts"][name])
            elif hasattr(part, "load_state_dict"):
                part.load_state_dict(run.saved["parts"][name])
        run.saved = {}  # a gigabyte for DistilGPT2

    def steps(self, batches):
        """Yields (step, batch) of an epoch's batches, those after the checkpoint only, under a bar.

        When the loop comes back for the next one the step is done: every --save-every steps and at the epoch's end a
        checkpoint is written. So it is after Ctrl-C or SIGTERM, before KeyboardInterrupt is raised.
        """
        begin, self.end, self.epoch = self.end, self.end + len(batches), self.epoch + 1
        done = min(max(self.step - begin, 0), len(batches))
        if done == len(batches):
            return
        self.bar = Bar(batches[done:], f"epoch {self.epoch}", "step", done)
        with stop_signals() as stop:
            for batch in self.bar:
                self.step, self.began = self.step + 1, time.perf_counter()
                yield self.step, batch
                stopping = all_reduce_max(max(stop, default=0))  # a signal may reach the ranks in different steps
                if stopping or self.step == self.end or self.step % self.run.args.save_every == 0:
                    self.run.checkpoint(self.step, {name: state(part) for name, part in self.parts.items()})
                if stopping:
                    raise KeyboardInterrupt(stopping)
            if stop:  # at the very end; the checkpoint is there
                raise KeyboardInterrupt(*stop)

    def log(self, **row):
        """A line of metrics.jsonl, with the step's seconds; its first two metrics stand beside the bar."""
        self.run.log(**row, seconds=time.perf_counter() - max(self.began, self.run.looked))
        self.bar.show(**dict([item for item in row.items() if item[0] != "step"][:2]))


def state(part):
    """What a checkpoint holds of a model, an optimizer, a Generator; anything else is its own state."""
    if isinstance(part, torch.Generator):
        return part.get_state()
    return part.state_dict() if hasattr(part, "state_dict") else part


@contextlib.contextmanager
def stop_signals():
    """Within it the first Ctrl-C or SIGTERM only fills the list that this yields; a second one acts as before."""
    noted, before = [], {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        noted.append(number)
        restore()
        with contextlib.suppress(OSError):  # os.write, since print is not safe within a handler
            rank() or os.write(2, b"\nstopping after this step, with a checkpoint; once more stops at once\n")

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield noted
    finally:
        restore()
