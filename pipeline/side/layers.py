"""Layers that several side networks share: pooling, the frozen norm, the head, the LSA chain."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.side.contract import FeatureSpec, Operands, member_parameter, zero_parameter
from pipeline.side.rank_space import Constants, run_chain

LN_EPS = 1e-6  # ours: timm's ViTs use it throughout


def pool_tokens(tokens: Tensor, how: str, prefix_tokens: int) -> Tensor:
    """(…, T, D) → (…, D), new memory: `cls` takes the first token, `mean` averages the patches."""
    if how == "cls":
        return tokens[..., 0, :].clone()
    return tokens[..., prefix_tokens:, :].mean(dim=-2)


def check_pool(how: str, spec: FeatureSpec) -> None:
    """Refuse `cls` on a backbone without prefix tokens."""
    if how == "cls" and spec.prefix_tokens == 0:
        raise ValueError("pool = 'cls': this backbone has no class token; expected 'mean'")


class FrozenNorm(nn.Module):
    """The backbone's final norm, as constants: (…, D) → (…, D)."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, spec: FeatureSpec) -> None:
        super().__init__()
        self.kind, self.eps, self.dim = spec.norm, spec.norm_eps, spec.dim
        self.register_buffer("weight", spec.norm_weight)
        self.register_buffer("bias", spec.norm_bias)

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.kind == "layer":
            return nn.functional.layer_norm(x, (self.dim,), weight, bias, self.eps)
        if self.kind == "rms":
            return nn.functional.rms_norm(x, (self.dim,), weight, self.eps)
        return x


class Head(nn.Module):
    """K linear classifiers: (K, B, D) or (B, D) → (K, B, C). Starts small, bias at zero."""

    def __init__(self, spec: FeatureSpec, seeds: Sequence[int], *, stream: int) -> None:
        super().__init__()
        self.weight = member_parameter((spec.classes, spec.dim), seeds, std=0.02, stream=stream)
        self.bias = zero_parameter((spec.classes,), len(seeds))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT + self.bias[:, None]  # (K, B, C)


class LSAChain(nn.Module):
    """K chains of M low-rank attention modules, computed in rank space.

    Module j reads state `state_of[j]`. Parameters a module: LN 2D, projections 3R(D + 1),
    Up (R + 1)D.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        seeds: Sequence[int],
        *,
        state_of: Sequence[int],
        rank: int,
        heads: int,
    ) -> None:
        super().__init__()
        modules, dim = len(state_of), spec.dim
        self.state_of = tuple(state_of)
        self.rank, self.heads, self.dim = rank, heads, dim
        self.norm_weight = nn.Parameter(torch.ones(len(seeds), modules, dim))
        self.norm_bias = zero_parameter((modules, dim), len(seeds))
        self.qkv_weight = member_parameter((modules, 3 * rank, dim), seeds, std=dim**-0.5, stream=1)
        self.qkv_bias = zero_parameter((modules, 3 * rank), len(seeds))
        self.up_weight = zero_parameter((modules, dim, rank), len(seeds))
        self.up_bias = zero_parameter((modules, dim), len(seeds))

    def ups(self) -> Tensor:
        """All Up matrices with their biases as last column, (K, M(R+1), D)."""
        ups = torch.cat([self.up_weight, self.up_bias[..., None]], dim=-1)  # (K, M, D, R+1)
        return ups.transpose(2, 3).flatten(1, 2)

    def forward(self, operands: Operands, keep: Tensor | None) -> Tensor:
        """Attention outputs of all modules, (K, B, T, M(R+1)): sum of Delta = result @ `ups`.

        `operands` holds `state<i>` (B, T, D), centred, and `square<i>` (B, T), its squared norm.
        `keep` (K, M, B) scales each module's branch, or None.
        """
        projections = self.qkv_weight * self.norm_weight[:, :, None]  # (K, M, 3R, D)
        bias = self.qkv_bias + (self.qkv_weight @ self.norm_bias[..., None])[..., 0]  # (K, M, 3R)
        ups = self.ups()
        states = range(max(self.state_of) + 1)
        constants = Constants(
            states=[operands[f"state{i}"] for i in states],
            squares=[operands[f"square{i}"] for i in states],
            state_of=self.state_of,
            keep=keep,
            eps=LN_EPS,
            attend=partial(self._attend, products=operands["state0"].dtype),
        )
        return run_chain(
            projections - projections.mean(dim=-1, keepdim=True),
            bias,
            ups - ups.mean(dim=-1, keepdim=True),
            constants,
        )

    def _attend(self, qkv: Tensor, products: torch.dtype) -> Tensor:
        """(K, B, T, 3R) → (K, B, T, R). On the CPU the plain products below are some four times
        faster, forward and backward, than the fused kernel at R = 16."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(2, 3).to(products)
            for part in qkv.chunk(3, dim=-1)
        )  # each (K, B, H, T, R/H)
        if q.is_cuda:
            out = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (K, B, H, T, T)
            out = torch.softmax(scores, dim=-1) @ v
        return out.transpose(2, 3).flatten(-2).to(qkv.dtype)  # (K, B, T, R)
