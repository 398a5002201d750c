"""AdamW and learning-rate schedules for K members at once, each with its own settings.

The parameters of a network lie one after the other in one flat buffer, each as (K, its size), so
that the moments take a few elementwise operations whatever the number of parameters. Equal to
`torch.optim.AdamW` member by member (a test holds it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import Member

BETAS, EPS = (0.9, 0.999), 1e-8
_STATE = ("flat", "mean", "square")  # parameters and their moments


class MemberAdamW:
    """AdamW over a module whose parameters all have a leading axis K.

    `decayed(name)` says which parameters weight decay applies to. Takes the parameters over: they
    become views into `flat` (N,), their gradients views into `gradient`.
    """

    def __init__(
        self, network: nn.Module, weight_decay: Sequence[float], decayed: Callable[[str], bool]
    ) -> None:
        named = list(network.named_parameters())
        members, device = len(weight_decay), named[0][1].device
        sizes = [parameter.numel() for _, parameter in named]
        self.flat = torch.empty(sum(sizes), device=device)
        self.gradient, self.mean, self.square, self.decay = (
            torch.zeros_like(self.flat) for _ in range(4)
        )
        self.parameters_each = sum(sizes) // members
        self.steps = 0
        self._shapes = [(members, size // members) for size in sizes]
        rates = torch.tensor(weight_decay, device=device)[:, None]
        places = zip(self._blocks(self.flat), self._blocks(self.gradient), strict=True)
        decays = self._blocks(self.decay)
        for (name, parameter), (values, gradient), decay in zip(named, places, decays, strict=True):
            values.copy_(parameter.detach().flatten(1))
            parameter.data = values.view(parameter.shape)
            parameter.grad = gradient.view(parameter.shape)
            decay.copy_((rates * decayed(name)).expand_as(decay))

    def _blocks(self, flat: Tensor) -> list[Tensor]:
        """The parameters' places in a flat buffer, each (K, size of one member's)."""
        parts = flat.split([members * size for members, size in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    @torch.no_grad()
    def step(self, lr: Tensor, alive: Tensor) -> None:
        """One update; `lr` (K,), `alive` (K,) bool. Members not alive keep their parameters."""
        self.steps += 1
        beta1, beta2 = BETAS
        self.mean.lerp_(self.gradient, 1 - beta1)
        self.square.mul_(beta2).addcmul_(self.gradient, self.gradient, value=1 - beta2)
        root = (self.square / (1 - beta2**self.steps)).sqrt_().add_(EPS)
        update = (self.mean / root).div_(1 - beta1**self.steps)
        update.addcmul_(self.decay, self.flat)
        for values, change in zip(self._blocks(self.flat), self._blocks(update), strict=True):
            values -= torch.where(alive[:, None], lr[:, None] * change, 0.0)

    def zero_gradient(self) -> None:
        """Set all gradients to zero, in place."""
        self.gradient.zero_()

    def take(self, other: MemberAdamW, places: Sequence[int]) -> None:
        """Go on with the members at `places` of `other`: their parameters, moments and steps."""
        self.steps = other.steps
        for name in _STATE:
            blocks = zip(self._blocks(getattr(self, name)), other._blocks(getattr(other, name)),
                         strict=True)  # fmt: skip
            for mine, theirs in blocks:
                mine.copy_(theirs[list(places)])

    def states(self) -> list[dict[str, Any]]:
        """Each member's steps, parameters and moments, (its parameters,) each: for a checkpoint."""
        copies = {name: self._blocks(getattr(self, name).cpu()) for name in _STATE}
        return [
            {"steps": self.steps}
            | {name: torch.cat([block[k] for block in blocks]) for name, blocks in copies.items()}
            for k in range(self._shapes[0][0])
        ]

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        """The inverse of `states`; the network's parameters follow, being views."""
        (self.steps,) = {state["steps"] for state in states}
        for name in _STATE:
            members = [state[name].split([size for _, size in self._shapes]) for state in states]
            for block, parts in zip(self._blocks(getattr(self, name)), zip(*members, strict=True),
                                    strict=True):  # fmt: skip
                block.copy_(torch.stack(parts))


def learning_rate(member: Member, epoch: float) -> float:
    """Linear warm-up from `warmup_lr`, then the schedule; `epoch` counts fractions.

    The cosine ends at zero at `epochs`; after that the rate is zero: the member is finished.
    """
    if epoch >= member.epochs:
        return 0.0
    if epoch < member.warmup_epochs:
        rise = epoch / member.warmup_epochs
        return member.warmup_lr + (member.lr - member.warmup_lr) * rise
    if member.sched == "constant":
        return member.lr
    progress = (epoch - member.warmup_epochs) / (member.epochs - member.warmup_epochs)
    return member.lr * 0.5 * (1 + math.cos(math.pi * progress))
