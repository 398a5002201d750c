"""Search a space of settings: Optuna proposes members, `train` trains K of them in one pass.

    RUN/sweep.yaml    the space and what else decides which members are proposed
    RUN/study.db      Optuna's own file (SQLite): proposals, scores, and the round in flight
    RUN/round/        the round in flight, a run directory of its own; `train` resumes it
    RUN/…             all rounds so far as one run directory, as `train` leaves it

A round is proposed, trained, merged into RUN, told to Optuna, and removed, in this order. Each
step may be done twice without harm, so that a sweep that was killed goes on where it was: what the
study holds as running is what is still to be trained or told. Proposals depend on the seed, the
trial's number and the results before it, never on how often the sweep was interrupted.

Validation ranks; nothing here can read another split.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import yaml

from cache import Reader
from pipeline.config import Member, Question, SweepConfig
from pipeline.device import pick_device, pick_precision, precision_name
from pipeline.errors import MissingTaps, RunError, SettingError
from pipeline.features.labelled import feature_spec, initial_weights, labelled_rows
from pipeline.records import MemberStopped, RoundStarted, SweepRecord, SweepResult
from pipeline.runs.events import FOLDER as EVENTS
from pipeline.runs.folder import copy_tree, other_names, replace_text
from pipeline.runs.run import (
    CHECKPOINT,
    ENVIRONMENT,
    MEMBERS,
    ROUND,
    STUDY,
    SUMMARY,
    SWEEP,
    Run,
    listed,
    loss_of,
    member_id,
    position_of,
    precision_differs,
    score_of,
)
from pipeline.search.proposals import Proposals, open_proposals
from pipeline.search.space import Space, read_space
from pipeline.tasks import task_of
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
            config = _begin(run, config, space, reader.fingerprint, device)
        file, seed = run.path / STUDY, config.sampler_seed
        with open_proposals(file, space, sampler=config.sampler, seed=seed) as proposals:
            searching = _Sweep(config, proposals, probe, report)
            searching.run()
            return searching.result(begin)


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


class _Sweep:
    """The rounds of one sweep."""

    def __init__(
        self, config: SweepConfig, proposals: Proposals, probe: _Probe, report: Report
    ) -> None:
        self.config, self.proposals, self.probe, self.report = config, proposals, probe, report
        whole = () if proposals.grid is None else (len(proposals.grid),)
        self.limit = min(n for n in (config.trials, *whole) if n is not None)
        self.trained = 0
        self.target, self.round = Run(config.out), Run(Path(config.out) / ROUND)

    def run(self) -> None:
        while self._begin_round():
            self._run_round()
        told = self.proposals.told
        if all(record.member is None for record in told):
            reasons = list(dict.fromkeys(str(record.reason) for record in told))
            raise SettingError(
                f"{self.config.space}: none of {len(told)} proposals can be trained:\n  "
                + "\n  ".join(reasons[:5])
                + "\nChange the space and choose another --out, or --overwrite."
            )

    def _begin_round(self) -> bool:
        """Have a round in flight: the one found, or a new one. False if nothing is left to do."""
        journal = {"number": 0, "trials": [], **self.proposals.journal}
        saved = any((self.round.path / name).exists() for name in (CHECKPOINT, SUMMARY))
        if journal["trials"] and saved:
            return True
        self.round.remove()  # merged and told, or nothing of it was saved yet
        batch = self._propose()
        if batch:
            self.proposals.journal = {
                "number": journal["number"] + (not journal["trials"]),
                "trials": batch,
                "first": len(self.target.config().members) if self.target.finished else 0,
                "cost": self.target.cost(),
            }
        return bool(batch)

    def _propose(self) -> list[int]:
        """Up to `at_once` trials that can be trained; the others are told as failed."""
        left_over = self.proposals.running
        batch: list[int] = []
        while len(batch) < self.config.at_once:
            if not left_over and self.proposals.asked >= self.limit:
                break
            number = left_over.pop(0) if left_over else self.proposals.ask()
            try:
                self.probe.check(self.proposals.member(number))
                batch.append(number)
            except (SettingError, MissingTaps) as error:
                self._tell(number, "failed", reason=str(error))
        return batch

    def _run_round(self) -> None:
        journal = self.proposals.journal
        numbers, first = journal["trials"], journal["first"]
        members = [self.proposals.member(number) for number in numbers]
        done = self.proposals.asked - len(self.proposals.running)
        left = max(0, self.limit - done - len(numbers))
        self.report(
            RoundStarted(
                round=journal["number"],
                rounds=journal["number"] + -(-left // self.config.at_once),
                members=len(numbers),
                trials_done=done,
                trials=max(self.limit, done + len(numbers)),
            )
        )

        def pass_on(record: Any) -> None:
            if isinstance(record, MemberStopped):
                record = replace(record, id=_later(record.id, first))
            self.report(record)

        def judge(epoch: int, scores: Mapping[str, float | None]) -> Collection[str]:
            ids = {numbers[position_of(id)]: id for id in scores}
            known = {n: s for n, id in ids.items() if (s := scores[id]) is not None and isfinite(s)}
            return {ids[number] for number in self.proposals.judge(epoch, known)}

        config = self.config.pass_of(members, self.round.path)
        train(config, pass_on, judge=judge if self.config.halving else None)
        merge(self.round, self.target, first=first, cost=journal["cost"])
        for number, row in zip(numbers, self.round.summary(), strict=True):
            self._tell_result(number, row, _later(row["id"], first))
        self.proposals.journal = {"number": journal["number"], "trials": []}
        self.round.remove()

    def _tell_result(self, number: int, row: Mapping[str, str], member: str) -> None:
        """Tell what summary.csv says of a trial."""
        score, loss = score_of(row), loss_of(row)
        reason = row["stopped"] or (None if score is not None else "it has no validation score")
        pruned = row["stopped"].startswith("pruned")
        state = "pruned" if pruned else "failed" if reason else "done"
        self._tell(number, state, score=score, loss=loss, member=member, reason=reason)

    def _tell(self, number: int, state: str, **outcome: Any) -> None:
        record = self.proposals.tell(number, state, **outcome)
        if record is not None:
            self.trained += 1
            self.report(record)

    def result(self, begin: float) -> SweepResult:
        trials = sorted(self.proposals.told, key=lambda record: record.rank)
        states = [record.state for record in trials]
        best: dict[str, Any] = {}
        if trials[0].score is not None:
            id = self.target.best_member()
            row = next(row for row in self.target.summary() if row["id"] == id)
            member = self.target.config().members[position_of(id)]
            best = {
                "best": id,
                "method": member.method,
                "settings": member.all_settings,
                "metric": f"val_{self.probe.task.metric}",
                "score": score_of(row),
            }
        return SweepResult(
            run=str(self.target.path),
            trained=self.trained,
            done=states.count("done"),
            pruned=states.count("pruned"),
            failed=states.count("failed"),
            **best,
            seconds=time.perf_counter() - begin,
            trials=trials,
        )


def merge(part: Run, whole: Run, *, first: int, cost: Mapping[str, Any]) -> None:
    """Put the finished run `part` into `whole` as its members `first`, `first` + 1, …

    Done again after a kill, it leaves the same: what `whole` holds of members from `first` on is
    replaced, and `cost` is its cost.json from before. `whole` need not be there yet.
    """
    config, rows = part.config(), part.summary()
    ids = {row["id"]: _later(row["id"], first) for row in rows}
    before = (
        [row for row in whole.summary() if position_of(row["id"]) < first] if whole.finished else []
    )
    earlier = whole.config().members[:first] if first else ()
    for folder in (MEMBERS, EVENTS):
        for old, new in ids.items():
            if (part.path / folder / old).exists():
                copy_tree(part.path / folder / old, whole.path / folder / new)
    lines = [line for line in whole.metrics() if position_of(line["member"]) < first]
    whole.write_metrics([*lines, *({**m, "member": ids[m["member"]]} for m in part.metrics())])
    replace_text(whole.path / ENVIRONMENT, (part.path / ENVIRONMENT).read_text(encoding="utf-8"))
    whole.write_config(replace(config, out=str(whole.path), members=(*earlier, *config.members)))
    spent = part.cost()
    lines_of_all = [*before, *({**row, "id": ids[row["id"]]} for row in rows)]
    whole.finish(lines_of_all, add_costs(cost, spent) if cost else spent)


def add_costs(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """cost.json of two passes over one cache: sums, and the rates that follow from them."""
    total = dict(other)
    for name in ("seconds", "bytes_read", "members"):
        total[name] = one[name] + other[name]
    images = sum(cost["seconds"] * cost["images_per_second"] for cost in (one, other))
    total["images_per_second"] = images / max(total["seconds"], 1e-9)
    total["seconds_per_member"] = total["seconds"] / total["members"]
    return total


def _begin(
    run: Run, config: SweepConfig, space: Space, fingerprint: str, device: torch.device
) -> SweepConfig:
    """Make the directory, or find the same sweep in it, and keep other processes out of it. What it
    returns trains every round in one precision, the sweep's own. Raises RunError."""
    run.hold()
    there = run.sweep()
    if config.overwrite and (there or run.begun):
        run.clear()
    elif not there and (others := other_names(run.path, ())):
        raise RunError(
            f"{run.path}: expected a new or empty folder for the sweep, or one that `sweep` made; "
            f"it holds other files ({listed(others)}). Choose another --out."
        )
    goes_on = there and not config.overwrite
    amp = there["precision"] == "bfloat16" if goes_on and config.amp is None else config.amp
    precision = pick_precision(device, amp)
    asked = {
        "fingerprint": fingerprint,
        "precision": precision_name(precision),
        "space": space.to_dict(),
        **config.deciding(),
    }
    if goes_on:
        _refuse_another(run.path, there, asked)
    cache = str(Path(config.cache).absolute())
    free = {"cache": cache, "trials": config.trials, "at_once": config.at_once}
    replace_text(run.path / SWEEP, yaml.safe_dump({**free, **asked}, sort_keys=False))
    if not goes_on and run.begun:
        run.disown()  # the run that was cleared
    return replace(config, amp=precision == torch.bfloat16)


def _refuse_another(path: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    flat = [
        {**values, **{f"space.{name}": value for name, value in values["space"].items()}}
        for values in (there, asked)
    ]
    names = [name for name in dict.fromkeys([*flat[0], *flat[1]]) if name != "space"]
    differing = [
        precision_differs(flat[0][name], flat[1][name])
        if name == "precision"
        else f"{name}: {flat[0].get(name)!r} there, {flat[1].get(name)!r} asked for"
        for name in names
        if name in asked or name.startswith("space.")
        if flat[0].get(name) != flat[1].get(name)
    ]
    if differing:
        raise RunError(
            f"{path} holds another sweep:\n  "
            + "\n  ".join(differing)
            + "\nChoose another --out, or --overwrite."
        )


def _later(member: str, places: int) -> str:
    return member_id(position_of(member) + places)
