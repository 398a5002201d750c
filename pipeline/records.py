"""What long functions report while they work, and what they return: plain values, without torch.

A function takes a `report` callback and calls it with the records of its stage; the terminal turns
them into bars, lines and JSON, another program may match on them. Scores are validation's. A number
that is not finite cannot be compared, written as JSON or drawn: it is None from the start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import Member

__all__ = [
    "EpochDone",
    "FoldsResult",
    "Loading",
    "MemberResult",
    "MemberStopped",
    "PassStarted",
    "RefitResult",
    "RoundStarted",
    "SweepRecord",
    "SweepResult",
    "TrainRecord",
    "TrainResult",
    "TrialDone",
    "Winner",
    "finite",
    "over_folds",
    "rank",
    "without_seed",
]


def finite(value: float | None) -> float | None:
    """The value; None in place of NaN and the infinities."""
    return value if value is not None and math.isfinite(value) else None


def rank(score: float | None, loss: float | None, *, stopped: bool) -> tuple[bool, float, float]:
    """Sorts the members of one task, best first: by score, then by loss; those without a finite
    score later, those that were stopped early last."""
    score, loss = finite(score), finite(loss)
    return stopped, math.inf if score is None else -score, math.inf if loss is None else loss


# --- train ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Reported while operands are computed and made resident."""

    rows: int
    total: int


@dataclass(frozen=True, kw_only=True)
class PassStarted:
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
    """Reported after each epoch: the lowest training loss of its members (NaN if none is finite),
    and the best validation score so far, called `metric`, of those members that learn the first
    member's task."""

    epoch: int
    epochs: int
    members: int
    train_loss: float
    metric: str
    score: float | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class MemberStopped:
    """Reported when a member leaves before its last epoch; the others go on.

    `pruned` if a judge stopped it, for lagging behind; else its loss was not finite.
    """

    id: str
    epoch: int
    reason: str
    pruned: bool


TrainRecord = Loading | PassStarted | EpochDone | MemberStopped


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
        scores = values.pop("scores")
        return {**values, **scores}


@dataclass(frozen=True, kw_only=True)
class FoldsResult:
    """One setting over its folds: the `members` that held out one each, the score that ranks and
    its standard deviation (None where a member has none)."""

    method: str
    settings: dict[str, Any]
    metric: str
    members: list[str]
    mean: float | None
    deviation: float | None


def over_folds(members: Sequence[MemberResult]) -> list[FoldsResult]:
    """The settings of members that held out folds, best first; [] where none did."""
    settings: dict[str, list[MemberResult]] = {}
    for member in members:
        if "fold" in member.settings:
            alike = {**member.settings, "fold": None}
            settings.setdefault(repr((member.method, alike)), []).append(member)
    found = []
    for same in settings.values():
        scores = [member.score for member in same]
        known = [score for score in scores if score is not None]
        whole = len(known) == len(scores)
        found.append(
            FoldsResult(
                method=same[0].method,
                settings={k: v for k, v in same[0].settings.items() if k != "fold"},
                metric=same[0].metric,
                members=[member.id for member in same],
                mean=mean(known) if whole else None,
                deviation=(stdev(known) if len(known) > 1 else 0.0) if whole else None,
            )
        )
    return sorted(found, key=lambda one: rank(one.mean, None, stopped=False))


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What `train` did; nothing in no time if the run was already finished.

    `images_per_second` counts each training row once an epoch, however many members learn from it.
    """

    run: str
    seconds: float = 0.0
    images_per_second: float = 0.0
    epochs_trained: int = 0
    members: list[MemberResult]


# --- refit -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Winner:
    """The setting of one task that validation likes best: its score with each of `seeds`, and for
    each fold."""

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
    """What `refit` did: the run directory that it left, and the settings that won in the run above
    it, of which `open_settings` were not the same for all members."""

    run: str
    seeds: tuple[int, ...]
    seconds: float
    epochs_trained: int
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
                    "settings": without_seed(winner.member),
                    "chosen": list(self.chosen(winner)),
                    "val": winner.score,
                    "val_deviation": winner.deviation,
                    "val_seeds": list(winner.seeds),
                }
                for winner in self.winners
            ],
        }


def without_seed(member: Member) -> dict[str, Any]:
    """A member's settings but the seed, which is none: it only tells runs of one setting apart."""
    return {name: value for name, value in member.all_settings.items() if name != "seed"}


# --- sweep ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RoundStarted:
    """Reported before a round is trained (or goes on). `trials_done` of `trials` are told."""

    round: int
    rounds: int
    members: int
    trials_done: int
    trials: int


@dataclass(frozen=True, kw_only=True)
class TrialDone:
    """One proposal, told to Optuna: `state` is done, pruned or failed, `reason` says why.

    `settings` are those that the space left open; all others stand in RUN's files under the id
    `member`, None if it could not be trained at all. Scores are validation's: `score` is the
    primary one, higher is better; a pruned trial's is from when it was stopped.
    """

    number: int
    state: str
    member: str | None
    method: str
    settings: dict[str, Any]
    score: float | None
    loss: float | None
    reason: str | None

    @property
    def rank(self) -> tuple[Any, ...]:
        """As `Run.best_member` ranks, the earlier proposal first among equals."""
        return (*rank(self.score, self.loss, stopped=self.state != "done"), self.number)


SweepRecord = RoundStarted | TrialDone | TrainRecord


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What `sweep` did: `trained` proposals in this call; counts and `trials` of the whole sweep.

    `best` is the member's id that `evaluate` takes by itself, `settings` all of its settings,
    `score` its validation score, called `metric`; None if no trial was scored. `trials` stand in
    order of rank.
    """

    run: str
    trained: int
    done: int
    pruned: int
    failed: int
    seconds: float
    trials: list[TrialDone]
    best: str | None = None
    method: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    metric: str | None = None
    score: float | None = None
