"""Stage two: train the members of one pass from the cache alone. No backbone is loaded.

All members see the same batches and nothing else is shared (see `members.py`), so a member trained
among others is the member trained alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from cache import Reader
from pipeline.batches import (
    Batches,
    choose_resident,
    feature_spec,
    initial_weights,
    labelled_rows,
)
from pipeline.checkpoint import CARD_VERSION, Run, environment
from pipeline.config import Member, TrainConfig
from pipeline.device import name_of, pick_device, pick_precision, precision_name
from pipeline.errors import RunError
from pipeline.members import Stack, make_stacks, method_settings, score
from pipeline.metrics import Scores
from pipeline.optim import learning_rate
from pipeline.side import Settings

CHECKPOINT_SECONDS = 10.0  # at least this long between checkpoints; always at the end of an epoch
TIMED_STEPS = 8  # after as many to warm up, before the pass says how long an epoch takes


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Reported while operands are computed and made resident."""

    rows: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Start:
    """Reported once, after the first timed steps: where the features live and the pace.

    `epochs_done` is above zero if a killed run goes on.
    """

    members: int
    parameters: int
    train_rows: int
    val_rows: int
    resident: str
    bytes: int
    device: str
    precision: str
    seconds_per_epoch: float
    epochs_done: int
    epochs: int


@dataclass(frozen=True, kw_only=True)
class EpochDone:
    """Reported after each epoch: the best member's scores so far."""

    epoch: int
    epochs: int
    train_loss: float
    val_top1: float | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class MemberStopped:
    """Reported when a member's loss became NaN or infinite; the others go on."""

    id: str
    epoch: int
    step: int


