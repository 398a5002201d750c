"""Stage two: train the members of one pass from the cache alone. No backbone is loaded.

All members see the same batches and nothing else is shared (see `members.py`), so a member trained
among others is the member trained alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cache import Reader
from pipeline import __version__
from pipeline.batches import (
    Batch,
    Batches,
    choose_resident,
    feature_spec,
    initial_weights,
    labelled_rows,
    make_task,
)
from pipeline.checkpoint import CARD_VERSION, Run, environment, member_id, position_of
from pipeline.config import Member, TrainConfig
from pipeline.device import name_of, pick_device, pick_precision, precision_name
from pipeline.errors import RunError
from pipeline.members import Stack, make_stacks, method_settings, score
from pipeline.metrics import SCORES, Scores, Task, rank
from pipeline.optim import learning_rate
from pipeline.tensorboard import Events
from pipeline.workers import Workers

CHECKPOINT_SECONDS = 30.0  # at least this long between checkpoints,
CHECKPOINT_SHARE = 0.05  # and no more than this share of the time spent on writing them
TIMED_STEPS = 8  # after as many to warm up, before the pass says how long an epoch takes


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Reported while operands are computed and made resident."""

    rows: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Start:
    """Reported once, after the first timed steps: where the features live and the pace.

    `left_out` counts rows that have no label for any target. `epochs_done` is above zero if a
    killed run goes on.
    """

    members: int
    parameters: int
    train_rows: int
    val_rows: int
    left_out: int
    resident: str
    bytes: int
    device: str
    precision: str
    seconds_per_epoch: float
    epochs_done: int
    epochs: int


@dataclass(frozen=True, kw_only=True)
class EpochDone:
    """Reported after each epoch: the lowest training loss of its members, and the best validation
    score so far, called `metric`, of those members that learn the first member's task."""

    epoch: int
    epochs: int
    members: int
    train_loss: float
    metric: str
    score: float | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class MemberStopped:
    """Reported when a member leaves before its last epoch; the others go on."""

    id: str
    epoch: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class MemberResult:
    """One trained member: all its settings, its last epoch's validation scores.

    `scores` holds `val_<name>` for the task's scores and the loss, None where nothing was
    validated; `metric` names the one that ranks.
    """

    id: str
    method: str
    settings: dict[str, Any]
    parameters: int
    metric: str
    scores: dict[str, float | None]
    stopped: str | None = None

    @property
    def score(self) -> float | None:
        """The validation score that ranks."""
        return self.scores[self.metric]

    @property
    def rank(self) -> tuple[bool, float, float]:
        """Sorts members of one task, best first."""
        return rank(self.score, self.scores["val_loss"], stopped=bool(self.stopped))

    def to_dict(self) -> dict[str, Any]:
        """As `train --json` shows it: the scores beside the rest."""
        values = dict(vars(self))
        return {**values, **values.pop("scores")}


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
Judge = Callable[[int, Mapping[str, float | None]], Collection[str]]


def train(
    config: TrainConfig, report: Report = lambda _: None, judge: Judge | None = None
) -> TrainResult:
    """Train every member of `config` and leave a run directory.

    The same call again continues a killed run from its last checkpoint to the same result, and
    does nothing if the run is finished. The last epoch's weights are kept; validation chooses
    among members, never among epochs.

    After each epoch `judge(epoch, scores)` sees the validation score of each member that is still
    learning and returns the ids of those to stop.

    Raises cache errors for the cache, RunError for the run directory, SettingError, MissingTaps,
    DeviceError. Leaves a checkpoint behind on KeyboardInterrupt.
    """
    begin = time.perf_counter()
    device = pick_device(config.device)
    dtype = pick_precision(device, config.amp)
    with Reader(config.cache) as reader:
        config = replace(config, members=tuple(_resolved(m, reader) for m in config.members))
        names = list(dict.fromkeys(member.task for member in config.members))
        train_rows = labelled_rows(reader, config.train_split, names)
        val_rows = labelled_rows(reader, config.val_split, names)
        tasks = {name: make_task(reader.target(name), train_rows) for name in names}
        spec = feature_spec(reader, 1, config.taps)
        stacks = make_stacks(config.members, spec, tasks, device, initial_weights(reader))
        run = Run(config.out)
        facts = {
            **environment(),
            "fingerprint": reader.fingerprint,
            "device": name_of(device),
            "precision": precision_name(dtype),
        }
        checkpoint = run.begin(config, facts)
        if run.finished:
            return _finished(run, config, tasks)
        networks = [stack.network for stack in stacks]
        batches = Batches(reader, train_rows, networks, device=device, dtype=dtype)
        held_out = Batches(reader, val_rows, networks, device=device, dtype=dtype)
        resident = _make_resident(config, device, batches, held_out, report)
        start = {
            "train_rows": len(train_rows),
            "val_rows": len(val_rows),
            "left_out": train_rows.left_out + val_rows.left_out,
            "resident": resident,
            "bytes": batches.nbytes + held_out.nbytes,
            "device": facts["device"],
            "precision": facts["precision"],
        }
        with Workers(len(stacks), device) as workers:
            trainer = _Pass(config, stacks, batches, held_out, run, workers, report, judge)
            trainer.begin, trainer.start, trainer.card = begin, start, _shared_card(reader)
            if checkpoint:
                trainer.restore(checkpoint)
            first = trainer.epochs_done
            trainer.run_epochs()
        members = trainer.results()
        run.finish([_row(result) for result in members], trainer.full_cost(reader))
    trained = trainer.epochs_done - first
    return TrainResult(
        run=str(run.path),
        seconds=time.perf_counter() - begin,
        images_per_second=len(train_rows) * trained / max(trainer.seconds, 1e-9),
        epochs_trained=trained,
        members=members,
    )


