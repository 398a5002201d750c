"""The LSA chain: K members' chains of low-rank attention modules, and their parameters.

    x_j = S_j + sum_{i<j} Delta_i          S_j a constant of the data, wide (B, T, D)
    Delta_j = Attention(LN(x_j) A_q, LN(x_j) A_k, LN(x_j) A_v) Up + up_bias

How that is computed without a wide array a member: `pipeline/side/rank_space.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.side.contract import TokenShape, member_parameter, zero_parameter
from pipeline.side.rank_space import Data, Plan, RankSpace
from pipeline.side.settings import LSASettings


def centred(state: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A state (B, T, D) in float32 → (centred over D in `dtype`, its squared norm (B, T))."""
    rounded = (state - state.mean(dim=-1, keepdim=True)).to(dtype)
    precise = rounded.to(state.dtype)
    return rounded, (precise * precise).sum(dim=-1)


class LSAChain(nn.Module):
    """K chains of M low-rank attention modules, and what the head reads of them.

    Module j reads state `state_of[j]`. Parameters a module: LN 2D, projections 3R(D + 1),
    Up (R + 1)D.
    """

    def __init__(
        self,
        shape: TokenShape,
        seeds: Sequence[int],
        *,
        state_of: Sequence[int],
        settings: LSASettings,
    ) -> None:
        super().__init__()
        dim, modules, rank = shape.dim, len(state_of), settings.rank
        self.plan = Plan(
            state_of=tuple(state_of),
            rank=rank,
            heads=settings.heads,
            prefix=None if settings.pool == "cls" else shape.prefix_tokens,
        )
        self.norm_weight = nn.Parameter(torch.ones(len(seeds), modules, dim))
        self.norm_bias = zero_parameter((modules, dim), len(seeds))
        self.qkv_weight = member_parameter((modules, 3 * rank, dim), seeds, std=dim**-0.5, stream=1)
        self.qkv_bias = zero_parameter((modules, 3 * rank), len(seeds))
        self.up_weight = zero_parameter((modules, dim, rank), len(seeds))
        self.up_bias = zero_parameter((modules, dim), len(seeds))

    def forward(self, operands: Mapping[str, Tensor], keep: Tensor | None) -> Tensor:
        """The sum of all modules' Delta, pooled over tokens: (K, B, D).

        `operands` holds `state<i>` (B, T, D), centred, and `square<i>` (B, T), its squared norm.
        `keep` (K, M, B) scales each module's branch, or None.
        """
        plan = self.plan
        data = Data(
            states=[operands[f"state{i}"] for i in range(len(plan.modules_of))],
            squares=[operands[f"square{i}"] for i in range(len(plan.modules_of))],
            keep=keep,
            learning=torch.is_grad_enabled(),
        )
        projections = self.qkv_weight * self.norm_weight[:, :, None]  # (K, M, 3R, D)
        shift = (self.qkv_weight * self.norm_bias[:, :, None]).sum(dim=-1)
        bias = self.qkv_bias + shift  # (K, M, 3R)
        sharpness = plan.sharpness(bias)  # the attention's (R / heads)^-0.5, on the queries
        projections, bias = projections * sharpness[:, None], bias * sharpness
        ups = torch.cat([self.up_weight.mT, self.up_bias[:, :, None]], dim=2)  # (K, M, R+1, D)
        centred_ups = ups - ups.mean(dim=-1, keepdim=True)
        inner = plan.inner(projections, centred_ups, data.states[0].dtype)
        pooled = RankSpace.apply(
            plan, data, projections, centred_ups, bias[..., None], inner
        )  # (K, B, M(R+1))
        return pooled @ ups.flatten(1, 2)
