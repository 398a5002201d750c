"""The members of a pass that are still learning, in cohorts, and the batches they learn from.

How members are put together depends on the device and its memory; what becomes of them does not,
so that a run goes on anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.config import Member, Question, TrainConfig
from pipeline.features.operands import Batches
from pipeline.features.residence import choose_resident
from pipeline.records import Loading
from pipeline.side.contract import FeatureSpec, SideNetwork
from pipeline.tasks import Task
from pipeline.training.cohort import Cohort, make_cohorts
from pipeline.training.scoring import EVAL_BATCH

STEP_SHARE = 0.5  # of a GPU's free memory may go into a step, that features have some

MakeBatches = Callable[[Sequence[SideNetwork]], tuple[Batches, Batches]]  # to learn from, held out


@dataclass
class Learners:
    """`cohorts` stand by the number of their operands in a batch; one that has ended is let go, and
    with it the memory. `step_bytes` of a GPU's are what training takes beside members and features.
    """

    cohorts: dict[int, Cohort]
    batches: Batches
    held_out: Batches
    batch_size: int
    step_bytes: int

    @property
    def steps(self) -> int:
        """In an epoch."""
        return -(-len(self.batches) // self.batch_size)

    @property
    def whole(self) -> bool:
        """Whether all have taken as many steps, and no interrupt tore one of them."""
        cohorts = self.cohorts.values()
        taken = {cohort.optimiser.steps for cohort in cohorts}
        return len(taken) == 1 and all(cohort.whole for cohort in cohorts)

    @property
    def nbytes(self) -> int:
        """Bytes of all operands, resident or not."""
        return self.batches.nbytes + self.held_out.nbytes

    @property
    def bytes_read(self) -> int:
        """From the cache so far."""
        return self.batches.bytes_read + self.held_out.bytes_read

    def members(self) -> Iterator[tuple[int, Member]]:
        """Position in the pass and settings of each."""
        for cohort in self.cohorts.values():
            yield from zip(cohort.positions, cohort.members, strict=True)

    def diverged(self) -> dict[int, int]:
        """The step of the first loss that was not finite, by position, of those that had one."""
        return {
            position: step
            for cohort in self.cohorts.values()
            for position, step in zip(cohort.positions, cohort.bad_step.tolist(), strict=True)
            if step >= 0
        }

    def load(self, wanted: str, report: Callable[[Loading], None]) -> str:
        """Make the features resident as `wanted` and the memory allow; says where they are.

        Raises SettingError if `device` or `ram` is wanted and has no room for them.
        """
        both = [part for part in (self.batches, self.held_out) if len(part)]
        device = self.batches.device
        nbytes = sum(part.nbytes for part in both)
        resident = choose_resident(wanted, nbytes, device, self.step_bytes)
        if resident == "disk":
            return resident
        total, before = sum(len(part) for part in both), 0
        place = device if resident == "device" else torch.device("cpu")
        for part in both:

            def loaded(rows: int, before: int = before) -> None:
                report(Loading(rows=before + rows, total=total))

            part.load(place, loaded)
            before += len(part)
        return resident

    def leave(self, positions: set[int]) -> None:
        """Go on without these members: what only they needed is computed, read and kept no more."""
        if not positions:
            return
        rests = {place: cohort.without(positions) for place, cohort in self.cohorts.items()}
        self.cohorts = {place: rest for place, rest in rests.items() if rest is not None}
        networks = {place: cohort.network for place, cohort in self.cohorts.items()}
        for part in (self.batches, self.held_out):
            part.narrow(networks)

    def states(self) -> dict[int, dict[str, Any]]:
        """All that a checkpoint needs of each member, by position, amid an epoch too."""
        cohorts = self.cohorts.values()
        return {position: state for one in cohorts for position, state in one.states().items()}

    def restore(self, states: Mapping[int, Mapping[str, Any]], epoch: int) -> None:
        """The inverse of `states`, which were taken in or before this `epoch`, on any device; the
        members that have no state had left."""
        self.leave({position for position, _ in self.members() if position not in states})
        for cohort in self.cohorts.values():
            cohort.begin_epoch(epoch, self.steps)
            cohort.restore(states)


def assemble(
    config: TrainConfig,
    tasks: Mapping[Question, Task],
    spec: FeatureSpec,
    initial: Mapping[str, Tensor],
    device: torch.device,
    make_batches: MakeBatches,
) -> Learners:
    """Members in cohorts as large as a GPU's memory allows: a step takes no more than STEP_SHARE of
    what is free, unless a single member does.

    Raises as `make_cohorts` does, and torch.OutOfMemoryError.
    """
    at_once = len(config.members)

    def fitting() -> Learners | None:
        cohorts = make_cohorts(config.members, spec, tasks, device, initial, at_once=at_once)
        batches, held_out = make_batches([cohort.network for cohort in cohorts])
        try:
            needed = step_bytes(cohorts, batches, held_out, config.batch_size)
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
            return None
        if needed and at_once > 1 and needed > STEP_SHARE * torch.cuda.mem_get_info(device)[0]:
            return None
        return Learners(
            cohorts=dict(enumerate(cohorts)),
            batches=batches,
            held_out=held_out,
            batch_size=config.batch_size,
            step_bytes=needed,
        )

    while (learners := fitting()) is None:  # what did not fit is gone by then
        at_once //= 2
    return learners


def step_bytes(
    cohorts: Sequence[Cohort], batches: Batches, held_out: Batches, batch_size: int
) -> int:
    """Bytes of a GPU's memory that training takes beside members and features; 0 on a CPU.

    Measured, by a step and a look at held-out rows of each cohort on blank batches: no formula
    knows what the kernels of a release take. Raises torch.OutOfMemoryError.
    """
    if batches.device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(batches.device)
    before = torch.cuda.memory_allocated(batches.device)
    for place, cohort in enumerate(cohorts):
        cohort.rehearse(batches.blank(min(batch_size, len(batches))), place)
        if len(held_out):
            with torch.no_grad():
                cohort.network.eval()
                size = min(EVAL_BATCH, len(held_out))
                cohort.network(held_out.blank(size).operands[place])
    peak = torch.cuda.max_memory_allocated(batches.device) - before
    torch.cuda.empty_cache()  # what torch keeps would not count as free
    return peak + batches.row_bytes * batch_size  # the next batch is made before one is let go
