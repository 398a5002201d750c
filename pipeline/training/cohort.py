"""Cohorts: members trained together, as one network, where their shapes agree.

A cohort is one network of K members with one optimiser. What belongs to a member alone (its
initialisation, drop-path stream, learning rate, weight decay, smoothing, the first bad loss) is a
row of a tensor here; nothing mixes members. A member whose schedule has ended, or that was stopped,
leaves its cohort between epochs, and costs nothing from then on: no step, no operands, no reads.
What a checkpoint holds of a member does not depend on the cohort it was in: a CPU and a GPU, or two
GPUs, put members together differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.config import Member, Question
from pipeline.errors import MissingTaps, SettingError
from pipeline.features.operands import Batch
from pipeline.process import undisturbed
from pipeline.side import METHODS
from pipeline.side.contract import FeatureSpec, SideNetwork
from pipeline.side.settings import Settings
from pipeline.tasks import Task
from pipeline.training.drop_path import DropPath
from pipeline.training.members import method_settings
from pipeline.training.optim import MemberAdamW, learning_rate


class Cohort:
    """Members of one method, one shape and one task: a network of K, its optimiser, its schedules.

    `positions` are the members' places in the pass. Call `begin_epoch`, then `step` per batch.
    `whole` is False while a step changes the members, and stays so if an exception tore it.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        settings: Settings,
        members: Sequence[tuple[int, Member]],
        task: Task,
        device: torch.device,
        initial: Mapping[str, Tensor],
    ) -> None:
        self._made_of = (spec, settings, task, device, initial)
        self.positions = [position for position, _ in members]
        self.members = [member for _, member in members]
        self.settings, self.task = settings, task
        method = METHODS[self.members[0].method]
        self.network: SideNetwork = method(spec, settings, [m.seed for m in self.members])
        self.network.start_from(initial)
        self.network.to(device)
        decay = [member.weight_decay for member in self.members]
        self.optimiser = MemberAdamW(self.network, decay, self.network.decayed)
        self.smoothing = torch.tensor([m.smoothing for m in self.members], device=device)
        seeds, rates = [m.seed for m in self.members], [m.drop_path for m in self.members]
        self.drop_path = DropPath(seeds, rates, device)
        self.bad_step = torch.full((len(members),), -1, device=device)  # of the first bad loss
        self.loss_sum = torch.zeros(len(members), device=device)  # over the epoch's labelled rows
        self.rows_seen = torch.zeros((), device=device)
        self.whole = True

    @property
    def parameters(self) -> int:
        """Of one member."""
        return self.optimiser.parameters_each

    @property
    def train_loss(self) -> list[float]:
        """Mean over the rows of the epoch so far, per member."""
        return (self.loss_sum / self.rows_seen.clamp_min(1)).tolist()

    def begin_epoch(self, epoch: int, steps: int) -> None:
        """Before the first of the epoch's `steps`: learning rates, empty sums."""
        rates = [[learning_rate(m, epoch + i / steps) for m in self.members] for i in range(steps)]
        self._rates = torch.tensor(rates, device=self.loss_sum.device)  # (steps, K)
        self._first_step = epoch * steps
        self.loss_sum.zero_()
        self.rows_seen.zero_()
        self.network.train()

    def step(self, batch: Batch, index: int) -> None:
        """One training step on the operands at `index`."""
        labels, number = batch.labels[self.task.question], self.optimiser.steps
        self.optimiser.zero_gradient()
        loss = self._backward(batch, index)
        newly_bad = ~loss.isfinite() & (self.bad_step < 0)
        rows = self.task.known(labels).sum()
        with undisturbed():
            self.whole = False
            self.bad_step = torch.where(newly_bad, number, self.bad_step)
            self.loss_sum += loss * rows
            self.rows_seen += rows
            self.optimiser.step(self._rates[number - self._first_step], self.bad_step < 0)
            self.whole = True

    def _backward(self, batch: Batch, index: int) -> Tensor:
        """Losses (K,) of a batch, their gradients added to the members'."""
        labels = batch.labels[self.task.question]
        keep = self.drop_path.keep(self.optimiser.steps, self.network.drop_sites, len(labels))
        outputs = self.network(batch.operands[index], keep)
        loss = self.task.loss(outputs, labels, self.smoothing)
        loss.sum().backward()
        return loss.detach()

    def rehearse(self, batch: Batch, index: int) -> None:
        """Take the memory that a step takes, and change nothing."""
        self.network.train()
        self._backward(batch, index)
        self.optimiser.zero_gradient()
        # what an update holds at its height: its root, itself, and a parameter's part of it
        torch.empty(3 * self.optimiser.flat.numel(), device=self.loss_sum.device)

    def without(self, positions: set[int]) -> Cohort | None:
        """The cohort less the members at `positions`: itself if it has none of them, None if none
        is left."""
        left = [place for place, at in enumerate(self.positions) if at not in positions]
        if len(left) == len(self.positions):
            return self
        if not left:
            return None
        spec, settings, task, device, initial = self._made_of
        members = [(self.positions[place], self.members[place]) for place in left]
        smaller = Cohort(spec, settings, members, task, device, initial)
        smaller.optimiser.take(self.optimiser, left)
        return smaller

    def states(self) -> dict[int, dict[str, Any]]:
        """All that a checkpoint needs, in the middle of an epoch too: each member's by position."""
        sums = zip(self.bad_step.tolist(), self.loss_sum.tolist(), strict=True)
        rows = self.rows_seen.item()
        return {
            position: {"optimiser": state, "bad_step": bad, "loss_sum": loss, "rows_seen": rows}
            for position, state, (bad, loss) in zip(
                self.positions, self.optimiser.states(), sums, strict=True
            )
        }

    def restore(self, states: Mapping[int, Mapping[str, Any]]) -> None:
        """The inverse of `states`, after `begin_epoch`; the members may have been in other
        cohorts when they were taken."""
        mine = [states[position] for position in self.positions]
        self.optimiser.restore([state["optimiser"] for state in mine])
        for name in ("bad_step", "loss_sum"):
            getattr(self, name).copy_(torch.tensor([state[name] for state in mine]))
        self.rows_seen.fill_(mine[0]["rows_seen"])  # the same of all: it depends on the task


