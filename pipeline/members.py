"""Members: side networks with their own settings, stacked where their shapes agree.

A stack is one network of K members with one optimiser. What belongs to a member alone (its
initialisation, drop-path stream, learning rate, weight decay, smoothing, the first bad loss) is a
row of a tensor here; nothing mixes members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.batches import Batch, Batches
from pipeline.config import Member, cross
from pipeline.errors import MissingTaps, SettingError
from pipeline.metrics import Scores, Tally, cross_entropy
from pipeline.optim import MemberAdamW
from pipeline.side import ALIASES, METHODS, FeatureSpec, Settings, SideNetwork

EVAL_BATCH = 64


class Stack:
    """Members of one method and one shape: a network of K, its optimiser, its schedules."""

    def __init__(
        self,
        spec: FeatureSpec,
        settings: Settings,
        members: Sequence[tuple[int, Member]],
        device: torch.device,
        initial: Mapping[str, Tensor],
    ) -> None:
        method = METHODS[members[0][1].method]
        self.positions = [position for position, _ in members]
        self.members = [member for _, member in members]
        self.settings = settings
        self.network: SideNetwork = method(spec, settings, [m.seed for m in self.members])
        self.network.start_from(initial)
        self.network.to(device)
        decay = [member.weight_decay for member in self.members]
        self.optimiser = MemberAdamW(self.network, decay, self.network.decayed)
        self.smoothing = torch.tensor([m.smoothing for m in self.members], device=device)
        self.drop_path = torch.tensor([m.drop_path for m in self.members])
        self.bad_step = torch.full((len(members),), -1, device=device)  # of the first bad loss
        self.loss_sum = torch.zeros(len(members), device=device)

    @property
    def parameters(self) -> int:
        """Of one member."""
        return self.optimiser.parameters_each

    def streams(self, epoch: int) -> list[torch.Generator]:
        """One random stream a member for this epoch's drop-path, from its own seed."""
        return [
            torch.Generator().manual_seed((m.seed * 1_000_003 + 7919 * (epoch + 1)) % 2**63)
            for m in self.members
        ]

    def keep(self, batch: int, streams: Sequence[torch.Generator]) -> Tensor | None:
        """Drop-path factors (K, sites, B): 0, or 1 / (1 - rate). None if no member drops."""
        sites = self.network.drop_sites
        if sites == 0 or not self.drop_path.any():
            return None
        rate = self.drop_path[:, None, None]
        draws = torch.stack([torch.rand(sites, batch, generator=s) for s in streams])
        return (draws >= rate).float() / (1 - rate)

    def step(self, batch: Batch, index: int, lr: Tensor, keep: Tensor | None, number: int) -> None:
        """One training step on the operands at `index`; `number` counts steps of the pass."""
        logits = self.network(batch.operands[index], keep)
        loss = cross_entropy(logits, batch.labels, self.smoothing)  # (K,)
        self.optimiser.zero_gradient()
        loss.sum().backward()
        loss = loss.detach()
        newly_bad = ~loss.isfinite() & (self.bad_step < 0)
        self.bad_step = torch.where(newly_bad, number, self.bad_step)
        self.loss_sum += loss
        self.optimiser.step(lr, (self.bad_step < 0) & (lr > 0))

    def state(self) -> dict[str, Any]:
        return {"optimiser": self.optimiser.state(), "bad_step": self.bad_step}

    def restore(self, state: dict[str, Any]) -> None:
        self.optimiser.restore(state["optimiser"])
        self.bad_step.copy_(state["bad_step"])


def make_members(methods: Sequence[str], axes: Mapping[str, Sequence[Any]]) -> tuple[Member, ...]:
    """Every method with every combination of the lists in `axes`; a method's recipe fills the rest.

    An axis that shapes networks applies to the methods that have such a setting. Raises
    SettingError for an unknown method and for an axis that no chosen method has.
    """
    learning = set(Member.__dataclass_fields__) - {"method", "settings"}
    used: set[str] = set()
    members = []
    for name in methods:
        method = ALIASES.get(name, name)
        if method not in METHODS:
            raise SettingError(f"method {method!r}: expected {', '.join(METHODS)}")
        shaping = set(METHODS[method].settings_class.__dataclass_fields__)
        mine = {axis: values for axis, values in axes.items() if axis in learning | shaping}
        used |= set(mine)
        for chosen in cross(mine):
            recipe = {**METHODS[method].recipe, **chosen}
            settings = {axis: recipe.pop(axis) for axis in list(recipe) if axis in shaping}
            members.append(Member(method=method, settings=settings, **recipe))
    for axis in axes:
        if axis not in used:
            raise SettingError(f"{axis}: no such setting in {', '.join(methods)}")
    return tuple(members)


def make_stacks(
    members: Sequence[Member],
    spec: FeatureSpec,
    device: torch.device,
    initial: Mapping[str, Tensor] | None = None,
) -> list[Stack]:
    """Group members by method and shape; `initial` is what `SideNetwork.start_from` may take.

    Raises SettingError and MissingTaps naming the member's method and the setting or the taps.
    """
    groups: dict[tuple[str, Settings], list[tuple[int, Member]]] = {}
    for position, member in enumerate(members):
        settings = method_settings(member)
        groups.setdefault((member.method, settings), []).append((position, member))
    stacks = []
    for (method, settings), group in groups.items():
        try:
            stacks.append(Stack(spec, settings, group, device, initial or {}))
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


@torch.no_grad()
def score(networks: Sequence[SideNetwork], batches: Batches) -> list[list[Scores]]:
    """Scores of every member of every network over all rows, in evaluation mode."""
    tallies = [Tally(network.members, batches.device) for network in networks]
    for network in networks:
        network.eval()
    for batch in batches.epoch(EVAL_BATCH):
        for network, operands, tally in zip(networks, batch.operands, tallies, strict=True):
            tally.add(network(operands).float(), batch.labels)
    return [tally.scores() for tally in tallies]