@dataclass(frozen=True, kw_only=True)
class MemberResult:
    """One trained member: all its settings, its last epoch's validation scores."""

    id: str
    method: str
    settings: dict[str, Any]
    parameters: int
    val_top1: float | None
    val_loss: float | None
    stopped: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What `train` did. `images_per_second` counts each training row once an epoch, however many
    members learn from it; zero if the run was already finished."""

    run: str
    seconds: float
    images_per_second: float
    epochs_trained: int
    members: list[MemberResult]


Report = Callable[[Loading | Start | EpochDone | MemberStopped], None]


def train(config: TrainConfig, report: Report = lambda _: None) -> TrainResult:
    """Train every member of `config` and leave a run directory.

    The same call again continues a killed run from its last checkpoint to the same result, and
    does nothing if the run is finished. The last epoch's weights are kept; validation chooses
    among members, never among epochs. Raises cache errors for the cache, RunError for the run
    directory, SettingError, MissingTaps, DeviceError.
    """
    begin = time.perf_counter()
    resolved = (replace(m, settings=vars(method_settings(m))) for m in config.members)
    config = replace(config, members=tuple(resolved))
    device = pick_device(config.device)
    dtype = pick_precision(device, config.amp)
    with Reader(config.cache) as reader:
        train_rows, train_labels = labelled_rows(reader, config.train_split)
        val_rows, val_labels = labelled_rows(reader, config.val_split)
        spec = feature_spec(reader, len(reader.manifest.targets[0].classes), config.taps)
        stacks = make_stacks(config.members, spec, device, initial_weights(reader))
        run = Run(config.out)
        facts = {
            **environment(),
            "fingerprint": reader.fingerprint,
            "device": name_of(device),
            "precision": precision_name(dtype),
        }
        checkpoint = run.begin(config, facts)
        if run.finished:
            return _finished(run, config)
        networks = [stack.network for stack in stacks]
        arguments: dict[str, Any] = {"device": device, "dtype": dtype}
        batches = Batches(reader, train_rows, train_labels, networks, **arguments)
        held_out = (
            Batches(reader, val_rows, val_labels, networks, **arguments) if len(val_rows) else None
        )
        resident = _make_resident(config, device, batches, held_out, report)
        start = {
            "train_rows": len(train_rows),
            "val_rows": len(val_rows),
            "resident": resident,
            "bytes": batches.nbytes + (held_out.nbytes if held_out else 0),
            "device": facts["device"],
            "precision": facts["precision"],
        }
        trainer = _Pass(config, stacks, batches, held_out, run, report, start)
        if checkpoint:
            trainer.restore(checkpoint)
        first = trainer.epochs_done
        trainer.run_epochs()
        members = _save(run, config, stacks, trainer, reader)
    trained = trainer.epochs_done - first
    return TrainResult(
        run=str(run.path),
        seconds=time.perf_counter() - begin,
        images_per_second=len(train_rows) * trained / max(trainer.seconds, 1e-9),
        epochs_trained=trained,
        members=members,
    )


class _Pass:
    """The epochs of one pass over the cache. `start` is what `Start` tells beside the pace."""

    def __init__(
        self,
        config: TrainConfig,
        stacks: list[Stack],
        batches: Batches,
        held_out: Batches | None,
        run: Run,
        report: Report,
        start: dict[str, Any],
    ) -> None:
        self.config, self.stacks, self.run, self.report = config, stacks, run, report
        self.start = start
        self.batches, self.held_out = batches, held_out
        self.epochs = max(member.epochs for member in config.members)
        self.epochs_done = 0
        self.seconds = 0.0  # in training steps and validation of this call
        self.history: list[dict[str, Any]] = []
        self.scores: dict[int, Scores] = {}

    def restore(self, checkpoint: dict[str, Any]) -> None:
        self.epochs_done = checkpoint["epochs_done"]
        self.history = checkpoint["history"]
        for stack, state in zip(self.stacks, checkpoint["stacks"], strict=True):
            stack.restore(state)
        for line in self.history[-len(self.config.members) :]:
            if line["val_top1"] is not None:
                names = ("top1", "top5", "loss")
                values = {name: line[f"val_{name}"] for name in names}
                self.scores[int(line["member"][1:])] = Scores(**values, n=len(self.held_out or ()))

    def run_epochs(self) -> None:
        self.run.write_metrics(self.history)
        saved = time.perf_counter()
        for epoch in range(self.epochs_done, self.epochs):
            begin = time.perf_counter()
            known_bad = [stack.bad_step.tolist() for stack in self.stacks]
            self._train_epoch(epoch)
            self._validate()
            lines = self._lines(epoch)
            now = time.perf_counter()
            self.seconds += now - begin
            self.epochs_done = epoch + 1
            self.history += lines
            self.run.append_metrics(lines)
            self._report_epoch(epoch, lines, known_bad)
            if self.epochs_done < self.epochs and now - saved >= CHECKPOINT_SECONDS:
                self._save_checkpoint()
                saved = time.perf_counter()
        self._save_checkpoint()  # the members are still to be written

    def _train_epoch(self, epoch: int) -> None:
        steps = -(-len(self.batches) // self.config.batch_size)
        generator = torch.Generator().manual_seed(self.config.order_seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.batches), generator=generator)
        rates = [
            torch.tensor(
                [
                    [learning_rate(member, epoch + step / steps) for member in stack.members]
                    for step in range(steps)
                ],
                device=stack.optimiser.flat.device,
            )
            for stack in self.stacks
        ]
        streams = [stack.streams(epoch) for stack in self.stacks]
        for stack in self.stacks:
            stack.network.train()
            stack.loss_sum.zero_()
        clock = _Pace(steps, enabled=not self.seconds)
        for step, batch in enumerate(self.batches.epoch(self.config.batch_size, order)):
            for i, stack in enumerate(self.stacks):
                keep = stack.keep(len(batch.labels), streams[i])
                if keep is not None:
                    keep = keep.to(batch.labels.device)
                stack.step(batch, i, rates[i][step], keep, epoch * steps + step)
            pace = clock.tick(step)
            if pace is not None:
                self._report_start(pace)
        for stack in self.stacks:
            stack.loss_sum /= steps

    def _report_start(self, seconds_per_epoch: float) -> None:
        self.report(
            Start(
                members=len(self.config.members),
                parameters=sum(s.parameters * len(s.members) for s in self.stacks),
                seconds_per_epoch=seconds_per_epoch,
                epochs_done=self.epochs_done,
                epochs=self.epochs,
                **self.start,
            )
        )

    def _validate(self) -> None:
        if self.held_out is None:
            return
        scores = score([stack.network for stack in self.stacks], self.held_out)
        for stack, values in zip(self.stacks, scores, strict=True):
            self.scores.update(zip(stack.positions, values, strict=True))

    def _lines(self, epoch: int) -> list[dict[str, Any]]:
        lines: dict[int, dict[str, Any]] = {}
        for stack in self.stacks:
            losses = stack.loss_sum.tolist()
            for position, member, loss in zip(stack.positions, stack.members, losses, strict=True):
                scores = self.scores.get(position)
                lines[position] = {
                    "epoch": epoch + 1,
                    "member": member_id(position),
                    "lr": learning_rate(member, epoch),
                    "train_loss": loss if np.isfinite(loss) else None,
                    "val_loss": scores.loss if scores else None,
                    "val_top1": scores.top1 if scores else None,
                    "val_top5": scores.top5 if scores else None,
                }
        return [lines[position] for position in sorted(lines)]

    def _report_epoch(
        self, epoch: int, lines: list[dict[str, Any]], known_bad: list[list[int]]
    ) -> None:
        for stack, before in zip(self.stacks, known_bad, strict=True):
            for position, old, new in zip(
                stack.positions, before, stack.bad_step.tolist(), strict=True
            ):
                if old < 0 <= new:
                    self.report(MemberStopped(id=member_id(position), epoch=epoch + 1, step=new))
        losses = [line["train_loss"] for line in lines if line["train_loss"] is not None]
        top1 = [line["val_top1"] for line in lines if line["val_top1"] is not None]
        self.report(
            EpochDone(
                epoch=epoch + 1,
                epochs=self.epochs,
                train_loss=min(losses) if losses else float("nan"),
                val_top1=max(top1) if top1 else None,
                seconds=self.seconds,
            )
        )

    def _save_checkpoint(self) -> None:
        self.run.save_checkpoint(
            {
                "epochs_done": self.epochs_done,
                "history": self.history,
                "stacks": [stack.state() for stack in self.stacks],
            }
        )


class _Pace:
    """Times a few steps after warm-up and says once how long an epoch will take."""

    def __init__(self, steps: int, *, enabled: bool) -> None:
        self.steps, self.enabled = steps, enabled
        self.first = min(TIMED_STEPS, steps // 2)
        self.last = min(2 * TIMED_STEPS, steps) - 1
        self.begin = time.perf_counter()

    def tick(self, step: int) -> float | None:
        if not self.enabled:
            return None
        if step + 1 == self.first:
            self.begin = time.perf_counter()
        if step == self.last:
            timed = self.last + 1 - self.first
            return (time.perf_counter() - self.begin) / timed * self.steps
        return None


def member_id(position: int) -> str:
    """Short and stable: m0, m1, …; the settings stand in the files beside it."""
    return f"m{position}"


def _make_resident(
    config: TrainConfig,
    device: torch.device,
    batches: Batches,
    held_out: Batches | None,
    report: Report,
) -> str:
    both = [part for part in (batches, held_out) if part is not None]
    resident = choose_resident(config.resident, sum(part.nbytes for part in both), device)
    if resident == "disk":
        return resident
    total, before = sum(len(part) for part in both), 0
    place = device if resident == "device" else torch.device("cpu")
    for part in both:

        def loaded(rows: int, before: int = before) -> None:
            report(Loading(rows=before + rows, total=total))

        part.load(place, loaded)
        before += len(part)
    return resident


def _save(
    run: Run, config: TrainConfig, stacks: list[Stack], trainer: _Pass, reader: Reader
) -> list[MemberResult]:
    manifest = reader.manifest
    shared = {
        "format_version": CARD_VERSION,
        "classes": list(manifest.targets[0].classes),
        "cache_fingerprint": reader.fingerprint,
        "backbone": manifest.identity["backbone"],
        "preprocessing": manifest.identity["preprocessing"],
        "precision": manifest.identity["precision"],
        "storage": manifest.storage,
        "created_by": f"sidecache {version('sidecache')}",
    }
    results: dict[int, MemberResult] = {}
    for stack in stacks:
        bad = stack.bad_step.tolist()
        for place, (position, member) in enumerate(
            zip(stack.positions, stack.members, strict=True)
        ):
            card = {"method": member.method, "settings": vars(stack.settings), **shared}
            run.save_member(member_id(position), stack.network, place, card)
            scores = trainer.scores.get(position)
            results[position] = MemberResult(
                id=member_id(position),
                method=member.method,
                settings=_all_settings(member, stack.settings),
                parameters=stack.parameters,
                val_top1=scores.top1 if scores else None,
                val_loss=scores.loss if scores else None,
                stopped=f"loss not finite at step {bad[place]}" if bad[place] >= 0 else None,
            )
    ordered = [results[position] for position in sorted(results)]
    run.finish(
        [
            {
                "id": r.id,
                "method": r.method,
                **r.settings,
                "parameters": r.parameters,
                "val_top1": r.val_top1,
                "val_loss": r.val_loss,
                "stopped": r.stopped,
            }
            for r in ordered
        ]
    )
    return ordered


def _all_settings(member: Member, settings: Settings) -> dict[str, Any]:
    """Shape and learning settings in one flat dict, as summary.csv and `--json` show them."""
    learning = {k: v for k, v in vars(member).items() if k not in ("method", "settings")}
    return {**vars(settings), **learning}


def _finished(run: Run, config: TrainConfig) -> TrainResult:
    members = []
    for row, member in zip(run.summary(), config.members, strict=True):
        members.append(
            MemberResult(
                id=row["id"],
                method=row["method"],
                settings=_all_settings(member, method_settings(member)),
                parameters=int(row["parameters"]),
                val_top1=float(row["val_top1"]) if row["val_top1"] else None,
                val_loss=float(row["val_loss"]) if row["val_loss"] else None,
                stopped=row["stopped"] or None,
            )
        )
    if not members:
        raise RunError(f"{run.path}: summary.csv lists no member")
    return TrainResult(
        run=str(run.path), seconds=0.0, images_per_second=0.0, epochs_trained=0, members=members
    )
