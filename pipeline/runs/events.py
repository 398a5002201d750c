"""TensorBoard events beside a run's own files, for whoever has a TensorBoard open already.

One event folder a member, RUN/tensorboard/<id>, with the numbers of metrics.jsonl and no others.
Without the package `tensorboard` nothing is written, and nothing is imported to find that out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

FOLDER = "tensorboard"
MOST_MEMBERS = 200  # an open file and a thread each; a larger grid is for the report


class Events:
    """The event files of one pass; `close` them, or use it as a context manager.

    `members` are ids; more than MOST_MEMBERS leave no events. What a killed pass wrote after
    `epochs_done`, where it goes on, is purged.
    """

    def __init__(self, run: str | Path, members: Sequence[str], epochs_done: int = 0) -> None:
        self._writers: dict[str, Any] = {}
        if find_spec("tensorboard") is None or len(members) > MOST_MEMBERS:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow: only where it is used

        for member in members:
            folder = str(Path(run) / FOLDER / member)
            self._writers[member] = SummaryWriter(folder, purge_step=epochs_done + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is written after it."""
        for writer in self._writers.values():
            writer.close()

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write the lines of metrics.jsonl of one epoch; a value of None leaves no event."""
        for line in lines:
            writer = self._writers.get(line["member"])
            if writer is None:
                continue
            for name, value in line.items():
                if name not in ("epoch", "member") and value is not None:
                    writer.add_scalar(_tag(name), value, line["epoch"])
            writer.flush()


def _tag(name: str) -> str:
    """`val_top1` → `val/top1`, `train_loss` → `train/loss`; `lr` stays."""
    part, _, what = name.partition("_")
    return f"{part}/{what}" if what and part in ("train", "val") else name
