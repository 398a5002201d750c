"""A pass over the cache, epoch by epoch: who learns next, and who is let go.

All members see the same batches and nothing else is shared (see `cohort.py`), so a member trained
among others is the member trained alone.

An interrupt may come anywhere; no step that was taken is lost. What is before `History.end_epoch`
in an epoch is then done again from the checkpoint, where it changes nothing; after it, a member
that has ended may be there still, and is let go when the pass goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

import torch

from pipeline.features.operands import Batch
from pipeline.records import MemberStopped, PassStarted, TrainRecord
from pipeline.runs.summary import member_id, position_of
from pipeline.training.cohort import Cohort
from pipeline.training.history import History
from pipeline.training.learners import Learners
from pipeline.training.pace import Pace
from pipeline.training.saver import Saver
from pipeline.training.scoring import score
from pipeline.training.workers import Workers

# After each epoch it sees the validation score of each member that is still learning, and returns
# the ids of those to stop. It may be asked about an epoch twice, if a run is interrupted just then.
Judge = Callable[[int, Mapping[str, float | None]], Collection[str]]


class Pass:
    """The epochs that `history` lacks. `learners` are as a checkpoint left them, if there is one.

    `order_seed` decides the order of rows in each epoch; `start` makes the record that tells how
    long an epoch takes, of its `seconds_per_epoch`; `judge` may stop members.
    """

    def __init__(
        self,
        learners: Learners,
        history: History,
        saver: Saver,
        workers: Workers,
        *,
        order_seed: int,
        start: Callable[..., PassStarted],
        report: Callable[[TrainRecord], None],
        judge: Judge | None,
    ) -> None:
        self.learners, self.history, self.saver, self.workers = learners, history, saver, workers
        self.order_seed, self.start, self.report, self.judge = order_seed, start, report, judge
        self.seconds = 0.0  # in training steps and validation
        self._epochs_before = history.done.epochs

    @property
    def epochs_trained(self) -> int:
        """Those that this pass has added to the history."""
        return self.history.done.epochs - self._epochs_before

    def run(self) -> None:
        """Train until every member has ended; leaves a checkpoint behind on KeyboardInterrupt."""
        self._retire()  # an interrupt may have come just before it did
        for epoch in range(self.history.done.epochs, self.history.epochs):
            if not self.learners.cohorts:
                break
            try:
                self._run_epoch(epoch)
            except KeyboardInterrupt:
                self._save_checkpoint()
                raise

    def _run_epoch(self, epoch: int) -> None:
        """Train, validate, tell, and let members go."""
        begin, history = time.perf_counter(), self.history
        self._train_epoch(epoch)
        self._validate()
        lines = history.lines(self.learners.cohorts.values())
        diverged = {
            position: f"loss not finite at step {step}"
            for position, step in self.learners.diverged().items()
        }
        pruned = self._pruned(epoch + 1, diverged)
        self.seconds += time.perf_counter() - begin
        self.saver.save_lines(lines)
        stopped = {**diverged, **pruned}
        history.end_epoch(lines, stopped)
        self.report(history.epoch_done(lines, self.seconds))
        for position, reason in sorted(stopped.items()):
            name, early = member_id(position), position in pruned
            self.report(MemberStopped(id=name, epoch=epoch + 1, reason=reason, pruned=early))
        self._retire()

    def _train_epoch(self, epoch: int) -> None:
        learners, cohorts = self.learners, list(self.learners.cohorts.items())
        generator = torch.Generator().manual_seed(self.order_seed * 1_000_003 + epoch)
        order = torch.randperm(len(learners.batches), generator=generator)
        done = cohorts[0][1].optimiser.steps - epoch * learners.steps  # if a killed run goes on
        if done == 0:
            for _, cohort in cohorts:
                cohort.begin_epoch(epoch, learners.steps)
        pace = None if self.seconds else Pace(learners.steps - done, learners.batches.device)
        rest = order[done * learners.batch_size :]
        for step, batch in enumerate(learners.batches.epoch(learners.batch_size, rest)):
            self._step(cohorts, batch)
            told = None if pace is None else pace.tick(step)
            if told is not None:
                self.report(self.start(seconds_per_epoch=told))
            if self.saver.is_due:
                self._save_checkpoint()
        self.workers.finish()

    def _step(self, cohorts: list[tuple[int, Cohort]], batch: Batch) -> None:
        """Have every cohort learn from a batch."""

        def learn(item: tuple[int, Cohort]) -> None:
            place, cohort = item
            cohort.step(batch, place)

        try:
            self.workers.queue(learn, cohorts)
        except KeyboardInterrupt:  # between the steps of two cohorts: the others take theirs
            self.workers.finish()
            most = max(cohort.optimiser.steps for _, cohort in cohorts)
            for place, cohort in cohorts:
                if cohort.whole and cohort.optimiser.steps < most:
                    cohort.step(batch, place)
            raise

    def _validate(self) -> None:
        held_out, cohorts = self.learners.held_out, self.learners.cohorts
        if not len(held_out):
            return
        networks = [(place, cohort.network, cohort.task) for place, cohort in cohorts.items()]
        scores = score(networks, held_out, self.workers)
        for cohort, values in zip(cohorts.values(), scores, strict=True):
            self.history.scores.update(zip(cohort.positions, values, strict=True))

    def _pruned(self, epochs: int, diverged: Collection[int]) -> dict[int, str]:
        """Whom the judge stops after so many epochs, of those that would go on, and why."""
        learning = {
            member_id(position): self.history.score(position)
            for position, member in self.learners.members()
            if position not in diverged and member.epochs > epochs
        }
        if self.judge is None or not learning:
            return {}
        reason = f"pruned after epoch {epochs}"
        return {position_of(name): reason for name in self.judge(epochs, learning)}

    def _retire(self) -> None:
        """Save the members that have ended and let them go."""
        ended = set()
        for cohort in self.learners.cohorts.values():
            for place, position in enumerate(cohort.positions):
                if self.history.has_ended(position):
                    self.saver.save_member(cohort, place)
                    ended.add(position)
        self.learners.leave(ended)

    def _save_checkpoint(self) -> None:
        self.workers.finish()
        self.saver.save_checkpoint(self.learners)
