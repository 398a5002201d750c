"""Stage two: train the members of one pass from the cache alone. No backbone is loaded.

`pipeline/training/` holds what is done; here it is put together: the cache is opened, the run's
folder begun or found, and what was found there goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cache import Reader
from pipeline.config import Member, Question, TrainConfig
from pipeline.device import (
    memory_explained,
    name_of,
    pick_device,
    pick_precision,
    precision_name,
    without_tf32,
)
from pipeline.features.labelled import (
    LabelledRows,
    feature_spec,
    folded_rows,
    initial_weights,
    labelled_rows,
)
from pipeline.features.operands import Batches
from pipeline.records import PassStarted, RefitResult, TrainRecord, TrainResult, without_seed
from pipeline.runs.run import Run, environment
from pipeline.search.winners import refit_config, winners
from pipeline.setting import varying
from pipeline.side.contract import SideNetwork
from pipeline.tasks import Task, task_of
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.cost import Cost
from pipeline.training.history import History, summary_row
from pipeline.training.learners import Learners, assemble
from pipeline.training.members import method_settings
from pipeline.training.passes import Judge, Pass
from pipeline.training.saver import Saver
from pipeline.training.workers import Workers

SMALLER = (
    "--resident ram or disk keeps the features out of it; a smaller --batch-size, or fewer members "
    "in one pass, make a step smaller"
)

Report = Callable[[TrainRecord], None]


@without_tf32()
def train(
    config: TrainConfig, report: Report = lambda _: None, judge: Judge | None = None
) -> TrainResult:
    """Train every member of `config` and leave a run directory.

    The same call again continues a killed run from its last checkpoint to the same result, and
    does nothing if the run is finished. The last epoch's weights are kept; validation chooses
    among members, never among epochs. `judge` may stop members between epochs (see `Judge`).

    Raises cache errors for the cache, RunError for the run directory, SettingError, MissingTaps,
    DeviceError, also for a GPU whose memory is full. Leaves a checkpoint behind on
    KeyboardInterrupt.
    """
    begin = time.perf_counter()
    device, run = pick_device(config.device), Run(config.out)
    dtype = pick_precision(device, run.amp(config))
    with Reader(config.cache) as reader, memory_explained(SMALLER), run:
        config = replace(config, members=tuple(_resolved(m, reader) for m in config.members))
        learners, left_out = _learners(config, reader, device, dtype)
        facts = _facts(reader, device, dtype)
        checkpoint = Checkpoint.of(run, run.begin(config, facts))
        history = History(config.members, learners.cohorts.values(), checkpoint)
        if run.finished:
            return TrainResult(run=str(run.path), members=history.read_results(run))
        cost = Cost(begin, learners, checkpoint)
        resident = learners.load(config.resident, report)
        start = _start(learners, history, left_out=left_out, resident=resident,
                       device=facts["device"], precision=facts["precision"])  # fmt: skip
        saver = Saver(run, history, cost, _card(reader))
        with Workers(len(learners.cohorts), device) as workers, saver:
            if checkpoint is not None:
                learners.restore(checkpoint.members, checkpoint.epochs_done)
            training = Pass(learners, history, saver, workers, order_seed=config.order_seed,
                            start=start, report=report, judge=judge)  # fmt: skip
            training.run()
        members = history.results()
        spent = cost.whole(members=len(members), epochs=history.done.epochs)
        run.finish(list(map(summary_row, members)), {**spent, **_cost_of_cache(reader)})
    epochs = training.epochs_trained
    return TrainResult(
        run=str(run.path),
        seconds=time.perf_counter() - begin,
        images_per_second=len(learners.batches) * epochs / max(training.seconds, 1e-9),
        epochs_trained=epochs,
        members=members,
    )


def refit(
    out: str | Path,
    seeds: Sequence[int],
    report: Report = lambda _: None,
    *,
    overwrite: bool = False,
) -> RefitResult:
    """Train the best setting of each task of a run again with `seeds`, on train and val.

    As `train` it goes on after a kill, and is done once. Keeps other processes from writing the run
    meanwhile. Raises as `winners`, `refit_config` and `train` do.
    """
    with Run(out) as run:
        run.hold()
        winning = winners(run)
        config = replace(refit_config(run, seeds, winning), overwrite=overwrite)
        result = train(config, report)
        return RefitResult(
            run=result.run,
            seeds=tuple(seeds),
            seconds=result.seconds,
            epochs_trained=result.epochs_trained,
            winners=winning,
            open_settings=varying([without_seed(member) for member in run.config().members]),
        )


def _learners(
    config: TrainConfig, reader: Reader, device: torch.device, dtype: torch.dtype
) -> tuple[Learners, int]:
    """The members with their batches; the number of rows left out, for lack of any label."""
    questions = list(dict.fromkeys(member.question for member in config.members))
    if any(question.fold is not None for question in questions):
        train_rows, val_rows = folded_rows(reader, questions)
    else:
        names = [question.task for question in questions]
        train_rows = labelled_rows(reader, config.train_split, names)
        val_rows = labelled_rows(reader, config.val_split, names)

    def batches(rows: LabelledRows, networks: Sequence[SideNetwork]) -> Batches:
        return Batches(reader, rows, networks, device=device, dtype=dtype)

    learners = assemble(
        config,
        {question: _task(reader, question, train_rows) for question in questions},
        feature_spec(reader, 1, config.taps),
        initial_weights(reader),
        device,
        lambda networks: (batches(train_rows, networks), batches(val_rows, networks)),
    )
    return learners, train_rows.left_out + val_rows.left_out


def _task(reader: Reader, question: Question, train: LabelledRows) -> Task:
    task = task_of(reader.target(question.task)).fitted(train.labels[question])
    return replace(task, fold=question.fold)


def _start(learners: Learners, history: History, **known: Any) -> Callable[..., PassStarted]:
    """The record of a pass that begins or goes on, as yet without its pace."""
    return partial(
        PassStarted,
        members=len(history.members),
        parameters=history.parameters,
        train_rows=len(learners.batches),
        val_rows=len(learners.held_out),
        bytes=learners.nbytes,
        epochs_done=history.done.epochs,
        epochs=history.epochs,
        **known,
    )


def _resolved(member: Member, reader: Reader) -> Member:
    """With every default written out."""
    settings = vars(method_settings(member))
    return replace(member, settings=settings, task=reader.target(member.task or None).name)


def _facts(reader: Reader, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What environment.json holds."""
    return {
        **environment(),
        "fingerprint": reader.fingerprint,
        **({"formerly": reader.manifest.formerly} if reader.manifest.formerly else {}),
        "labelling": reader.labelling_digest,
        "device": name_of(device),
        "precision": precision_name(dtype),
        "tf32": False,  # see `without_tf32`
    }


def _card(reader: Reader) -> dict[str, Any]:
    """What all members' cards say alike: of what they learned from."""
    identity = reader.manifest.identity
    return {
        "cache_fingerprint": reader.fingerprint,
        "backbone": identity["backbone"],
        "preprocessing": identity["preprocessing"],
        "precision": identity["precision"],
        "storage": reader.manifest.storage,
    }


def _cost_of_cache(reader: Reader) -> dict[str, Any]:
    """A copied cache does not know how long its extraction took."""
    copied = "copied_from" in reader.manifest.notes
    return {
        "cache_bytes": reader.manifest.nbytes,
        "extraction_seconds": None if copied else reader.seconds,
    }