def make_cohorts(
    members: Sequence[Member],
    spec: FeatureSpec,
    tasks: Mapping[Question, Task],
    device: torch.device,
    initial: Mapping[str, Tensor] | None = None,
    *,
    at_once: int | None = None,
) -> list[Cohort]:
    """Group members by method, shape and task; on a CPU in cohorts of a few, for its cores, on a
    GPU in cohorts of up to `at_once`, for its memory.

    Every member's question is a key of `tasks`. `initial` is what `SideNetwork.start_from` may
    take. Raises SettingError and MissingTaps naming the method and the setting or the taps.
    """
    groups: dict[tuple[str, Settings, Question], list[tuple[int, Member]]] = {}
    for position, member in enumerate(members):
        task = tasks[member.question]
        if member.smoothing and not task.smooths:
            raise SettingError(f"smoothing = {member.smoothing}: expected 0 for a {task.kind}")
        key = (member.method, method_settings(member), member.question)
        groups.setdefault(key, []).append((position, member))
    cohorts = []
    for (method, settings, question), group in groups.items():
        task = tasks[question]
        own = replace(spec, classes=task.outputs)
        on_gpu = at_once or len(group)
        most = METHODS[method].together_on_cpu if device.type == "cpu" else on_gpu
        try:
            for first in range(0, len(group), most):
                part = group[first : first + most]
                cohorts.append(Cohort(own, settings, part, task, device, initial or {}))
        except LookupError as error:
            raise MissingTaps(str(error)) from None
        except ValueError as error:
            raise SettingError(f"{method}: {error}") from error
    return cohorts
