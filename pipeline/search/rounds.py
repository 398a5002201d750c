"""The rounds of a sweep: members are proposed, trained in one pass, merged, told; then the next.

Each step may be done twice without harm, in this order, so that a sweep that was killed goes on
where it was: what the study holds as running is what is still to be trained or told. How a pass is
trained is not known here; it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

from pipeline.config import Member, SweepConfig, TrainConfig
from pipeline.errors import MissingTaps, SettingError
from pipeline.records import MemberStopped, RoundStarted, SweepRecord, TrainRecord, TrainResult
from pipeline.runs.merging import later, merge
from pipeline.runs.run import CHECKPOINT, ROUND, SUMMARY, Run
from pipeline.runs.summary import loss_of, position_of, score_of
from pipeline.search.proposals import Proposals
from pipeline.training.passes import Judge

Train = Callable[[TrainConfig, Callable[[TrainRecord], None], Judge | None], TrainResult]


class Rounds:
    """Up to `config.trials` of `proposals`, trained by `train`, and merged into `config.out`.

    `check` raises SettingError or MissingTaps for a member that cannot be; `trained` counts what
    was told in this call.
    """

    def __init__(
        self,
        config: SweepConfig,
        proposals: Proposals,
        *,
        check: Callable[[Member], None],
        train: Train,
        report: Callable[[SweepRecord], None],
    ) -> None:
        self.config, self.proposals = config, proposals
        self.check, self.train, self.report = check, train, report
        whole = () if proposals.grid is None else (len(proposals.grid),)
        self.limit = min(n for n in (config.trials, *whole) if n is not None)
        self.trained = 0
        self.target, self.round = Run(config.out), Run(Path(config.out) / ROUND)

    def run(self) -> None:
        """Until all is told. Raises SettingError if nothing of it could be trained."""
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
                self.check(self.proposals.member(number))
                batch.append(number)
            except (SettingError, MissingTaps) as error:
                self._tell(number, "failed", reason=str(error))
        return batch

    def _run_round(self) -> None:
        journal = self.proposals.journal
        numbers, first = journal["trials"], journal["first"]
        self._report_round(journal["number"], len(numbers))

        def pass_on(record: TrainRecord) -> None:
            if isinstance(record, MemberStopped):
                record = replace(record, id=later(record.id, first))
            self.report(record)

        def judge(epoch: int, scores: Mapping[str, float | None]) -> Collection[str]:
            ids = {numbers[position_of(id)]: id for id in scores}
            known = {n: s for n, id in ids.items() if (s := scores[id]) is not None and isfinite(s)}
            return {ids[number] for number in self.proposals.judge(epoch, known)}

        members = [self.proposals.member(number) for number in numbers]
        config = self.config.pass_of(members, self.round.path)
        self.train(config, pass_on, judge if self.config.halving else None)
        merge(self.round, self.target, first=first, cost=journal["cost"])
        for number, row in zip(numbers, self.round.summary(), strict=True):
            self._tell_result(number, row, later(row["id"], first))
        self.proposals.journal = {"number": journal["number"], "trials": []}
        self.round.remove()

    def _report_round(self, number: int, members: int) -> None:
        done = self.proposals.asked - len(self.proposals.running)
        left = max(0, self.limit - done - members)
        self.report(
            RoundStarted(
                round=number,
                rounds=number + -(-left // self.config.at_once),
                members=members,
                trials_done=done,
                trials=max(self.limit, done + members),
            )
        )

    def _tell_result(self, number: int, row: Mapping[str, str], member: str) -> None:
        """Tell what summary.csv says of a trial."""
        score, loss = score_of(row), loss_of(row)
        reason = row["stopped"] or (None if score is not None else "it has no validation score")
        pruned = self.proposals.pruned(number)
        state = "pruned" if pruned else "failed" if reason else "done"
        self._tell(number, state, score=score, loss=loss, member=member, reason=reason)

    def _tell(self, number: int, state: str, **outcome: Any) -> None:
        record = self.proposals.tell(number, state, **outcome)
        if record is not None:
            self.trained += 1
            self.report(record)
