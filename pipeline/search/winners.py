"""Which settings won, and the pass that trains them once more, on train and val, with some seeds.

The VTAB protocol (Zhai et al., arXiv 1910.04867, 2019): settings are chosen on 800 / 200 images,
the chosen one learns from all 1,000, and the test split is read once. Nothing is left to validate
on, so a refit has no best member; `evaluate` scores them all and gives mean and deviation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pipeline.config import Member, TrainConfig
from pipeline.errors import RunError, SettingError
from pipeline.records import Winner
from pipeline.runs.run import REFIT, Run
from pipeline.runs.summary import position_of, score_of


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
