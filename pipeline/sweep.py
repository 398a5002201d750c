"""Search a space of settings: Optuna proposes members, `train` trains K of them in one pass.

    RUN/sweep.yaml    the space and what else decides which members are proposed
    RUN/study.db      Optuna's own file (SQLite): proposals, scores, and the round in flight
    RUN/round/        the round in flight, a run directory of its own; `train` resumes it
    RUN/…             all rounds so far as one run directory, as `train` leaves it

Proposals depend on the seed, the trial's number and the results before it, never on how often the
sweep was interrupted (`search/rounds.py`).

Validation ranks; nothing here can read another split.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cache import Reader
from pipeline.config import Member, Question, SweepConfig
from pipeline.device import pick_device, pick_precision, precision_name
from pipeline.errors import SettingError
from pipeline.features.labelled import feature_spec, initial_weights, labelled_rows
from pipeline.records import SweepRecord, SweepResult
from pipeline.runs.folder import other_names
from pipeline.runs.refusals import refuse_another, refuse_other_files
from pipeline.runs.run import STUDY, Run
from pipeline.runs.summary import position_of, score_of
from pipeline.search.proposals import Proposals, open_proposals
from pipeline.search.rounds import Rounds
from pipeline.search.space import Space, read_space
from pipeline.tasks import Task, task_of
from pipeline.train import train
from pipeline.training.cohort import make_cohorts

Report = Callable[[SweepRecord], None]


def sweep(config: SweepConfig, report: Report = lambda _: None) -> SweepResult:
    """Train members that Optuna proposes from a space, and leave them all in one run directory.

    The same call continues a killed sweep, goes on with a larger `trials`, and does nothing if
    all is done. Raises SettingError for the space, for a sweep that proposed nothing but members
    that cannot be, and as `train` does; RunError if `out` holds another sweep.
    """
    begin = time.perf_counter()
    space = read_space(config.space)
    tasks = space.axes.get("task")
    if isinstance(tasks, tuple) and len(tasks) > 1:
        raise SettingError(
            f"{config.space}: task: expected one, as scores of two tasks cannot be ranked; "
            f"came {', '.join(tasks)}; make a sweep of each"
        )
    if config.sampler == "grid":
        space.grid()  # raises if it has no end
    device = pick_device(config.device)
    with Run(config.out) as run:
        with Reader(config.cache) as reader:
            probe = _Probe(reader, tasks[0] if isinstance(tasks, tuple) else "", config.taps)
            for splits in (config.train_split, config.val_split):
                labelled_rows(reader, splits, [probe.task.name])  # raises before anything is made
            config = _begin(run, config, space, reader, device)
        file, seed = run.path / STUDY, config.sampler_seed
        with open_proposals(file, space, sampler=config.sampler, seed=seed) as proposals:
            rounds = Rounds(config, proposals, check=probe.check, train=train, report=report)
            rounds.run()
            seconds = time.perf_counter() - begin
            return _result(run, proposals, probe.task, trained=rounds.trained, seconds=seconds)


class _Probe:
    """Says before a round is trained what would stop all of it: a member that cannot be made."""

    def __init__(self, reader: Reader, task: str, taps: str) -> None:
        self.task = task_of(reader.target(task or None))
        self.tasks = {Question(task): self.task}  # by the name that members have, which may be ""
        self.spec = feature_spec(reader, self.task.outputs, taps)
        self.initial = initial_weights(reader)

    def check(self, member: Member) -> None:
        """Raises SettingError or MissingTaps."""
        make_cohorts([member], self.spec, self.tasks, torch.device("cpu"), self.initial)


def _begin(
    run: Run, config: SweepConfig, space: Space, reader: Reader, device: torch.device
) -> SweepConfig:
    """Make the directory, or find the same sweep in it, and keep other processes out of it. What it
    returns trains every round in one precision, the sweep's own. Raises RunError."""
    run.hold()
    there = run.sweep()
    if config.overwrite and (there or run.begun):
        run.clear()
    elif not there:
        refuse_other_files(run.path, other_names(run.path, ()), "sweep", "sweep")
    goes_on = there and not config.overwrite
    if goes_on and reader.is_known_as(there["fingerprint"]):  # perhaps by an earlier name
        there["fingerprint"] = reader.fingerprint
    amp = there["precision"] == "bfloat16" if goes_on and config.amp is None else config.amp
    precision = pick_precision(device, amp)
    asked = {
        "fingerprint": reader.fingerprint,
        "labelling": reader.labelling_digest,
        "precision": precision_name(precision),
        "space": space.to_dict(),
        **config.deciding(),
    }
    if goes_on:
        refuse_another(run.path, "sweep", *_deciding(there, asked))
    cache = str(Path(config.cache).absolute())
    free = {"cache": cache, "trials": config.trials, "at_once": config.at_once}
    run.write_sweep({**free, **asked})
    if not goes_on and run.begun:
        run.disown()  # the run that was cleared
    return replace(config, amp=precision == torch.bfloat16)


def _deciding(
    there: dict[str, Any], asked: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What decides the proposals and their results, each setting of the space by itself; what an
    earlier version did not note decides nothing."""
    known = [name for name in asked if name in there or name != "labelling"]

    def flat(values: dict[str, Any]) -> dict[str, Any]:
        axes = {f"space.{name}": axis for name, axis in values["space"].items()}
        return {name: values.get(name) for name in known if name != "space"} | axes

    return flat(there), flat(asked)


def _result(
    run: Run, proposals: Proposals, task: Task, *, trained: int, seconds: float
) -> SweepResult:
    trials = sorted(proposals.told, key=lambda record: record.rank)
    states = [record.state for record in trials]
    best: dict[str, Any] = {}
    if trials[0].score is not None:
        id = run.best_member()
        row = next(row for row in run.summary() if row["id"] == id)
        member = run.config().members[position_of(id)]
        best = {
            "best": id,
            "method": member.method,
            "settings": member.all_settings,
            "metric": f"val_{task.metric}",
            "score": score_of(row),
        }
    return SweepResult(
        run=str(run.path),
        trained=trained,
        done=states.count("done"),
        pruned=states.count("pruned"),
        failed=states.count("failed"),
        **best,
        seconds=seconds,
        trials=trials,
    )
