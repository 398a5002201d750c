"""Members: side networks with their own settings, stacked where their shapes agree.

A stack is one network of K members with one optimiser. What belongs to a member alone (its
initialisation, drop-path stream, learning rate, weight decay, smoothing, the first bad loss) is a
row of a tensor here; nothing mixes members. A member whose schedule has ended, or that was stopped,
leaves its stack between epochs, and costs nothing from then on: no step, no operands, no reads.
What a checkpoint holds of a member does not depend on the stack it was in: a CPU and a GPU, or two
GPUs, stack differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.config import Member, cross, fitting_warmup
from pipeline.errors import MissingTaps, SettingError
from pipeline.features.operands import Batch, Batches
from pipeline.process import undisturbed
from pipeline.side import ALIASES, METHODS
from pipeline.side.contract import FeatureSpec, SideNetwork
from pipeline.side.settings import Settings
from pipeline.tasks import Scores, Task
from pipeline.training.drop_path import DropPath
from pipeline.training.optim import MemberAdamW, learning_rate
from pipeline.training.workers import Workers

EVAL_BATCH = 64
LEARNING = frozenset(Member.__dataclass_fields__) - {"method", "settings"}  # every method's


class Stack:
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
        labels, number = batch.labels[self.task.name], self.optimiser.steps
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
        labels = batch.labels[self.task.name]
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

    def without(self, positions: set[int]) -> Stack | None:
        """The stack less the members at `positions`: itself if it has none of them, None if none is
        left."""
        left = [place for place, at in enumerate(self.positions) if at not in positions]
        if len(left) == len(self.positions):
            return self
        if not left:
            return None
        spec, settings, task, device, initial = self._made_of
        members = [(self.positions[place], self.members[place]) for place in left]
        smaller = Stack(spec, settings, members, task, device, initial)
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
        """The inverse of `states`, after `begin_epoch`; the members may have been stacked otherwise
        when they were taken."""
        mine = [states[position] for position in self.positions]
        self.optimiser.restore([state["optimiser"] for state in mine])
        for name in ("bad_step", "loss_sum"):
            getattr(self, name).copy_(torch.tensor([state[name] for state in mine]))
        self.rows_seen.fill_(mine[0]["rows_seen"])  # the same of all: it depends on the task


def make_members(methods: Sequence[str], axes: Mapping[str, Sequence[Any]]) -> tuple[Member, ...]:
    """Every method with every combination of the lists in `axes`; a method's recipe fills the rest,
    its warm-up no longer than `fitting_warmup` lets it be.

    An axis that shapes networks applies to the methods that have such a setting. What decides
    nothing for a member stays at its default there, and members that are then alike are one. Raises
    SettingError for an unknown method, a value listed twice, and one that decides nothing at all.
    """
    names = [ALIASES.get(name, name) for name in methods]
    for axis, values in {"method": names, **axes}.items():
        if len(set(values)) < len(values):
            listed = ", ".join(map(str, values))
            raise SettingError(f"{axis}: expected every value once, came {listed}")
    members: dict[str, Member] = {}
    idle: dict[tuple[str, Any], str] = {}
    acting: set[tuple[str, Any]] = set()
    for method in names:
        if method not in METHODS:
            raise SettingError(f"method {method!r}: expected {', '.join(METHODS)}")
        known = LEARNING | set(METHODS[method].settings_class.__dataclass_fields__)
        for chosen in cross({axis: values for axis, values in axes.items() if axis in known}):
            member, reasons = _plain(_with_recipe(method, chosen))
            members.setdefault(repr(member), member)
            idle |= {(axis, chosen[axis]): why for axis, why in reasons.items() if axis in chosen}
            acting |= {(axis, value) for axis, value in chosen.items() if axis not in reasons}
    for axis, values in axes.items():
        for value in values:
            if (axis, value) in idle.keys() - acting:
                why = idle[axis, value]
                raise SettingError(f"{axis} = {value}: decides nothing, as {why}; leave it out")
            if (axis, value) not in acting:
                raise SettingError(f"{axis}: no such setting in {', '.join(methods)}")
    return tuple(members.values())


def make_member(method: str, chosen: Mapping[str, Any]) -> Member:
    """One of `make_members`, of settings that the method has; none is refused for being idle."""
    return _plain(_with_recipe(method, chosen))[0]


def _with_recipe(method: str, chosen: Mapping[str, Any]) -> Member:
    values = {**METHODS[method].settings_class.recipe, **chosen}
    if "warmup_epochs" not in chosen:
        usual = values.get("warmup_epochs", fitting_warmup(Member.epochs))
        values["warmup_epochs"] = fitting_warmup(values.get("epochs", Member.epochs), usual)
    settings = {name: values.pop(name) for name in list(values) if name not in LEARNING}
    return Member(method=method, settings=settings, **values)


def _plain(member: Member) -> tuple[Member, dict[str, str]]:
    """The member with what decides nothing for it at its default; what that changes, and why."""
    settings = method_settings(member)
    reasons = settings.idle()
    if not settings.drops:
        reasons["drop_path"] = f"{member.method} has no residual branch to drop"
    if not member.warmup_epochs:
        reasons["warmup_lr"] = "there is no warm-up"
    defaults = {n: getattr(Member if n in LEARNING else type(settings), n) for n in reasons}
    values = {**vars(settings), **vars(member)}
    changed = {name: why for name, why in reasons.items() if values[name] != defaults[name]}
    kept = {name: value for name, value in member.settings.items() if name not in reasons}
    learning = {name: defaults[name] for name in reasons if name in LEARNING}
    return replace(member, settings=kept, **learning), changed


def make_stacks(
    members: Sequence[Member],
    spec: FeatureSpec,
    tasks: Mapping[str, Task],
    device: torch.device,
    initial: Mapping[str, Tensor] | None = None,
    *,
    at_once: int | None = None,
) -> list[Stack]:
    """Group members by method, shape and task; on a CPU in stacks of a few, for its cores, on a GPU
    in stacks of up to `at_once`, for its memory.

    Every member's task is a key of `tasks`. `initial` is what `SideNetwork.start_from` may take.
    Raises SettingError and MissingTaps naming the member's method and the setting or the taps.
    """
    groups: dict[tuple[str, Settings, str], list[tuple[int, Member]]] = {}
    for position, member in enumerate(members):
        task = tasks[member.task]
        if member.smoothing and not task.smooths:
            raise SettingError(f"smoothing = {member.smoothing}: expected 0 for a {task.kind}")
        key = (member.method, method_settings(member), member.task)
        groups.setdefault(key, []).append((position, member))
    stacks = []
    for (method, settings, name), group in groups.items():
        task = tasks[name]
        own = replace(spec, classes=task.outputs)
        on_gpu = at_once or len(group)
        most = METHODS[method].stacked_on_cpu if device.type == "cpu" else on_gpu
        try:
            for first in range(0, len(group), most):
                part = group[first : first + most]
                stacks.append(Stack(own, settings, part, task, device, initial or {}))
        except LookupError as error:
            raise MissingTaps(str(error)) from None
        except ValueError as error:
            raise SettingError(f"{method}: {error}") from error
    return stacks


def method_settings(member: Member) -> Settings:
    """The settings object of a member's method. Raises SettingError naming what it knows."""
    if member.method not in METHODS:
        raise SettingError(f"method {member.method!r}: expected {', '.join(METHODS)}")
    settings_class = METHODS[member.method].settings_class
    known = list(settings_class.__dataclass_fields__)
    unknown = sorted(set(member.settings) - set(known))
    if unknown:
        raise SettingError(
            f"{member.method} has no setting {', '.join(unknown)}; it has {', '.join(known)}"
        )
    try:
        return settings_class(**member.settings)
    except ValueError as error:
        raise SettingError(f"{member.method}: {error}") from error


