"""Refit the winner: train the best setting once more, on train and val together, with some seeds.

The VTAB protocol (Zhai et al., arXiv 1910.04867, 2019): settings are chosen on 800 / 200 images,
the chosen one learns from all 1,000, and the test split is read once. Nothing is left to validate
on, so a refit has no best member; `evaluate` scores them all and gives mean and deviation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

import torch

from pipeline.config import Member, TrainConfig
from pipeline.errors import RunError, SettingError
from pipeline.runs.run import REFIT, Run, position_of, score_of
from pipeline.setting import varying
from pipeline.train import Report, TrainResult, train


@dataclass(frozen=True, kw_only=True)
class Winner:
    """The setting of one task that validation likes best: its score with each of
    `seeds`, and for each fold."""

    task: str
    member: Member
    seeds: tuple[int, ...]
    scores: tuple[float, ...]

    @property
    def score(self) -> float:
        """Mean over the seeds, and the folds if there were."""
        return mean(self.scores)

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds; 0 of one."""
        return stdev(self.scores) if len(self.scores) > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class RefitResult:
    """What `choose_and_refit` did: the run directory that it left, and the settings that won there,
    of which `open_settings` were not the same for all members."""

    run: str
    seeds: tuple[int, ...]
    seconds: float
    winners: list[Winner]
    open_settings: list[str]

    def chosen(self, winner: Winner) -> dict[str, Any]:
        """The winner's own of the open settings."""
        settings = winner.member.all_settings
        return {name: settings[name] for name in self.open_settings if name in settings}

    def to_dict(self) -> dict[str, Any]:
        """As `train --json` and `sweep --json` show it."""
        return {
            "run": self.run,
            "seeds": list(self.seeds),
            "seconds": self.seconds,
            "winners": [
                {
                    "task": winner.task,
                    "method": winner.member.method,
                    "settings": _without_seed(winner.member.all_settings),
                    "chosen": list(self.chosen(winner)),
                    "val": winner.score,
                    "val_deviation": winner.deviation,
                    "val_seeds": list(winner.seeds),
                }
                for winner in self.winners
            ],
        }


def winners(run: Run) -> list[Winner]:
    """The best setting of each task. Seeds are not settings: their scores are averaged [ours].

    Members that were stopped early do not count. Raises RunError if the run is not finished or
    nothing was validated.
    """
    found: dict[str, Winner] = {}
    for group in _settings(run.config().members, run.summary()):
        scores = [score_of(row) for row, _ in group]
        if any(row["stopped"] for row, _ in group) or None in scores:
            continue
        winner = Winner(
            task=group[0][1].task,
            member=replace(group[0][1], fold=None),
            seeds=tuple(dict.fromkeys(member.seed for _, member in group)),
            scores=tuple(score for score in scores if score is not None),
        )
        if winner.task not in found or winner.score > found[winner.task].score:
            found[winner.task] = winner
    if not found:
        raise RunError(
            f"{run.path}: expected members with a validation score to choose from, found none; "
            "train with --val-split"
        )
    return list(found.values())


def _settings(
    members: Sequence[Member], rows: Sequence[Mapping[str, str]]
) -> list[list[tuple[Mapping[str, str], Member]]]:
    """Members that differ in nothing but seed and fold, together."""
    groups: dict[Any, list[tuple[Mapping[str, str], Member]]] = {}
    for row in rows:
        member = members[position_of(row["id"])]
        alike = replace(member, seed=0, fold=None)
        groups.setdefault(repr(alike), []).append((row, member))
    return list(groups.values())


def _without_seed(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "seed"}


def refit_config(run: Run, seeds: Sequence[int], winning: Sequence[Winner]) -> TrainConfig:
    """The pass that trains the winners with `seeds` on train and val, into RUN/refit, in the run's
    own precision.

    Raises SettingError without a seed, or with one twice.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise SettingError(f"refit = {list(seeds)}: expected one seed or more, no two alike")
    config = run.config()
    members = [replace(winner.member, seed=seed) for winner in winning for seed in seeds]
    return replace(
        config,
        cache=run.cache(),
        out=str(run.path / REFIT),
        amp=run.precision == torch.bfloat16,
        members=tuple(members),
        train_split=(*config.train_split, *config.val_split),
        val_split=(),
    )


def refit(
    run: Run,
    seeds: Sequence[int],
    winning: Sequence[Winner],
    report: Report = lambda _: None,
    *,
    overwrite: bool = False,
) -> TrainResult:
    """Train `winning` with `seeds`; as `train` it goes on after a kill, and is done once.

    Keeps other processes from writing `run` meanwhile. Raises as `refit_config` and `train` do.
    """
    with run:
        run.hold()
        return train(replace(refit_config(run, seeds, winning), overwrite=overwrite), report)


def choose_and_refit(
    out: str, seeds: Sequence[int], report: Report = lambda _: None, *, overwrite: bool = False
) -> RefitResult:
    """Train the best setting of each task of the run in `out` again with `seeds`: `winners`, then
    `refit`, and raises as they do."""
    run = Run(out)
    winning = winners(run)
    result = refit(run, seeds, winning, report, overwrite=overwrite)
    members = [_without_seed(member.all_settings) for member in run.config().members]
    return RefitResult(
        run=result.run,
        seeds=tuple(seeds),
        seconds=result.seconds,
        winners=winning,
        open_settings=varying(members),
    )
