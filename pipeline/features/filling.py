"""The bytes of a cache on their way to the disk: decode, forward, cast, copy, write, all at once.

Four legs overlap: decoding (worker processes), the forward pass, the copy to the host, and writing
(threads). What is filled are *slots*; which input belongs into each is said by `Slots`, so that an
update fills a cache as the first extraction does.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from cache import Writer
from pipeline.backbones.contract import Backbone
from pipeline.errors import ImageError
from pipeline.features.writing import Layout, TokenBuffer
from pipeline.sources.batches import ImageBatch
from pipeline.sources.source import Source

if TYPE_CHECKING:
    from PIL import Image

WRITERS = 2  # threads that write, each from a buffer of its own; one more is being filled


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """Reported after every batch handed to the writers."""

    rows: int
    total: int
    bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """Reported for each unreadable image that `on_error = "skip"` left out."""

    key: str
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Slots:
    """What is to be read for each slot of a cache: `numbers` int64 (slots,) are those of inputs in
    `source`, -1 for a slot whose input is not there any more; `keys` name them."""

    source: Source
    keys: Sequence[str]
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def open(self, slot: int) -> Image.Image:
        """One image, RGB. Raises ImageError if it cannot be read or is not there any more."""
        if self.is_gone(slot):
            raise ImageError(f"{self.keys[slot]} was changed or removed before it was extracted")
        return self.source.open(int(self.numbers[slot]))

    def is_gone(self, slot: int) -> bool:
        """Whether no input belongs into the slot any more: no row will have it either."""
        return bool(self.numbers[slot] < 0)


@dataclass(frozen=True, kw_only=True)
class Filling:
    """How slots are filled: `backbone`, the `layout` of what it gives, its `precision`, and the
    `batch_size`, decoding `workers` and `on_error` of the configuration."""

    backbone: Backbone
    layout: Layout
    precision: torch.dtype
    batch_size: int
    workers: int
    on_error: str


def fill(
    writer: Writer,
    slots: Slots,
    how: Filling,
    report: Callable[[Extracted | Skipped], None],
) -> dict[str, float]:
    """Fill every pending slot; where the main thread's time went, in seconds.

    Raises ImageError for an input that cannot be read (unless `on_error` is "skip": the slot then
    has a reason in place of features), StorageOverflow naming tap and key, and what the writer
    raises. What was published stays, and the same call goes on from there.
    """
    pending, clock = list(writer.pending), _Legs()
    if not pending:
        return clock.legs
    backbone, starts = how.backbone, writer.manifest.part_starts[:-1]
    batches = backbone.batches(
        slots, pending=pending, batch_size=how.batch_size, starts=starts, workers=how.workers,
        pin_memory=backbone.device.type == "cuda",
    )  # fmt: skip
    total, row_bytes, done = sum(map(len, pending)), writer.manifest.slot_nbytes, 0
    free = [
        TokenBuffer(writer.manifest, how.layout, how.batch_size, backbone.device)
        for _ in range(WRITERS + 1)
    ]
    in_flight: deque[Future[TokenBuffer]] = deque()
    pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="sidecache-write")
    try:
        for batch in batches:
            clock.lap("decoding")
            _tell_failures(batch, slots, how.on_error, report)
            if not free:
                free.append(in_flight.popleft().result())
            clock.lap("writing")
            buffer = free.pop()
            buffer.fill(backbone, batch.images, how.precision)
            clock.lap("forward")
            runs = _overlaps(batch, pending)
            in_flight.append(pool.submit(_write, writer, buffer, batch, runs, slots))
            done += sum(map(len, runs))
            seconds = clock.last - clock.begin
            report(Extracted(rows=done, total=total, bytes=done * row_bytes, seconds=seconds))
        for future in in_flight:
            future.result()
        clock.lap("writing")
    finally:
        pool.shutdown(cancel_futures=True)
    return clock.legs


class _Legs:
    """Where the main thread's time goes."""

    def __init__(self) -> None:
        self.legs = {"decoding": 0.0, "forward": 0.0, "writing": 0.0}
        self.begin = self.last = time.perf_counter()

    def lap(self, leg: str) -> None:
        now = time.perf_counter()
        self.legs[leg] += now - self.last
        self.last = now


def _tell_failures(
    batch: ImageBatch, slots: Slots, on_error: str, report: Callable[[Extracted | Skipped], None]
) -> None:
    for slot, reason in batch.failures.items():
        if slots.is_gone(slot):
            continue
        if on_error == "raise":
            raise ImageError(reason)
        report(Skipped(key=slots.keys[slot], reason=reason))


def _write(
    writer: Writer, buffer: TokenBuffer, batch: ImageBatch, runs: list[range], slots: Slots
) -> TokenBuffer:
    if buffer.overflowing():
        raise buffer.overflow(batch, slots.keys)
    for slot in batch.failures:
        for host in buffer.host.values():
            host.tensor[slot - batch.start] = 0
    errors = {} if batch.start in batch.failures else buffer.measured()
    for run in runs:
        place = slice(run.start - batch.start, run.stop - batch.start)
        arrays = {name: host.array[place] for name, host in buffer.host.items()}
        reasons = {slot: why for slot, why in batch.failures.items() if slot in run}
        measured = errors if run.start == batch.start else {}
        writer.write(run.start, arrays, reasons, measured)
    return buffer


def _overlaps(batch: ImageBatch, pending: Sequence[range]) -> list[range]:
    start, stop = batch.start, batch.start + len(batch.images)
    runs = (range(max(start, run.start), min(stop, run.stop)) for run in pending)
    return [run for run in runs if run]