def step_bytes(
    stacks: Sequence[Stack], batches: Batches, held_out: Batches, batch_size: int
) -> int:
    """Bytes of a GPU's memory that training takes beside members and features; 0 on a CPU.

    Measured, by a step and a look at held-out rows of each stack on blank batches: no formula
    knows what the kernels of a release take. Raises torch.OutOfMemoryError.
    """
    if batches.device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(batches.device)
    before = torch.cuda.memory_allocated(batches.device)
    for place, stack in enumerate(stacks):
        stack.rehearse(batches.blank(min(batch_size, len(batches))), place)
        if len(held_out):
            with torch.no_grad():
                stack.network.eval()
                size = min(EVAL_BATCH, len(held_out))
                stack.network(held_out.blank(size).operands[place])
    peak = torch.cuda.max_memory_allocated(batches.device) - before
    torch.cuda.empty_cache()  # what torch keeps would not count as free
    return peak + batches.row_bytes * batch_size  # the next batch is made before one is let go


def score(
    networks: Sequence[tuple[int, SideNetwork, Task]], batches: Batches, workers: Workers
) -> list[list[Scores]]:
    """Scores of every member of every network over all rows, in evaluation mode.

    A network stands beside the place of its operands in a batch.
    """
    tallies = [task.tally(network.members, batches.device) for _, network, task in networks]
    for _, network, _ in networks:
        network.eval()
    for batch in batches.epoch(EVAL_BATCH):

        def add(i: int, batch: Batch = batch) -> None:
            place, network, task = networks[i]
            with torch.no_grad():  # a setting of the thread
                tallies[i].add(network(batch.operands[place]).float(), batch.labels[task.name])

        workers.each(add, range(len(networks)))
    return [tally.scores() for tally in tallies]
