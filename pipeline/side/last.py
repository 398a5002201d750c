"""LAST: Low-rank Attention Side-Tuning (Tang, Fu, Zhu, Wu; arXiv 2402.04009, 2024).

    u_0 = z_0,  u_i = F_i(u_{i-1} + z_i),  output = u_m - sum(z_0 .. z_{m-1})

F_i is a chain of S modules x + Up(Attention(LN(x) A_q, LN(x) A_k, LN(x) A_v)), A in D x R. Written
with each module's residual branch Delta, the corrected output is exactly z_m + sum(Delta), and
module input is S_i + sum(earlier Delta), S_i = z_0 + … + z_i. We compute that form: adding z up
and subtracting it again loses digits in half precision.

paper → code: gap g → `gap`; rank R → `rank`; S → `depth`; F_i's modules → `LSAChain`; z_i → tap
z(g i), the output of the group's last block.

What is whose. From tables and reviews that quote the paper [2nd]: groups and gap, chains and
depth, the module, the bias correction. Derived: the recursion. Ours: the head (pool, the
backbone's frozen final norm, a trained linear layer), R = 16, one head, affine LN, biases,
Up = 0 at the start (step 0 is the linear probe), scale (R / heads)^-0.5. The paper's full text was
not to be had, and it has no public code.

Parameters: (L / g) S (2D + 3R(D + 1) + (R + 1) D) + C (D + 1); 618,048 + head on ViT-B/16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.side.contract import (
    FeatureSpec,
    Operands,
    SideNetwork,
    find_taps,
)
from pipeline.side.layers import FrozenNorm, Head, check_pool, pool_tokens, wide
from pipeline.side.lsa import LSAChain, centred
from pipeline.side.settings import LSASettings, setting
from pipeline.side.tap import tap_depths, tap_names


@dataclass(frozen=True, kw_only=True)
class LASTSettings(LSASettings):
    """Shape of a LAST network: `rank` R, `gap` g, `depth` S, attention `heads`, `pool`."""

    gap: int = setting(1, help="blocks per group", reads=True)
    depth: int = setting(1, help="modules per group")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.gap >= 1, "gap", "1 or more")
        self.require(self.depth >= 1, "depth", "1 or more")


class LAST(SideNetwork):
    """K LAST networks on the raw block outputs."""

    method = "last"
    settings_class = LASTSettings

    def __init__(self, spec: FeatureSpec, settings: LASTSettings, seeds: Sequence[int]) -> None:
        super().__init__(spec, settings, seeds)
        self.reads = self._group_ends(settings.gap, tuple(spec.taps))
        self.shape = spec.common_shape(self.reads)
        check_pool(settings.pool, self.shape)
        groups = range(len(self.reads) - 1)
        state_of = [group for group in groups for _ in range(settings.depth)]
        self.chain = LSAChain(self.shape, seeds, state_of=state_of, settings=settings)
        self.final_norm = FrozenNorm(spec, self.shape.dim)
        self.head = Head(self.shape.dim, spec.classes, seeds)

    @staticmethod
    def _group_ends(gap: int, available: Sequence[str]) -> tuple[str, ...]:
        """z0, z_g, z_2g … z_L, L being the deepest tap there is."""
        blocks = max(tap_depths(available), default=0)
        if blocks == 0:
            return find_taps(tap_names((0, 1)), available, "last")
        if blocks % gap:
            raise ValueError(f"gap = {gap}: expected a divisor of the {blocks} blocks")
        return find_taps(tap_names(range(0, blocks + 1, gap)), available, "last")

    @property
    def operand_key(self) -> tuple[str, int]:
        return (self.method, self.settings.gap)

    @property
    def drop_sites(self) -> int:
        return self.chain.plan.modules

    def make_operands(self, features: Mapping[str, Tensor], dtype: torch.dtype) -> Operands:
        """`state<i>`, `square<i>`: S_{i+1}, centred, and its square; `mean`, `cls`: pooled z_m."""
        out: Operands = {}
        total = features[self.reads[0]].to(wide(dtype))
        for i, tap in enumerate(self.reads[1:]):
            total = total + features[tap]
            out[f"state{i}"], out[f"square{i}"] = centred(total, dtype)
        last = features[self.reads[-1]].to(total.dtype)
        for pool in self.settings.POOLS if self.shape.prefix_tokens else ("mean",):
            out[pool] = pool_tokens(last, pool, self.shape.prefix_tokens)
        return out

    def forward(self, operands: Mapping[str, Tensor], keep: Tensor | None = None) -> Tensor:
        corrected = operands[self.settings.pool] + self.chain(operands, keep)  # (K, B, D)
        return self.head(self.final_norm(corrected))