def _resolved(member: Member, reader: Reader) -> Member:
    """With every default written out."""
    settings = vars(method_settings(member))
    return replace(member, settings=settings, task=reader.target(member.task or None).name)


class _Pass:
    """The epochs of one pass over the cache: which members are still in it, and how they do."""

    begin: float  # of this call
    start: dict[str, Any]  # what `Start` tells beside the pace
    card: dict[str, Any]  # what all members' adapter_config.json say alike

    def __init__(
        self,
        config: TrainConfig,
        stacks: list[Stack],
        batches: Batches,
        held_out: Batches,
        run: Run,
        workers: Workers,
        report: Report,
        judge: Judge | None,
    ) -> None:
        self.config, self.run, self.workers = config, run, workers
        self.report, self.judge = report, judge
        self.batches, self.held_out = batches, held_out
        self.stacks = list(enumerate(stacks))  # with the place of their operands in a batch
        self.all_stacks = stacks
        self.epochs = max(member.epochs for member in config.members)
        self.steps = -(-len(batches) // config.batch_size)  # an epoch
        self.epochs_done = 0
        self.seconds = 0.0  # in training steps and validation of this call
        self.spent = {"seconds": 0.0, "bytes_read": 0}  # by earlier calls
        self.saved, self.save_cost = time.perf_counter(), 0.0
        self.history: list[dict[str, Any]] = []
        self.scores: dict[int, Scores] = {}
        self.stopped: dict[int, str] = {}  # why, of members that left before their last epoch

    def restore(self, checkpoint: dict[str, Any]) -> None:
        self.spent = checkpoint["cost"]
        self.epochs_done = checkpoint["epochs_done"]
        self.stopped = checkpoint["stopped"]
        self.history = [m for m in checkpoint["history"] if m["epoch"] <= self.epochs_done]
        stacks = []
        for place, state in checkpoint["stacks"]:
            whole = self.all_stacks[place]
            stack = whole.without(set(whole.positions) - set(state["positions"]))
            assert stack is not None, "a checkpoint holds no empty stack"
            stack.begin_epoch(self.epochs_done, self.steps)
            stack.restore(state)
            stacks.append((place, stack))
        self.stacks = stacks
        for position, values in checkpoint["scores"].items():
            self.scores[position] = Scores(**values)

    def run_epochs(self) -> None:
        self.run.write_metrics(self.history)
        ids = [member_id(position) for position in range(len(self.config.members))]
        with Events(self.run.path, ids, self.epochs_done) as events:
            for epoch in range(self.epochs_done, self.epochs):
                if not self.stacks:
                    break
                begin = time.perf_counter()
                try:
                    self._train_epoch(epoch)
                    self._validate()
                except KeyboardInterrupt:
                    self._save_checkpoint()
                    raise
                lines = self._lines(epoch)
                self.seconds += time.perf_counter() - begin
                self.history += lines
                self.epochs_done = epoch + 1
                self.run.append_metrics(lines)
                events.add(lines)
                self._report_epoch(lines)
                self._stop_members()
                self._retire()

    def _train_epoch(self, epoch: int) -> None:
        generator = torch.Generator().manual_seed(self.config.order_seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.batches), generator=generator)
        stacks = self.stacks
        done = stacks[0][1].optimiser.steps - epoch * self.steps  # above 0 if a killed run goes on
        if done == 0:
            for _, stack in stacks:
                stack.begin_epoch(epoch, self.steps)
        clock = _Pace(self.steps - done, enabled=not self.seconds)
        size = self.config.batch_size
        for step, batch in enumerate(self.batches.epoch(size, order[done * size :])):

            def train_on(item: tuple[int, Stack], batch: Batch = batch) -> None:
                item[1].step(batch, item[0])

            self.workers.queue(train_on, stacks)
            pace = clock.tick(step)
            if pace is not None:
                self._report_start(pace)
            now = time.perf_counter()
            if now - self.saved >= max(CHECKPOINT_SECONDS, self.save_cost / CHECKPOINT_SHARE):
                self._save_checkpoint()
        self.workers.finish()

    def _report_start(self, seconds_per_epoch: float) -> None:
        self.report(
            Start(
                members=len(self.config.members),
                parameters=sum(s.parameters * len(s.members) for s in self.all_stacks),
                seconds_per_epoch=seconds_per_epoch,
                epochs_done=self.epochs_done,
                epochs=self.epochs,
                **self.start,
            )
        )

    def _validate(self) -> None:
        if not len(self.held_out):
            return
        networks = [(place, stack.network, stack.task) for place, stack in self.stacks]
        scores = score(networks, self.held_out, self.workers)
        for (_, stack), values in zip(self.stacks, scores, strict=True):
            self.scores.update(zip(stack.positions, values, strict=True))

    def _lines(self, epoch: int) -> list[dict[str, Any]]:
        lines: dict[int, dict[str, Any]] = {}
        for _, stack in self.stacks:
            of_stack = zip(stack.positions, stack.members, stack.train_loss, strict=True)
            for position, member, loss in of_stack:
                lines[position] = {
                    "epoch": epoch + 1,
                    "member": member_id(position),
                    "lr": learning_rate(member, epoch),
                    "train_loss": loss if np.isfinite(loss) else None,
                    **_columns(stack.task, self.scores.get(position)),
                }
        return [lines[position] for position in sorted(lines)]

    def _report_epoch(self, lines: list[dict[str, Any]]) -> None:
        task = self.all_stacks[0].task
        same = [p for p, member in enumerate(self.config.members) if member.task == task.name]
        scores = [self.scores[p].score for p in same if p in self.scores]
        losses = [line["train_loss"] for line in lines if line["train_loss"] is not None]
        self.report(
            EpochDone(
                epoch=self.epochs_done,
                epochs=self.epochs,
                members=len(lines),
                train_loss=min(losses) if losses else float("nan"),
                metric=task.metric,
                score=max(scores) if scores else None,
                seconds=self.seconds,
            )
        )

    def _stop_members(self) -> None:
        """Note who leaves before its last epoch: a loss that is not finite, or the judge."""
        for _, stack in self.stacks:
            for position, step in zip(stack.positions, stack.bad_step.tolist(), strict=True):
                if step >= 0:
                    self._stop(position, f"loss not finite at step {step}")
        if self.judge is None:
            return
        learning = {
            member_id(position): self.scores[position].score if position in self.scores else None
            for _, stack in self.stacks
            for position, member in zip(stack.positions, stack.members, strict=True)
            if position not in self.stopped and member.epochs > self.epochs_done
        }
        for name in self.judge(self.epochs_done, learning) if learning else ():
            self._stop(position_of(name), f"pruned after epoch {self.epochs_done}")

    def _stop(self, position: int, reason: str) -> None:
        self.stopped[position] = reason
        self.report(MemberStopped(id=member_id(position), epoch=self.epochs_done, reason=reason))

    def _retire(self) -> None:
        """Save the members that have ended and take them out of their stacks."""
        left = []
        for place, stack in self.stacks:
            ended = {
                position
                for position, member in zip(stack.positions, stack.members, strict=True)
                if position in self.stopped or member.epochs <= self.epochs_done
            }
            for position in ended:
                at = stack.positions.index(position)
                card = {
                    "method": stack.members[at].method,
                    "settings": vars(stack.settings),
                    "target": stack.task.to_dict(),
                    **self.card,
                }
                self.run.save_member(member_id(position), stack.network, at, card)
            rest = stack.without(ended)
            if rest is not None:
                left.append((place, rest))
        self.stacks = left

    def _save_checkpoint(self) -> None:
        """Unless an interrupt tore a step, or came between those of two stacks: then the last
        checkpoint stands."""
        self.workers.finish()
        stacks = [stack for _, stack in self.stacks]
        if len({stack.optimiser.steps for stack in stacks}) != 1 or not all(
            stack.whole for stack in stacks
        ):
            return
        begin = time.perf_counter()
        self.run.save_checkpoint(
            {
                "epochs_done": self.epochs_done,
                "history": self.history,
                "stopped": self.stopped,
                "scores": {position: vars(scores) for position, scores in self.scores.items()},
                "stacks": [(place, stack.state()) for place, stack in self.stacks],
                "cost": self.cost(),
            }
        )
        self.saved = time.perf_counter()
        self.save_cost = self.saved - begin

    def cost(self) -> dict[str, Any]:
        """Seconds of all calls so far, loading included, and bytes read from the cache."""
        read = self.batches.bytes_read + self.held_out.bytes_read
        return {
            "seconds": self.spent["seconds"] + time.perf_counter() - self.begin,
            "bytes_read": self.spent["bytes_read"] + read,
        }

    def full_cost(self, reader: Reader) -> dict[str, Any]:
        """What cost.json holds. A copied cache does not know how long its extraction took."""
        cost, members, rows = self.cost(), len(self.config.members), len(self.batches)
        copied = "copied" in reader.manifest.identity
        return {
            **cost,
            "rows": rows,
            "images_per_second": rows * self.epochs_done / cost["seconds"],
            "members": members,
            "seconds_per_member": cost["seconds"] / members,
            "cache_bytes": reader.manifest.nbytes,
            "extraction_seconds": None if copied else reader.seconds,
        }

    def results(self) -> list[MemberResult]:
        """One a member, in order."""
        results: dict[int, MemberResult] = {}
        for stack in self.all_stacks:
            for position, member in zip(stack.positions, stack.members, strict=True):
                results[position] = MemberResult(
                    id=member_id(position),
                    method=member.method,
                    settings=member.all_settings,
                    parameters=stack.parameters,
                    metric=f"val_{stack.task.metric}",
                    scores=_columns(stack.task, self.scores.get(position)),
                    stopped=self.stopped.get(position),
                )
        return [results[position] for position in sorted(results)]


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


