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
as LAST's modules do: more groups is a walk from MIET to LAST.

paper → code: Gather* → `Gather`; k → `k`; LAE → `LSAChain` and head.

Works from a cache of sums (`extract --gather sum`) or from a full one, whose sums it then makes.

Parameters: n (2D + 3R(D + 1) + (R + 1) D) + 2D + C (D + 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.side.contract import (
    FeatureSpec,
    Operands,
    SideNetwork,
    block_taps,
    find_taps,
    zero_parameter,
)
from pipeline.side.gather import Gather, found_among
from pipeline.side.layers import (
    LN_EPS,
    Head,
    LSAChain,
    LSASettings,
    centred,
    check_pool,
    pool_tokens,
    wide,
)


@dataclass(frozen=True, kw_only=True)
class MIETSettings(LSASettings):
    """Shape of an LAE-style network: `modules` n, `rank` R, `heads`, `pool`, and its sums.

    `gather`, `k` and `groups` name the sums, as `Gather` does; None is what the cache holds, or
    one plain sum of all taps.
    """

    modules: int = 4
    gather: str | None = None
    k: int | None = None
    groups: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.modules >= 1, "modules", "1 or more")
        kinds = (None, *Gather.KINDS)
        self.require(self.gather in kinds, "gather", " or ".join(Gather.KINDS))
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
        self.reads = tuple(self.gather.sums)
        self.shape = spec.common_shape(self.sources(tuple(spec.taps)), self.method)
        check_pool(settings.pool, self.shape)
        groups = self.gather.groups
        state_of = [j * groups // settings.modules for j in range(settings.modules)]
        dim = self.shape.dim
        self.chain = LSAChain(
            dim, seeds, state_of=state_of, rank=settings.rank, heads=settings.heads
        )
        self.norm_weight = nn.Parameter(torch.ones(len(seeds), dim))
        self.norm_bias = zero_parameter((dim,), len(seeds))
        with torch.no_grad():  # on the backbone's norm, which knows its massive channels
            for parameter, start in (
                (self.norm_weight, spec.norm_weight),
                (self.norm_bias, spec.norm_bias),
            ):
                if start is not None:
                    parameter.copy_(start.expand_as(parameter))
        self.head = Head(dim, spec.classes, seeds)

    def sources(self, available: Sequence[str]) -> tuple[str, ...]:
        """The sums if they are there, else the taps that they are made of."""
        if all(name in available for name in self.reads):
            return self.reads
        if not block_taps(available):
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
        sums = features if given else self.gather.add_up(features)
        out: Operands = {}
        total = sums[self.reads[0]].to(wide(dtype))
        for group, name in enumerate(self.reads):
            if group:
                total = total + sums[name]
            out[f"state{group}"], out[f"square{group}"] = centred(total, dtype)
        for pool in self.settings.POOLS if self.shape.prefix_tokens else ("mean",):
            out[pool] = pool_tokens(total, pool, self.shape.prefix_tokens)
        return out

    def forward(self, operands: Mapping[str, Tensor], keep: Tensor | None = None) -> Tensor:
        branches = self.chain(operands, keep)  # (K, B, T, n(R+1))
        pooled = pool_tokens(branches, self.settings.pool, self.shape.prefix_tokens)
        x = operands[self.settings.pool] + pooled @ self.chain.ups()  # (K, B, D)
        x = nn.functional.layer_norm(x, x.shape[-1:], eps=LN_EPS)
        return self.head(x * self.norm_weight[:, None] + self.norm_bias[:, None])


def _gather(settings: MIETSettings, available: Sequence[str]) -> Gather:
    """The sums that the settings ask for; what they leave open is as in the cache of sums."""
    there = found_among(available) or Gather(k=max(block_taps(available), default=0))
    return Gather(
        k=there.k if settings.k is None else settings.k,
        groups=there.groups if settings.groups is None else settings.groups,
        normed=there.normed if settings.gather is None else settings.gather == "normsum",
    )
