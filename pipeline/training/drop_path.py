"""Drop-path without a stream: which branches are dropped follows from a member's seed, the step's
number and the branch alone, on any device.

A draw is a hash of a counter [ours]: SplitMix64's finaliser (Steele, Lea, Flood, OOPSLA 2014),
applied to the key of member and step, and once more to the key and the place of the draw. A
checkpoint therefore holds no state of it, a member draws alone what it draws among others, and a
run that goes on upon another device draws the same. Nothing is sent to a GPU at a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class DropPath:
    """For K members with a seed and a rate each."""

    def __init__(self, seeds: Sequence[int], rates: Sequence[float], device: torch.device) -> None:
        self.active = any(rates)
        self._keys = torch.tensor([_signed(seed * _GAMMA) for seed in seeds], device=device)
        self._rates = torch.tensor(rates, device=device)[:, None, None]

    def keep(self, step: int, sites: int, rows: int) -> Tensor | None:
        """Factors (K, sites, rows) of one step: 0, or 1 / (1 - rate). None if nobody drops."""
        if not (self.active and sites):
            return None
        keys = _mixed(self._keys + _signed(step * _FIRST))  # (K,)
        places = torch.arange(sites * rows, device=keys.device).view(sites, rows)
        drawn = _mixed(keys[:, None, None] + places * _signed(_GAMMA))
        uniform = _shifted(drawn, 40).to(self._rates.dtype) / 2**24  # the 24 highest bits
        return (uniform >= self._rates).to(self._rates.dtype) / (1 - self._rates)


def _mixed(values: Tensor) -> Tensor:
    """SplitMix64's finaliser; int64 stands for its unsigned numbers, products wrap around."""
    values = (values ^ _shifted(values, 30)) * _signed(_FIRST)
    values = (values ^ _shifted(values, 27)) * _signed(_SECOND)
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, by: int) -> Tensor:
    """To the right, filled up with zeros."""
    return (values >> by) & ((1 << (64 - by)) - 1)


def _signed(number: int) -> int:
    """A number modulo 2^64, as int64 holds it."""
    number %= 2**64
    return number - 2**64 if number >= 2**63 else number
