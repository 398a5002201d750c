"""The trials of one sweep, kept in Optuna's own file: asked, judged on the way, told.

A trial is its number. What it proposes depends on the seed, its number, and the results told
before it was asked, never on how often the process was killed: samplers are made anew for each
value, as the memory of an old one would be lost. No other module knows Optuna; its warnings and
its log stay silent.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import Member
from pipeline.errors import needed_for
from pipeline.records import TrialDone
from pipeline.search.space import Space

with needed_for("a sweep", extra="sweep"):
    import optuna
    from optuna.trial import FrozenTrial, Trial, TrialState

REDUCTION = 3  # with halving, one member in three passes a rung, and trains three times as long
FIRST_RUNG = 6  # the first rung is at a sixth of the longest training, and not its first epoch
_STATES = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
_JOURNAL = "round"  # attribute of the study
_STOPS = "stops_after_"  # and an epoch, of a trial: what `judge` decided then


@contextmanager
def open_proposals(path: Path, space: Space, *, sampler: str, seed: int) -> Iterator[Proposals]:
    """The trials in the SQLite file `path`, which is made if need be."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.RDBStorage(f"sqlite:///{path.absolute()}")
    try:
        study = optuna.create_study(
            storage=storage,
            study_name="sweep",
            load_if_exists=True,
            direction="maximize",
            pruner=optuna.pruners.SuccessiveHalvingPruner(
                min_resource=_rungs(space)[0], reduction_factor=REDUCTION
            ),
        )
        yield Proposals(study, space, sampler=sampler, seed=seed)
    finally:
        storage.remove_session()
        storage.engine.dispose()
        optuna.logging.set_verbosity(verbosity)


class Proposals:
    """Trials 0, 1, …; made by `open_proposals`. A grid's come in its order."""

    def __init__(self, study: optuna.Study, space: Space, *, sampler: str, seed: int) -> None:
        self.study, self.space, self.sampler, self.seed = study, space, sampler, seed
        self.grid = space.grid() if sampler == "grid" else None
        self.rungs = _rungs(space)

    @property
    def journal(self) -> dict[str, Any]:
        """What the caller last noted of the round in flight; {} at first."""
        return self.study.user_attrs.get(_JOURNAL, {})

    @journal.setter
    def journal(self, values: Mapping[str, Any]) -> None:
        self.study.set_user_attr(_JOURNAL, dict(values))

    @property
    def asked(self) -> int:
        """Number of trials asked so far; the next one has this number."""
        return len(self._trials()) - len(self._trials(TrialState.WAITING))

    @property
    def running(self) -> list[int]:
        """Trials asked and not told, perhaps by a process that was killed."""
        return [trial.number for trial in self._trials(TrialState.RUNNING)]

    @property
    def told(self) -> list[TrialDone]:
        """Of all trials that have ended, in order of number."""
        return [self._record(trial) for trial in self._trials(*_STATES.values())]

    def ask(self) -> int:
        """A new trial's number."""
        if self.grid is not None and not self._trials(TrialState.WAITING):
            self.study.enqueue_trial(self.grid[len(self._trials())])
        return self.study.ask().number

    def member(self, number: int) -> Member:
        """What a trial proposes, the same however often. SettingError if that cannot be."""
        trial = self._open(number)
        self.study.sampler = self._sampler(number)
        _ = trial.relative_params  # TPE draws most values together: now, with this sampler
        return self.space.propose(_Seeded(trial, self._sampler))

    def judge(self, epoch: int, scores: Mapping[int, float]) -> set[int]:
        """The trials to stop at this epoch, by successive halving; `scores` by number.

        Optuna's pruner takes trials one after the other, each against those before it. These
        arrive together, so they all enter the rung first (`should_prune`, its answer unused), and
        then each is asked about as it was before it entered. Decisions are kept: an epoch that is
        trained again after a kill is judged the same.
        """
        if epoch not in self.rungs:
            return set()
        name = f"{_STOPS}{epoch}"
        known = self._trials()
        entering = {n: self._open(n) for n in scores if name not in known[n].user_attrs}
        for number, trial in entering.items():
            if epoch not in known[number].intermediate_values:
                trial.report(scores[number], epoch)
        before = self.study.get_trials()
        for trial in entering.values():
            trial.should_prune()
        for number, trial in entering.items():
            trial.set_user_attr(name, self.study.pruner.prune(self.study, before[number]))
        judged = self._trials()
        return {number for number in scores if judged[number].user_attrs[name]}

    def pruned(self, number: int) -> bool:
        """Whether `judge` stopped a trial."""
        decisions = self._trials()[number].user_attrs.items()
        return any(stops for name, stops in decisions if name.startswith(_STOPS))

    def tell(
        self,
        number: int,
        state: str,
        *,
        score: float | None = None,
        loss: float | None = None,
        member: str | None = None,
        reason: str | None = None,
    ) -> TrialDone | None:
        """End a trial, as TrialDone says; None if it was told before."""
        if self._trials()[number].state.is_finished():
            return None
        trial = self._open(number)
        for name, value in (("member", member), ("val_loss", loss), ("reason", reason)):
            if value is not None:
                trial.set_user_attr(name, value)
        # a pruned trial's value is the last that `judge` saw
        self.study.tell(number, score if state == "done" else None, _STATES[state])
        return self._record(self._trials()[number])

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _open(self, number: int) -> Trial:
        return Trial(self.study, self._trials()[number]._trial_id)

    def _record(self, trial: FrozenTrial) -> TrialDone:
        settings = dict(trial.params)
        return TrialDone(
            number=trial.number,
            state=next(name for name, state in _STATES.items() if state == trial.state),
            member=trial.user_attrs.get("member"),
            method=settings.pop("method", self.space.methods[0]),
            settings=settings,
            score=trial.value,
            loss=trial.user_attrs.get("val_loss"),
            reason=trial.user_attrs.get("reason"),
        )

    def _sampler(self, number: int, name: str = "") -> optuna.samplers.BaseSampler:
        words = [self.seed, number, zlib.crc32(name.encode())]
        seed = int(np.random.SeedSequence(words).generate_state(1)[0])
        if self.sampler != "tpe":
            return optuna.samplers.RandomSampler(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its options, that they are experimental
            return optuna.samplers.TPESampler(
                seed=seed, multivariate=True, group=True, constant_liar=True
            )


@dataclass(frozen=True)
class _Seeded:
    """A trial each of whose values has a seed of its own: a kill between two changes neither."""

    trial: Trial
    sampler: Callable[[int, str], optuna.samplers.BaseSampler]

    def _seeded(self, name: str) -> Trial:
        self.trial.study.sampler = self.sampler(self.trial.number, name)
        return self.trial

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._seeded(name).suggest_categorical(name, choices)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float:
        return self._seeded(name).suggest_float(name, low, high, log=log)

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        return self._seeded(name).suggest_int(name, low, high, step=step, log=log)


def _rungs(space: Space) -> list[int]:
    """Epochs after which members are compared; none at the end of the longest training."""
    longest = space.most_epochs()
    rungs = [max(2, longest // FIRST_RUNG)]
    while rungs[-1] * REDUCTION < longest:
        rungs.append(rungs[-1] * REDUCTION)
    return rungs
