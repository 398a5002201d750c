"""What a pass leaves in its run's folder, and when: lines of metrics after each epoch, a member
when it has ended, and a checkpoint now and then."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pipeline.runs.events import Events
from pipeline.runs.run import Run
from pipeline.runs.summary import member_id
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.cohort import Cohort
from pipeline.training.cost import Cost
from pipeline.training.history import History
from pipeline.training.learners import Learners

CHECKPOINT_SECONDS = 30.0  # at least this long between checkpoints,
CHECKPOINT_SHARE = 0.05  # and no more than this share of the time spent on writing them


class Saver:
    """For one pass; a context manager. `card` is what all members' cards say alike."""

    def __init__(self, run: Run, history: History, cost: Cost, card: Mapping[str, Any]) -> None:
        self._run, self._history, self._cost, self._card = run, history, cost, card
        ids = [member_id(position) for position in range(len(history.members))]
        self._events = Events(run.path, ids, history.done.epochs)
        self._saved, self._took = time.perf_counter(), 0.0  # the last checkpoint

    def __enter__(self) -> Self:
        self._run.write_metrics(self._history.done.lines)  # those after the checkpoint must go
        return self

    def __exit__(self, *_: object) -> None:
        self._events.close()

    @property
    def is_due(self) -> bool:
        """Whether it is time for a checkpoint."""
        pause = max(CHECKPOINT_SECONDS, self._took / CHECKPOINT_SHARE)
        return time.perf_counter() - self._saved >= pause

    def save_checkpoint(self, learners: Learners) -> None:
        """Unless an interrupt tore a step: then the last checkpoint stands."""
        if not learners.whole:
            return
        begin = time.perf_counter()
        checkpoint = Checkpoint(
            **self._history.state(), members=learners.states(), cost=self._cost.so_far()
        )
        self._run.save_checkpoint(vars(checkpoint))
        self._saved = time.perf_counter()
        self._took = self._saved - begin

    def save_lines(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """An epoch's lines of metrics."""
        self._run.append_metrics(lines)
        self._events.add(lines)

    def save_member(self, cohort: Cohort, place: int) -> None:
        """A member that has ended, by its place in its cohort."""
        card = {
            "method": cohort.members[place].method,
            "settings": vars(cohort.settings),
            "target": cohort.task.to_dict(),
            **self._card,
        }
        self._run.save_member(member_id(cohort.positions[place]), cohort.network, place, card)