def _make_resident(
    config: TrainConfig,
    device: torch.device,
    batches: Batches,
    held_out: Batches,
    report: Report,
) -> str:
    both = [part for part in (batches, held_out) if len(part)]
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


def _shared_card(reader: Reader) -> dict[str, Any]:
    identity = reader.manifest.identity
    return {
        "format_version": CARD_VERSION,
        "cache_fingerprint": reader.fingerprint,
        "backbone": identity["backbone"],
        "preprocessing": identity["preprocessing"],
        "precision": identity["precision"],
        "storage": reader.manifest.storage,
        "created_by": f"sidecache {__version__}",
    }


def _columns(task: Task, scores: Scores | None) -> dict[str, float | None]:
    """Validation scores as metrics.jsonl and summary.csv name them."""
    values = {} if scores is None else {**scores.values, "loss": scores.loss}
    return {f"val_{name}": values.get(name) for name in (*SCORES[task.kind], "loss")}


def _row(result: MemberResult) -> dict[str, Any]:
    """A line of summary.csv."""
    return {
        "id": result.id,
        "method": result.method,
        **result.settings,
        "parameters": result.parameters,
        **result.scores,
        "stopped": result.stopped,
    }


def _finished(run: Run, config: TrainConfig, tasks: Mapping[str, Task]) -> TrainResult:
    members = []
    for row, member in zip(run.summary(), config.members, strict=True):
        task = tasks[member.task]
        members.append(
            MemberResult(
                id=row["id"],
                method=row["method"],
                settings=member.all_settings,
                parameters=int(row["parameters"]),
                metric=f"val_{task.metric}",
                scores={n: float(row[n]) if row[n] else None for n in _columns(task, None)},
                stopped=row["stopped"] or None,
            )
        )
    if not members:
        raise RunError(f"{run.path}: summary.csv lists no member")
    return TrainResult(
        run=str(run.path), seconds=0.0, images_per_second=0.0, epochs_trained=0, members=members
    )
