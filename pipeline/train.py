"""Stage two: train the members of one pass from the cache alone. No backbone is loaded.

All members see the same batches and nothing else is shared (see `members.py`), so a member trained
among others is the member trained alone. How members are stacked depends on the device and its
memory; what is saved of a member does not, so that a run goes on anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cache import Reader
from pipeline import __version__
from pipeline.config import Member, TrainConfig
from pipeline.device import (
    memory_explained,
    name_of,
    pick_device,
    pick_precision,
    precision_name,
    without_tf32,
)
from pipeline.errors import RunError
from pipeline.features.labelled import (
    LabelledRows,
    feature_spec,
    initial_weights,
    labelled_rows,
)
from pipeline.features.operands import Batch, Batches
from pipeline.features.residence import choose_resident
from pipeline.records import (
    EpochDone,
    Loading,
    MemberResult,
    MemberStopped,
    PassStarted,
    TrainRecord,
    TrainResult,
    finite,
)
from pipeline.runs.events import Events
from pipeline.runs.run import (
    CARD_VERSION,
    CHECKPOINT,
    Run,
    environment,
    member_id,
    number_of,
    position_of,
)
from pipeline.tasks import Scores, Task, task_of
from pipeline.training.members import Stack, make_stacks, method_settings, score, step_bytes
from pipeline.training.optim import learning_rate
from pipeline.training.workers import Workers

CHECKPOINT_SECONDS = 30.0  # at least this long between checkpoints,
CHECKPOINT_SHARE = 0.05  # and no more than this share of the time spent on writing them
STEP_SHARE = 0.5  # of a GPU's free memory may go into a step, that features have some
SMALLER = (
    "--resident ram or disk keeps the features out of it; a smaller --batch-size, or fewer members "
    "in one pass, make a step smaller"
)
TIMED_STEPS = 8  # after as many to warm up, before the pass says how long an epoch takes


Report = Callable[[TrainRecord], None]
Judge = Callable[[int, Mapping[str, float | None]], Collection[str]]


@without_tf32()
def train(
    config: TrainConfig, report: Report = lambda _: None, judge: Judge | None = None
) -> TrainResult:
    """Train every member of `config` and leave a run directory.

    The same call again continues a killed run from its last checkpoint to the same result, and
    does nothing if the run is finished. The last epoch's weights are kept; validation chooses
    among members, never among epochs.

    After each epoch `judge(epoch, scores)` sees the validation score of each member that is still
    learning and returns the ids of those to stop. It may be asked about an epoch twice, if a run
    is interrupted just then.

    Raises cache errors for the cache, RunError for the run directory, SettingError, MissingTaps,
    DeviceError, also for a GPU whose memory is full. Leaves a checkpoint behind on
    KeyboardInterrupt.
    """
    begin = time.perf_counter()
    device, run = pick_device(config.device), Run(config.out)
    dtype = pick_precision(device, run.amp(config))
    with Reader(config.cache) as reader, memory_explained(SMALLER), run:
        config = replace(config, members=tuple(_resolved(m, reader) for m in config.members))
        names = list(dict.fromkeys(member.task for member in config.members))
        train_rows = labelled_rows(reader, config.train_split, names)
        val_rows = labelled_rows(reader, config.val_split, names)
        tasks = {
            name: task_of(reader.target(name)).fitted(train_rows.labels[name]) for name in names
        }
        learning = _assemble(config, reader, tasks, train_rows, val_rows, device, dtype)
        facts = {
            **environment(),
            "fingerprint": reader.fingerprint,
            "labelling": reader.labelling_digest,
            "device": name_of(device),
            "precision": precision_name(dtype),
            "tf32": False,  # see `without_tf32`
        }
        checkpoint = run.begin(config, facts)
        if run.finished:
            return _finished(run, config, tasks)
        resident = _make_resident(config, device, learning, report)
        batches, held_out = learning.batches, learning.held_out
        start = {
            "train_rows": len(train_rows),
            "val_rows": len(val_rows),
            "left_out": train_rows.left_out + val_rows.left_out,
            "resident": resident,
            "bytes": batches.nbytes + held_out.nbytes,
            "device": facts["device"],
            "precision": facts["precision"],
        }
        with Workers(len(learning.stacks), device) as workers:
            trainer = _Pass(config, learning, run, workers, report, judge, begin=begin,
                            start=start, card=_shared_card(reader))  # fmt: skip
            if checkpoint:
                trainer.restore(checkpoint)
            first = trainer.done.epochs
            trainer.run_epochs()
        members = trainer.results()
        run.finish([_row(result) for result in members], trainer.full_cost(reader))
    trained = trainer.done.epochs - first
    return TrainResult(
        run=str(run.path),
        seconds=time.perf_counter() - begin,
        images_per_second=len(train_rows) * trained / max(trainer.seconds, 1e-9),
        epochs_trained=trained,
        members=members,
    )


@dataclass
class _Learning:
    """The members of a pass, stacked, and what they learn from. A stack that has ended leaves it,
    and with it the memory."""

    stacks: list[tuple[int, Stack]]  # with the number of its operands in a batch
    batches: Batches
    held_out: Batches
    step_bytes: int  # of a GPU's memory that training takes beside members and features


def _assemble(
    config: TrainConfig,
    reader: Reader,
    tasks: Mapping[str, Task],
    train_rows: LabelledRows,
    val_rows: LabelledRows,
    device: torch.device,
    dtype: torch.dtype,
) -> _Learning:
    """Members in stacks as large as a GPU's memory allows: a step takes no more than STEP_SHARE of
    what is free, unless a single member does."""
    spec, initial = feature_spec(reader, 1, config.taps), initial_weights(reader)
    at_once = len(config.members)

    def stacked() -> _Learning | None:
        stacks = make_stacks(config.members, spec, tasks, device, initial, at_once=at_once)
        networks = [stack.network for stack in stacks]
        batches = Batches(reader, train_rows, networks, device=device, dtype=dtype)
        held_out = Batches(reader, val_rows, networks, device=device, dtype=dtype)
        try:
            needed = step_bytes(stacks, batches, held_out, config.batch_size)
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
            return None
        if needed and at_once > 1 and needed > STEP_SHARE * torch.cuda.mem_get_info(device)[0]:
            return None
        return _Learning(list(enumerate(stacks)), batches, held_out, needed)

    while (learning := stacked()) is None:  # what did not fit is gone by then
        at_once //= 2
    return learning


def _resolved(member: Member, reader: Reader) -> Member:
    """With every default written out."""
    settings = vars(method_settings(member))
    return replace(member, settings=settings, task=reader.target(member.task or None).name)


@dataclass(frozen=True, kw_only=True)
class _Done:
    """What is behind a pass: replaced as a whole after each epoch, so that an interrupt finds an
    epoch done or not done."""

    epochs: int = 0
    history: tuple[dict[str, Any], ...] = ()  # the lines of metrics.jsonl
    stopped: Mapping[int, str] = field(default_factory=dict)  # why, of members that left early


class _Pass:
    """The epochs of one pass over the cache: which members are still in it, and how they do."""

    def __init__(
        self,
        config: TrainConfig,
        learning: _Learning,
        run: Run,
        workers: Workers,
        report: Report,
        judge: Judge | None,
        *,
        begin: float,  # of this call
        start: Mapping[str, Any],  # what `PassStarted` tells beside the pace
        card: Mapping[str, Any],  # what all members' adapter_config.json say alike
    ) -> None:
        self.config, self.run, self.workers = config, run, workers
        self.report, self.judge = report, judge
        self.begin, self.start, self.card = begin, start, card
        self.learning = learning
        self.batches, self.held_out = learning.batches, learning.held_out
        self.known = {  # of every member, also when it has left
            position: (stack.task, stack.parameters)
            for _, stack in learning.stacks
            for position in stack.positions
        }
        self.epochs = max(member.epochs for member in config.members)
        self.steps = -(-len(self.batches) // config.batch_size)  # an epoch
        self.done = _Done()
        self.seconds = 0.0  # in training steps and validation of this call
        self.spent = {"seconds": 0.0, "bytes_read": 0}  # by earlier calls
        self.saved, self.save_cost = time.perf_counter(), 0.0
        self.scores: dict[int, Scores] = {}

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Go on where a checkpoint was taken: within an epoch or at its end, on any device.

        Raises RunError for a checkpoint of an earlier version.
        """
        if "members" not in checkpoint:
            raise RunError(
                f"{self.run.path}: its {CHECKPOINT} was written by an earlier version of this "
                f"program, which cannot be continued. Delete that file, and the same command "
                f"trains from the first epoch."
            )
        members, epochs = checkpoint["members"], checkpoint["epochs_done"]
        history = tuple(checkpoint["history"])
        self.done = _Done(epochs=epochs, history=history, stopped=checkpoint["stopped"])
        self.spent = checkpoint["cost"]
        for position, values in checkpoint["scores"].items():
            self.scores[position] = Scores(**values)
        self._leave(set(self.known) - set(members))
        for _, stack in self.learning.stacks:
            stack.begin_epoch(epochs, self.steps)
            stack.restore(members)
        self._retire()  # an interrupt may have come just before

    def run_epochs(self) -> None:
        self.run.write_metrics(self.done.history)
        ids = [member_id(position) for position in range(len(self.config.members))]
        with Events(self.run.path, ids, self.done.epochs) as events:
            for epoch in range(self.done.epochs, self.epochs):
                if not self.learning.stacks:
                    break
                try:
                    self._run_epoch(epoch, events)
                except KeyboardInterrupt:
                    self._save_checkpoint()
                    raise

    def _run_epoch(self, epoch: int, events: Events) -> None:
        """Train, validate, tell, and let members go.

        An interrupt may come anywhere. What is before `self.done` is replaced is then done again
        from the checkpoint, where it changes nothing; `restore` makes up for the rest.
        """
        begin = time.perf_counter()
        self._train_epoch(epoch)
        self._validate()
        lines = self._lines(epoch)
        diverged = self._diverged()
        pruned = self._pruned(epoch + 1, diverged.keys())
        stopped = {**self.done.stopped, **diverged, **pruned}
        self.seconds += time.perf_counter() - begin
        self.run.append_metrics(lines)
        events.add(lines)
        before, history = self.done, (*self.done.history, *lines)
        self.done = _Done(epochs=epoch + 1, history=history, stopped=stopped)
        self._report_epoch(lines)
        for position in sorted(stopped.keys() - before.stopped.keys()):
            self.report(
                MemberStopped(
                    id=member_id(position),
                    epoch=epoch + 1,
                    reason=stopped[position],
                    pruned=position in pruned,
                )
            )
        self._retire()

    def _train_epoch(self, epoch: int) -> None:
        generator = torch.Generator().manual_seed(self.config.order_seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.batches), generator=generator)
        stacks = self.learning.stacks
        done = stacks[0][1].optimiser.steps - epoch * self.steps  # above 0 if a killed run goes on
        if done == 0:
            for _, stack in stacks:
                stack.begin_epoch(epoch, self.steps)
        clock = _Pace(self.steps - done, self.batches.device, enabled=not self.seconds)
        size = self.config.batch_size
        for step, batch in enumerate(self.batches.epoch(size, order[done * size :])):

            def train_on(item: tuple[int, Stack], batch: Batch = batch) -> None:
                item[1].step(batch, item[0])

            try:
                self.workers.queue(train_on, stacks)
            except KeyboardInterrupt:  # between the steps of two stacks: the others take theirs
                self.workers.finish()
                most = max(stack.optimiser.steps for _, stack in stacks)
                for item in stacks:
                    if item[1].whole and item[1].optimiser.steps < most:
                        train_on(item)
                raise
            pace = clock.tick(step)
            if pace is not None:
                self._report_start(pace)
            now = time.perf_counter()
            if now - self.saved >= max(CHECKPOINT_SECONDS, self.save_cost / CHECKPOINT_SHARE):
                self._save_checkpoint()
        self.workers.finish()

    def _report_start(self, seconds_per_epoch: float) -> None:
        self.report(
            PassStarted(
                members=len(self.config.members),
                parameters=sum(parameters for _, parameters in self.known.values()),
                seconds_per_epoch=seconds_per_epoch,
                epochs_done=self.done.epochs,
                epochs=self.epochs,
                **self.start,
            )
        )

    def _validate(self) -> None:
        if not len(self.held_out):
            return
        stacks = self.learning.stacks
        networks = [(place, stack.network, stack.task) for place, stack in stacks]
        scores = score(networks, self.held_out, self.workers)
        for (_, stack), values in zip(stacks, scores, strict=True):
            self.scores.update(zip(stack.positions, values, strict=True))

    def _lines(self, epoch: int) -> list[dict[str, Any]]:
        lines: dict[int, dict[str, Any]] = {}
        for _, stack in self.learning.stacks:
            of_stack = zip(stack.positions, stack.members, stack.train_loss, strict=True)
            for position, member, loss in of_stack:
                lines[position] = {
                    "epoch": epoch + 1,
                    "member": member_id(position),
                    "lr": learning_rate(member, epoch),
                    "train_loss": finite(loss),
                    **_columns(stack.task, self.scores.get(position)),
                }
        return [lines[position] for position in sorted(lines)]

    def _report_epoch(self, lines: Sequence[dict[str, Any]]) -> None:
        task, _ = self.known[0]
        same = [p for p, member in enumerate(self.config.members) if member.task == task.name]
        known = [self.scores[p].score for p in same if p in self.scores]
        scores = [score for score in known if score is not None]
        losses = [line["train_loss"] for line in lines if line["train_loss"] is not None]
        self.report(
            EpochDone(
                epoch=self.done.epochs,
                epochs=self.epochs,
                members=len(lines),
                train_loss=min(losses) if losses else float("nan"),
                metric=task.metric,
                score=max(scores) if scores else None,
                seconds=self.seconds,
            )
        )

    def _diverged(self) -> dict[int, str]:
        """Who had a loss that is not finite, and at which step."""
        found: dict[int, str] = {}
        for _, stack in self.learning.stacks:
            for position, step in zip(stack.positions, stack.bad_step.tolist(), strict=True):
                if step >= 0:
                    found[position] = f"loss not finite at step {step}"
        return found

    def _pruned(self, epochs: int, diverged: Collection[int]) -> dict[int, str]:
        """Whom the judge stops after so many epochs, of those that would go on."""
        learning = {
            member_id(position): None if known is None else known.score
            for _, stack in self.learning.stacks
            for position, member in zip(stack.positions, stack.members, strict=True)
            if position not in diverged and member.epochs > epochs
            for known in [self.scores.get(position)]
        }
        if self.judge is None or not learning:
            return {}
        reason = f"pruned after epoch {epochs}"
        return {position_of(name): reason for name in self.judge(epochs, learning)}

    def _retire(self) -> None:
        """Save the members that have ended and let them go."""
        ended = set()
        for _, stack in self.learning.stacks:
            for place, (position, member) in enumerate(
                zip(stack.positions, stack.members, strict=True)
            ):
                if position not in self.done.stopped and member.epochs > self.done.epochs:
                    continue
                card = {
                    "method": member.method,
                    "settings": vars(stack.settings),
                    "target": stack.task.to_dict(),
                    **self.card,
                }
                self.run.save_member(member_id(position), stack.network, place, card)
                ended.add(position)
        self._leave(ended)

    def _leave(self, positions: set[int]) -> None:
        """Go on without these members: what only they needed is computed, read and kept no more."""
        if not positions:
            return
        learning = self.learning
        rests = [(place, stack.without(positions)) for place, stack in learning.stacks]
        learning.stacks = [(place, rest) for place, rest in rests if rest is not None]
        networks = {place: stack.network for place, stack in learning.stacks}
        for part in (learning.batches, learning.held_out):
            part.narrow(networks)

    def _save_checkpoint(self) -> None:
        """Unless an interrupt tore a step: then the last checkpoint stands."""
        self.workers.finish()
        stacks = [stack for _, stack in self.learning.stacks]
        if len({stack.optimiser.steps for stack in stacks}) != 1 or not all(
            stack.whole for stack in stacks
        ):
            return
        begin, done = time.perf_counter(), self.done
        members = {
            position: state for stack in stacks for position, state in stack.states().items()
        }
        self.run.save_checkpoint(
            {
                "epochs_done": done.epochs,
                "history": list(done.history),
                "stopped": dict(done.stopped),
                "scores": {position: vars(scores) for position, scores in self.scores.items()},
                "members": members,
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
        copied = "copied_from" in reader.manifest.notes
        return {
            **cost,
            "rows": rows,
            "images_per_second": rows * self.done.epochs / cost["seconds"],
            "members": members,
            "seconds_per_member": cost["seconds"] / members,
            "cache_bytes": reader.manifest.nbytes,
            "extraction_seconds": None if copied else reader.seconds,
        }

    def results(self) -> list[MemberResult]:
        """One a member, in order."""
        results = []
        for position, member in enumerate(self.config.members):
            task, parameters = self.known[position]
            results.append(
                MemberResult(
                    id=member_id(position),
                    method=member.method,
                    settings=member.all_settings,
                    parameters=parameters,
                    metric=f"val_{task.metric}",
                    scores=_columns(task, self.scores.get(position)),
                    stopped=self.done.stopped.get(position),
                )
            )
        return results


class _Pace:
    """Times a few steps after warm-up and says once how long an epoch will take."""

    def __init__(self, steps: int, device: torch.device, *, enabled: bool) -> None:
        self.steps, self.device, self.enabled = steps, device, enabled
        self.first = min(TIMED_STEPS, steps // 2)
        self.last = min(2 * TIMED_STEPS, steps) - 1
        self.begin = time.perf_counter()

    def tick(self, step: int) -> float | None:
        if not self.enabled:
            return None
        if step + 1 == self.first:
            self.begin = self._now()
        if step == self.last:
            timed = self.last + 1 - self.first
            return (self._now() - self.begin) / timed * self.steps
        return None

    def _now(self) -> float:
        if self.device.type == "cuda":  # twice a run; else it would time how fast work is handed on
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _make_resident(
    config: TrainConfig, device: torch.device, learning: _Learning, report: Report
) -> str:
    both = [part for part in (learning.batches, learning.held_out) if len(part)]
    nbytes = sum(part.nbytes for part in both)
    resident = choose_resident(config.resident, nbytes, device, learning.step_bytes)
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
    return {f"val_{name}": values.get(name) for name in (*task.scores, "loss")}


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
    for row in run.summary():
        member = config.members[position_of(row["id"])]
        task = tasks[member.task]
        members.append(
            MemberResult(
                id=row["id"],
                method=row["method"],
                settings=member.all_settings,
                parameters=int(row["parameters"]),
                metric=f"val_{task.metric}",
                scores={n: number_of(row[n]) for n in _columns(task, None)},
                stopped=row["stopped"] or None,
            )
        )
    if not members:
        raise RunError(f"{run.path}: summary.csv lists no member")
    return TrainResult(
        run=str(run.path), seconds=0.0, images_per_second=0.0, epochs_trained=0, members=members
    )
