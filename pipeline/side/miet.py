"""MIET, later MIST: Minimal Interaction Edge (Separated) Tuning.

Tang, Fu, Wu; arXiv 2406.17559, CVPR 2025.

The server runs the backbone and sends one array a row, `Gather*(x, k) = z_0 + … + z_k`; the edge
device trains a small attention network on it and never sees the backbone [2nd]. The device's
network is called LAE, low-rank attention edge network [2nd]; its details are not public.

Ours, "LAE-style": x_0 = the sum; n low-rank attention modules x_j = x_{j-1} + Delta_j of the same
kind as LAST's (R = 16, n = 4); pool, a trained LayerNorm that starts as the backbone's final norm,
a linear head. The start matters: one massive channel may hold nine tenths of the sum's energy,
and a norm that starts at ones lets the head see little else (docs/log.md). With several sums
(`groups` > 1, ours too) the first modules read the first sum, later ones the sums so far added up,
as LAST's modules do: more groups is a walk from MIET to LAST. With `head last` (ours) the head is
LAST's: z_k's pooled token plus the pooled sum of Deltas, through the backbone's frozen final norm.

paper → code: Gather* → `Gather`; k → `k`; LAE → `LSAChain` and head.

Works from a cache of sums (`extract --gather sum`) or from a full one, whose sums it then makes.

Parameters: n (2D + 3R(D + 1) + (R + 1) D) + 2D + C (D + 1); without the 2D with `head last`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pipeline.side.contract import (
    FeatureSpec,
    Operands,
    SideNetwork,
    find_taps,
    zero_parameter,
)
from pipeline.side.gather import Gather, found_among
from pipeline.side.layers import LN_EPS, FrozenNorm, Head, check_pool, pool_tokens, wide
from pipeline.side.lsa import LSAChain, centred
from pipeline.side.settings import LSASettings, setting
from pipeline.side.tap import tap_depths


@dataclass(frozen=True, kw_only=True)
class MIETSettings(LSASettings):
    """Shape of an LAE-style network: `modules` n, `rank` R, `heads`, `pool`, and its sums.

    `head` is what the head reads beside the modules' outputs: the pooled `sum` or z_k's pooled
    token (`last`). `gather`, `k` and `groups` name the sums, as `Gather` does; None is what the
    cache holds, or one plain sum of all taps.
    """

    modules: int = setting(4, help="attention modules")
    head: str = setting(
        "sum", choices=("sum", "last"), help="sum, or last (zk's pooled token)", reads=True
    )
    gather: str | None = setting(
        None,
        choices=("sum", "normsum"),
        help="sum or normsum",
        unset="the cache's, or sum",
        reads=True,
    )
    k: int | None = setting(
        None, help="sum z0 … zk", unset="the cache's, or the deepest", reads=True
    )
    groups: int | None = setting(None, help="number of sums", unset="the cache's, or 1", reads=True)

    recipe: ClassVar[dict[str, Any]] = {"lr": 5e-3}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.modules >= 1, "modules", "1 or more")
        self.require(self.k is None or self.k >= 0, "k", "0 or more")
        self.require(
            self.groups is None or 1 <= self.groups <= self.modules,
            "groups",
            f"from 1 to the {self.modules} modules",
        )


class MIET(SideNetwork):
    """K LAE-style networks on sums over taps."""

    method = "miet"
    settings_class = MIETSettings

    def __init__(self, spec: FeatureSpec, settings: MIETSettings, seeds: Sequence[int]) -> None:
        super().__init__(spec, settings, seeds)
        self.gather = _gather(settings, tuple(spec.taps))
        self.reads = self.gather.names
        sources = self.sources(tuple(spec.taps))
        summed = [tap for tap in sources if tap != self.gather.pool_name]
        self.shape = spec.common_shape(summed)
        check_pool(settings.pool, self.shape)
        groups = self.gather.groups
        state_of = [j * groups // settings.modules for j in range(settings.modules)]
        dim = self.shape.dim
        self.chain = LSAChain(self.shape, seeds, state_of=state_of, settings=settings)
        if settings.head == "last":
            self.final_norm = FrozenNorm(spec, dim)
        else:
            self.norm_weight = nn.Parameter(torch.ones(len(seeds), dim))
            self.norm_bias = zero_parameter((dim,), len(seeds))
            self._start_norm(spec)
        self.head = Head(dim, spec.classes, seeds)

    @torch.no_grad()
    def _start_norm(self, spec: FeatureSpec) -> None:
        """At the backbone's own, which knows its massive channels."""
        starts = ((self.norm_weight, spec.norm_weight), (self.norm_bias, spec.norm_bias))
        for parameter, start in starts:
            if start is not None:
                parameter.copy_(start.expand_as(parameter))

    def sources(self, available: Sequence[str]) -> tuple[str, ...]:
        """The sums if they are there, else the taps that they are made of."""
        if all(name in available for name in self.reads):
            return self.reads
        if not tap_depths(available):
            return find_taps(self.reads, available, self.method)
        parts = [tap for taps in self.gather.sums.values() for tap in taps]
        return find_taps(parts, available, self.method)

    @property
    def operand_key(self) -> tuple[str, Gather]:
        return (self.method, self.gather)

    @property
    def drop_sites(self) -> int:
        return self.settings.modules

    def make_operands(self, features: Mapping[str, Tensor], dtype: torch.dtype) -> Operands:
        """`state<g>`, `square<g>`: sums 0 … g, centred, and the square; `mean`, `cls`: pooled."""
        given = all(name in features for name in self.reads)
        prefix = self.shape.prefix_tokens
        made = features if given else self.gather.reduce(features, prefix)
        out: Operands = {}
        total: Tensor | None = None
        for group, name in enumerate(self.gather.sums):
            addend = made[name].to(wide(dtype))
            total = addend if total is None else total + addend
            out[f"state{group}"], out[f"square{group}"] = centred(total, dtype)
        assert total is not None
        for pool in self.settings.POOLS if prefix else ("mean",):
            if self.gather.pooled:
                pooled = made[self.gather.pool_name].to(total.dtype)
                out[pool] = pooled[:, 0 if pool == "cls" else -1].clone()
            else:
                out[pool] = pool_tokens(total, pool, prefix)
        return out

    def forward(self, operands: Mapping[str, Tensor], keep: Tensor | None = None) -> Tensor:
        x = operands[self.settings.pool] + self.chain(operands, keep)  # (K, B, D)
        if self.settings.head == "last":
            return self.head(self.final_norm(x))
        x = nn.functional.layer_norm(x, x.shape[-1:], eps=LN_EPS)
        return self.head(x * self.norm_weight[:, None] + self.norm_bias[:, None])


def _gather(settings: MIETSettings, available: Sequence[str]) -> Gather:
    """The sums that the settings ask for; what they leave open is as in the cache of sums."""
    there = found_among(available) or Gather(k=max(tap_depths(available), default=0))
    return Gather(
        k=there.k if settings.k is None else settings.k,
        groups=there.groups if settings.groups is None else settings.groups,
        normed=there.normed if settings.gather is None else settings.gather == "normsum",
        pooled=settings.head == "last",
    )
