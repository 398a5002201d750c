"""AdamW and learning-rate schedules for K members at once, each with its own settings.

The parameters of a network of K members are laid into one (K, P) matrix, so that a step is a few
elementwise operations whatever the number of parameters, and a setting per member is a column.
Equal to `torch.optim.AdamW` member by member (a test holds it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import Member

BETAS, EPS = (0.9, 0.999), 1e-8


class MemberAdamW:
    """AdamW over a module whose parameters all have a leading axis K.

    `decayed(name)` says which parameters weight decay applies to. Takes the parameters over: they
    become views into `flat` (K, P), their gradients views into `gradient`.
    """

    def __init__(
        self, network: nn.Module, weight_decay: Sequence[float], decayed: Callable[[str], bool]
    ) -> None:
        named = list(network.named_parameters())
        members, device = len(weight_decay), named[0][1].device
        sizes = [parameter[0].numel() for _, parameter in named]
        self.flat = torch.empty(members, sum(sizes), device=device)
        self.gradient = torch.zeros_like(self.flat)
        self.mean = torch.zeros_like(self.flat)
        self.square = torch.zeros_like(self.flat)
        self.steps = 0
        decays = torch.zeros(sum(sizes), device=device)
        begin = 0
        for (name, parameter), size in zip(named, sizes, strict=True):
            place = slice(begin, begin + size)
            self.flat[:, place] = parameter.detach().flatten(1)
            parameter.data = self.flat[:, place].unflatten(1, parameter.shape[1:])
            parameter.grad = self.gradient[:, place].unflatten(1, parameter.shape[1:])
            decays[place] = float(decayed(name))
            begin += size
        self.decay = torch.tensor(weight_decay, device=device)[:, None] * decays  # (K, P)

    def step(self, lr: Tensor, alive: Tensor) -> None:
        """One update; `lr` (K,), `alive` (K,) bool. Members not alive keep their parameters."""
        self.steps += 1
        beta1, beta2 = BETAS
        self.mean.lerp_(self.gradient, 1 - beta1)
        self.square.mul_(beta2).addcmul_(self.gradient, self.gradient, value=1 - beta2)
        root = (self.square / (1 - beta2**self.steps)).sqrt_().add_(EPS)
        update = self.mean / root / (1 - beta1**self.steps) + self.decay * self.flat
        update *= -lr[:, None]
        self.flat += torch.where(alive[:, None], update, 0.0)

    def zero_gradient(self) -> None:
        """Set all gradients to zero, in place."""
        self.gradient.zero_()

    def state(self) -> dict[str, Any]:
        """Parameters and moments, for a checkpoint."""
        return {k: getattr(self, k) for k in ("flat", "mean", "square", "steps")}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`; the network's parameters follow, being views."""
        self.steps = state["steps"]
        for name in ("flat", "mean", "square"):
            getattr(self, name).copy_(state[name])


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
