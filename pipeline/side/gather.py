"""Sums over taps: what MIET's server sends instead of all layers.

    Gather*(x, k) = z_0 + … + z_k                      the paper's [2nd]; k = L by default [ours]

Ours, and marked so wherever they are offered:
    groups   z_0 … z_k cut into that many runs, one sum each (as many times the bytes)
    normed   each map is normalised, token by token and without weights, before it is added, so
             that no layer drowns the others
    pooled   z_k's class token and its mean patch token are kept beside the sums (1 % of the bytes)

Sums are taken in float32, whatever comes in. Their names are in `tap.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.side.layers import LN_EPS, wide
from pipeline.side.tap import Tap, parsed


@dataclass(frozen=True, kw_only=True)
class Gather:
    """Which sums over z0 … zk. Raises ValueError if there are more groups than taps."""

    k: int
    groups: int = 1
    normed: bool = False
    pooled: bool = False

    KINDS = ("sum", "normsum")

    def __post_init__(self) -> None:
        if self.k < 0 or not 1 <= self.groups <= self.k + 1:
            raise ValueError(
                f"{self.groups} groups of z0 … z{self.k}: expected 1 to {self.k + 1} groups"
            )

    @functools.cached_property
    def sums(self) -> dict[str, tuple[str, ...]]:
        """Name of each sum → the taps that are added up in it; lengths differ by at most one."""
        shortest, longer = divmod(self.k + 1, self.groups)
        out: dict[str, tuple[str, ...]] = {}
        begin = 0
        for group in range(self.groups):
            end = begin + shortest + (group < longer)
            tap = Tap(end - 1, first=begin, normed=self.normed)
            out[str(tap)] = tap.parts
            begin = end
        return out

    @property
    def deepest(self) -> str:
        """Name of z_k."""
        return str(Tap(self.k))

    @property
    def pool_name(self) -> str:
        """Name of what is pooled from z_k."""
        return str(Tap(self.k, pooled=True))

    @property
    def names(self) -> tuple[str, ...]:
        """All that is stored."""
        return (*self.sums, self.pool_name) if self.pooled else tuple(self.sums)

    def addend(self, tokens: Tensor) -> Tensor:
        """What a map (…, T, D) adds to its sum, in float32 or wider."""
        values = tokens.to(wide(tokens.dtype))
        if self.normed:
            return torch.nn.functional.layer_norm(values, values.shape[-1:], eps=LN_EPS)
        return values

    def reduce(self, features: Mapping[str, Tensor], prefix_tokens: int) -> dict[str, Tensor]:
        """All of `names` from the taps (…, T, D), in float32 or wider."""
        out = {}
        for name, taps in self.sums.items():
            total = self.addend(features[taps[0]]).clone()
            for tap in taps[1:]:
                total += self.addend(features[tap])
            out[name] = total
        if self.pooled:
            out[self.pool_name] = pool_both(features[self.deepest], prefix_tokens)
        return out


def pool_both(tokens: Tensor, prefix_tokens: int) -> Tensor:
    """(…, T, D) → (…, 2, D) in float32 or wider: first token and mean patch token; (…, 1, D) where
    there is no prefix token."""
    tokens = tokens.to(wide(tokens.dtype))
    mean = tokens[..., prefix_tokens:, :].mean(dim=-2, keepdim=True)
    return torch.cat([tokens[..., :1, :], mean], dim=-2) if prefix_tokens else mean


def found_among(taps: Sequence[str]) -> Gather | None:
    """The gather whose sums are among the names of `taps`; None if none is a sum."""
    there = parsed(taps)
    sums = [tap for tap in there if tap.first is not None]
    if not sums:
        return None
    k = sums[-1].depth
    return Gather(k=k, groups=len(sums), normed=sums[0].normed, pooled=Tap(k, pooled=True) in there)
