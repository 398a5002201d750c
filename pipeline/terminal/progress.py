"""What goes on meanwhile, on stderr: the records that long functions report → bars and lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from pipeline.terminal.tables import clock_text, counted, score_text, size_text

if TYPE_CHECKING:
    from pipeline.config import ExtractConfig
    from pipeline.extract import ExtractionPlan
    from pipeline.records import PassStarted, SweepRecord, TrainRecord

Report = Callable[[Any], None]


class Progress:
    """A progress bar on a terminal, a plain line every few seconds elsewhere; always on stderr."""

    SECONDS = 5.0

    def __enter__(self) -> Progress:
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._begin: dict[str, float] = {}
        self._done: dict[str, int] = {}
        self._last = self._previous = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, what: str, done: int, total: int, detail: str = "") -> None:
        if done < self._done.get(what, 0):  # the next round of the same
            del self._begin[what]
        self._done[what] = done
        begin = self._begin.setdefault(what, self._previous)
        self._previous = time.monotonic()
        if sys.stderr.isatty():
            self._draw(what, done, total, detail)
        elif time.monotonic() - self._last >= self.SECONDS:
            self._last = time.monotonic()
            left = (self._last - begin) / max(done, 1) * (total - done)
            told = f", {detail}" if detail else ""
            click.echo(f"{what} {done:,} of {total:,}{told}, {clock_text(left)} left", err=True)

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            click.echo(text, err=True)

    def _draw(self, what: str, done: int, total: int, detail: str) -> None:
        if self._bar is None:
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[detail]}", markup=False),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total, detail=detail)
        self._bar.update(self._tasks[what], completed=done, total=total, detail=detail)


def extracting(progress: Progress, config: ExtractConfig) -> Report:
    """Shows the records of `extract`."""
    from pipeline.extract import ExtractionPlan, Hashed, Repeated, Weighed
    from pipeline.features.filling import Extracted, Skipped
    from pipeline.features.job import Updating

    def report(record: Any) -> None:
        match record:
            case Hashed(done=done, total=total):
                progress.update("hashing", done, total)
            case Weighed(done=done, total=total, skipped=skipped):
                detail = f"{counted(skipped, 'unreadable image')} skipped" if skipped else ""
                progress.update("weighing weights", done, total, detail)
            case Repeated(split=split, other=other, rows=rows, example=(key, twin)):
                images = f"{counted(rows, f'{split} image')} {'is' if rows == 1 else 'are'}"
                progress.note(f"{images} also in {other} (e.g. {key} = {twin})")
            case Updating(new=new, changed=changed, vanished=vanished):
                told = f"{new:,} new, {changed:,} changed, {vanished:,} vanished"
                progress.note(f"{told}; nothing else is computed or moved")
            case ExtractionPlan():
                if record.pending_rows:
                    progress.note(_plan_line(record, config))
                    if record.begun_batch_size not in (None, config.batch_size):
                        progress.note(_batch_line(record, config))
            case Extracted(rows=rows, total=total, bytes=size, seconds=seconds):
                detail = f"{rows / max(seconds, 1e-9):,.0f} images/s, {size_text(size)} written"
                progress.update("extracting", rows, total, detail)
            case Skipped(key=key, reason=reason):
                progress.note(f"skipped {key}: {reason}")

    return report


def _plan_line(plan: ExtractionPlan, config: ExtractConfig) -> str:
    resumed = plan.rows - plan.pending_rows
    images = f"{plan.pending_rows:,} images"
    already = f" ({resumed:,} of {plan.rows:,} rows already there)" if resumed else ""
    shapes = ", ".join(f"{_run_of(s.taps)} x {s.tokens} x {s.dim}" for s in plan.stacks)
    return (
        f"{config.model} on {plan.device}, {plan.precision}: {images}{already}, "
        f"taps {shapes}, {size_text(plan.bytes)} of {config.dtype} to {config.out}"
    )


def _batch_line(plan: ExtractionPlan, config: ExtractConfig) -> str:
    return (
        f"begun with -b {plan.begun_batch_size}: with -b {config.batch_size}, the rest may differ "
        f"from it in the last bits"
    )


def _run_of(taps: Any) -> str:
    """`z0…z12 (13)`; a name alone as it is."""
    return taps[0] if len(taps) == 1 else f"{taps[0]}…{taps[-1]} ({len(taps)})"


def training(progress: Progress, what: str = "training") -> Callable[[TrainRecord], None]:
    """Shows the records of `train`."""
    from pipeline import records

    def report(record: TrainRecord) -> None:
        match record:
            case records.Loading(rows=rows, total=total):
                progress.update("loading features", rows, total)
            case records.PassStarted():
                progress.note(_start_line(record))
            case records.EpochDone(epoch=epoch, epochs=epochs, metric=metric, score=score):
                scored = "" if score is None else f", val {metric} {score_text(metric, score)}"
                detail = f"loss {record.train_loss:.3f}{scored}"
                progress.update(what, epoch, epochs, detail)
            case records.MemberStopped(id=member, epoch=epoch, reason=reason, pruned=False):
                told = f"{reason} (epoch {epoch}); it stops, the others go on"
                progress.note(f"member {member}: {told}")

    return report


def _start_line(start: PassStarted) -> str:
    again = f", continuing after epoch {start.epochs_done}" if start.epochs_done else ""
    left_out = f" ({start.left_out:,} without any label left out)" if start.left_out else ""
    where = "on disk" if start.resident == "disk" else f"in {start.resident}"
    return (
        f"{counted(start.members, 'member')}, {start.parameters:,} parameters, "
        f"{start.train_rows:,} + {start.val_rows:,} rows{left_out} on {start.device}, "
        f"{start.precision}; features {where}, {size_text(start.bytes)}; "
        f"about {start.seconds_per_epoch:.2g} s an epoch{again}"
    )


def searching(progress: Progress) -> Callable[[SweepRecord], None]:
    """Shows the records of `sweep`, those of its passes among them."""
    from pipeline import records

    show_pass = training(progress)

    def report(record: SweepRecord) -> None:
        match record:
            case records.RoundStarted(round=number, rounds=rounds, members=members):
                told = f"{record.trials_done} of {record.trials} trials are done"
                progress.note(f"round {number} of {rounds}: {members} members; {told}")
            case records.TrialDone(state="failed", number=number, reason=reason):
                progress.note(f"trial {number + 1} failed: {reason}")
            case records.TrialDone() | records.MemberStopped():  # both are in the table below
                pass
            case _:
                show_pass(record)

    return report


def copying(progress: Progress) -> Report:
    """Shows the records of `copy`."""
    return lambda r: progress.update("copying", r.rows, r.total, f"{size_text(r.bytes)} written")


def verifying(progress: Progress) -> Report:
    """Shows the records of `verify`."""
    return lambda r: progress.update(
        "verifying", r.rows_done, r.rows, f"{size_text(r.bytes_done)} read"
    )


def evaluating(progress: Progress) -> Report:
    """Shows the records of `evaluate`."""
    from pipeline.evaluate import CacheChanged, Evaluated

    def report(record: Any) -> None:
        match record:
            case Evaluated(rows=rows, total=total):
                progress.update("evaluating", rows, total)
            case CacheChanged(features=features, labelling=labelling):
                told = ["features"] * features + ["labels, splits or rows"] * labelling
                progress.note(f"the cache's {' and '.join(told)} have changed since the training")

    return report


def predicting(progress: Progress) -> Callable[[int, int], None]:
    """Shows how many photographs are done, of how many."""
    return lambda done, total: progress.update("predicting", done, total)
