"""What is behind a pass: the epochs done, its members' scores, the lines of metrics.jsonl, and in
the end a result for each member, which summary.csv holds as a line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import Member
from pipeline.errors import RunError
from pipeline.records import EpochDone, MemberResult, finite
from pipeline.runs.run import Run
from pipeline.runs.summary import member_id, number_of, position_of
from pipeline.tasks import Scores, Task
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.cohort import Cohort
from pipeline.training.optim import learning_rate


@dataclass(frozen=True, kw_only=True)
class Done:
    """Replaced as a whole after each epoch, so that an interrupt finds an epoch done or not done.

    `lines` are those of metrics.jsonl; `stopped` says why, of members that left early, by position.
    """

    epochs: int = 0
    lines: tuple[dict[str, Any], ...] = ()
    stopped: Mapping[int, str] = field(default_factory=dict)


class History:
    """Of a pass of `members`, who begin in `cohorts`; up to a checkpoint, where one was taken.

    `scores` holds the last validation of each member by position. It may be ahead of `done`: an
    epoch that an interrupt kept from being done is validated again, to the same scores.
    """

    def __init__(
        self, members: Sequence[Member], cohorts: Iterable[Cohort], checkpoint: Checkpoint | None
    ) -> None:
        self.members = members
        self._known = {  # of every member, also when it has left
            position: (cohort.task, cohort.parameters)
            for cohort in cohorts
            for position in cohort.positions
        }
        self.done, self.scores = Done(), dict[int, Scores]()
        if checkpoint is not None:
            self.done = Done(
                epochs=checkpoint.epochs_done,
                lines=tuple(checkpoint.history),
                stopped=checkpoint.stopped,
            )
            self.scores = {at: Scores(**values) for at, values in checkpoint.scores.items()}

    @property
    def epochs(self) -> int:
        """Of the member that learns longest."""
        return max(member.epochs for member in self.members)

    @property
    def parameters(self) -> int:
        """Of all members."""
        return sum(parameters for _, parameters in self._known.values())

    def state(self) -> dict[str, Any]:
        """A checkpoint's part."""
        return {
            "epochs_done": self.done.epochs,
            "history": list(self.done.lines),
            "stopped": dict(self.done.stopped),
            "scores": {position: vars(scores) for position, scores in self.scores.items()},
        }

    def has_ended(self, position: int) -> bool:
        """Whether a member was stopped, or its last epoch is done."""
        epochs = self.members[position].epochs
        return position in self.done.stopped or epochs <= self.done.epochs

    def score(self, position: int) -> float | None:
        """A member's last validation score, the one that ranks."""
        scores = self.scores.get(position)
        return None if scores is None else scores.score

    def lines(self, cohorts: Iterable[Cohort]) -> list[dict[str, Any]]:
        """Those of metrics.jsonl for the epoch that was trained and validated last."""
        lines: dict[int, dict[str, Any]] = {}
        epoch = self.done.epochs
        for cohort in cohorts:
            of_cohort = zip(cohort.positions, cohort.members, cohort.train_loss, strict=True)
            for position, member, loss in of_cohort:
                lines[position] = {
                    "epoch": epoch + 1,
                    "member": member_id(position),
                    "lr": learning_rate(member, epoch),
                    "train_loss": finite(loss),
                    **_columns(cohort.task, self.scores.get(position)),
                }
        return [lines[position] for position in sorted(lines)]

    def end_epoch(self, lines: Sequence[dict[str, Any]], stopped: Mapping[int, str]) -> None:
        """The epoch is done: its lines, and who stops after it."""
        done = self.done
        self.done = Done(
            epochs=done.epochs + 1,
            lines=(*done.lines, *lines),
            stopped={**done.stopped, **stopped},
        )

    def epoch_done(self, lines: Sequence[dict[str, Any]], seconds: float) -> EpochDone:
        """The record of the epoch done last, which left these lines."""
        task, _ = self._known[0]
        same = [p for p, member in enumerate(self.members) if member.task == task.name]
        scores = [score for score in map(self.score, same) if score is not None]
        losses = [line["train_loss"] for line in lines if line["train_loss"] is not None]
        return EpochDone(
            epoch=self.done.epochs,
            epochs=self.epochs,
            members=len(lines),
            train_loss=min(losses) if losses else float("nan"),
            metric=task.metric,
            score=max(scores) if scores else None,
            seconds=seconds,
        )

    def results(self) -> list[MemberResult]:
        """One a member, in order."""
        return [
            self._result(
                position,
                parameters=self._known[position][1],
                scores=_columns(self._known[position][0], self.scores.get(position)),
                stopped=self.done.stopped.get(position),
            )
            for position in range(len(self.members))
        ]

    def read_results(self, run: Run) -> list[MemberResult]:
        """As a finished run's summary.csv holds them. RunError if it lists no member."""
        results = [
            self._result(
                position,
                parameters=int(row["parameters"]),
                scores={n: number_of(row[n]) for n in _columns(self._known[position][0], None)},
                stopped=row["stopped"] or None,
            )
            for row in run.summary()
            for position in [position_of(row["id"])]
        ]
        if not results:
            raise RunError(f"{run.path}: summary.csv lists no member")
        return results

    def _result(self, position: int, **found: Any) -> MemberResult:
        member, (task, _) = self.members[position], self._known[position]
        return MemberResult(
            id=member_id(position),
            method=member.method,
            settings=member.all_settings,
            metric=f"val_{task.metric}",
            **found,
        )


def summary_row(result: MemberResult) -> dict[str, Any]:
    """A line of summary.csv."""
    return {
        "id": result.id,
        "method": result.method,
        **result.settings,
        "parameters": result.parameters,
        **result.scores,
        "stopped": result.stopped,
    }


def _columns(task: Task, scores: Scores | None) -> dict[str, float | None]:
    """Validation scores as metrics.jsonl and summary.csv name them."""
    values = {} if scores is None else {**scores.values, "loss": scores.loss}
    return {f"val_{name}": values.get(name) for name in (*task.scores, "loss")}
