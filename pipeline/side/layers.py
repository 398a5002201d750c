"""Layers that several side networks share: pooling, the frozen norm, the head, the LSA chain.

The LSA chain is the heart. Written plainly, module j of one member computes

    x_j = S_j + sum_{i<j} Delta_i          S_j a constant of the data, wide (B, T, D)
    Delta_j = Attention(LN(x_j) A_q, LN(x_j) A_k, LN(x_j) A_v) Up + up_bias

Computed plainly, each member keeps two wide arrays a module. But Delta_i = A_i W_i^T, with A_i
(B, T, R) the attention output: a member's own part of the state never leaves rank space. With

    P   = (A_q, A_k, A_v)^T * gain          (3R, D)  LN's gain folded into the projections
    W_i = (Up, up_bias)                     (D, R+1) and a 1 appended to A_i
    _c  = mean over D taken away

LN(x_j) needs no wide array of its own:

    LN(x_j) P^T = (S_c P_c^T + sum_i A_i W_i,c^T P_c^T) / sqrt(variance + eps)
    D variance  = |S_c|^2 + 2 sum_i (S_c W_i,c) . A_i + |sum_i A_i W_i,c^T|^2

so the only wide product is S_c (P_c^T, W_1,c, …), one operand for all K members, which needs no
gradient itself. This is an exact rewriting (a float64 test states it), not an approximation; a
member's memory falls about twelvefold at D = 768, R = 16. Sums that cancel (the variance) stay in
float32 whatever the precision of the products.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.side.contract import (
    FeatureSpec,
    Operands,
    Settings,
    TokenShape,
    member_parameter,
    zero_parameter,
)

LN_EPS = 1e-6  # ours: timm's ViTs use it throughout


def pool_tokens(tokens: Tensor, how: str, prefix_tokens: int) -> Tensor:
    """(…, T, D) → (…, D), new memory: `cls` takes the first token, `mean` averages the patches."""
    if how == "cls":
        return tokens[..., 0, :].clone()
    return tokens[..., prefix_tokens:, :].mean(dim=-2)


def check_pool(how: str, shape: TokenShape) -> None:
    """Refuse a pool that reads the class token of a backbone that has none."""
    if how == "cls" and shape.prefix_tokens == 0:
        raise ValueError("pool = 'cls': this backbone has no class token; expected 'mean'")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision for sums and narrow operands beside products in `dtype`."""
    return torch.promote_types(dtype, torch.float32)


class FrozenNorm(nn.Module):
    """The backbone's final norm, as constants: (…, D) → (…, D).

    A tap of another width than the norm's (an earlier stage's) is normed without weights [ours].
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, spec: FeatureSpec, dim: int) -> None:
        super().__init__()
        self.kind, self.eps = spec.norm, spec.norm_eps
        fits = spec.norm_weight is None or len(spec.norm_weight) == dim
        self.register_buffer("weight", spec.norm_weight if fits else None, persistent=False)
        self.register_buffer("bias", spec.norm_bias if fits else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.kind == "layer":
            return nn.functional.layer_norm(x, x.shape[-1:], weight, bias, self.eps)
        if self.kind == "rms":
            return nn.functional.rms_norm(x, x.shape[-1:], weight, self.eps)
        return x


class Head(nn.Module):
    """K linear classifiers: (K, B, D) or (B, D) → (K, B, C). Starts small, bias at zero."""

    def __init__(self, dim: int, classes: int, seeds: Sequence[int]) -> None:
        super().__init__()
        self.weight = member_parameter((classes, dim), seeds, std=0.02, stream=0)
        self.bias = zero_parameter((classes,), len(seeds))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT + self.bias[:, None]  # (K, B, C)


@dataclass(frozen=True, kw_only=True)
class LSASettings(Settings):
    """What every network of low-rank attention modules has: `rank` R, `heads`, `pool`."""

    rank: int = 16
    heads: int = 1
    pool: str = "mean"

    def __post_init__(self) -> None:
        self.require(self.rank >= 1, "rank", "1 or more")
        self.require(
            self.heads >= 1 and self.rank % self.heads == 0, "heads", f"a divisor of {self.rank}"
        )
        self.require(self.pool in self.POOLS, "pool", " or ".join(self.POOLS))


class LSAChain(nn.Module):
    """K chains of M low-rank attention modules, computed in rank space (see the module's head).

    Module j reads state `state_of[j]`. Parameters a module: LN 2D, projections 3R(D + 1),
    Up (R + 1)D.
    """

    def __init__(
        self,
        dim: int,
        seeds: Sequence[int],
        *,
        state_of: Sequence[int],
        rank: int,
        heads: int,
    ) -> None:
        super().__init__()
        modules = len(state_of)
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
        state = operands["state0"]
        batch, tokens, dim = state.shape
        columns, rank3 = self.rank + 1, 3 * self.rank
        products = state.dtype

        projections = self.qkv_weight * self.norm_weight[:, :, None]  # (K, M, 3R, D)
        bias = self.qkv_bias + (self.qkv_weight @ self.norm_bias[..., None])[..., 0]  # (K, M, 3R)
        projections = projections - projections.mean(dim=-1, keepdim=True)
        ups = self.ups()
        ups = ups - ups.mean(dim=-1, keepdim=True)  # (K, M(R+1), D)
        gram = ups @ ups.mT  # (K, M(R+1), M(R+1))
        # unbound once: indexing in the loop would make a full-size gradient for every slice
        projected, biases = projections.unbind(1), bias[:, :, None].unbind(1)
        gram_columns, up_blocks = gram.split(columns, dim=2), ups.split(columns, dim=1)

        outputs: list[Tensor] = []
        earlier: Tensor | None = None  # (K, BT, j(R+1))
        own = torch.zeros((), device=state.device)  # |sum_i A_i W_i,c^T|^2 so far, (K, BT)
        for i, run in itertools.groupby(range(len(self.state_of)), self.state_of.__getitem__):
            modules = list(run)  # those that read state i: one product serves them all
            matrix = torch.cat(
                [*(projected[j] for j in modules), *up_blocks[: modules[-1]]], dim=1
            )  # (K, 3R per module + columns of all earlier ones, D)
            flat = operands[f"state{i}"].reshape(batch * tokens, dim)
            at = rank3 * len(modules)
            all_qkv, overlaps = ConstantProduct.apply(flat, matrix, at)  # (K, BT, at), (K, BT, …)
            squares = operands[f"square{i}"].reshape(-1)  # (BT)
            for j, qkv in zip(modules, all_qkv.split(rank3, dim=2), strict=True):
                used, before = j * columns, (j - 1) * columns
                variance = squares
                if earlier is not None:
                    column = gram_columns[j - 1]  # what the newest block adds
                    added = torch.cat([2 * column[:, :before], column[:, before:used]], dim=1)
                    own = own + ((earlier @ added) * outputs[-1]).sum(dim=-1)
                    overlap = overlaps[..., :used]
                    variance = squares + 2 * (overlap * earlier).sum(dim=-1) + own
                    cross = matrix[:, at : at + used] @ projected[j].mT  # (K, used, 3R)
                    qkv = qkv + earlier.to(products) @ cross.to(products)
                scale = torch.rsqrt(variance.clamp_min(0) / self.dim + LN_EPS)  # (K, BT)
                qkv = qkv * scale[..., None] + biases[j]
                attended = self._attend(qkv.unflatten(1, (batch, tokens)), products)
                branch = nn.functional.pad(attended, (0, 1), value=1.0)  # (K, B, T, R+1)
                if keep is not None:
                    branch = branch * keep[:, j, :, None, None]
                outputs.append(branch.flatten(1, 2))
                earlier = torch.cat(outputs, dim=-1)
        assert earlier is not None
        return earlier.unflatten(1, (batch, tokens))

    def _attend(self, qkv: Tensor, products: torch.dtype) -> Tensor:
        """(K, B, T, 3R) → (K, B, T, R), softmax in float32. On the CPU the few plain products
        below are about four times faster, forward and backward, than the fused kernel at R = 16."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(2, 3).to(products)
            for part in qkv.chunk(3, dim=-1)
        )  # each (K, B, H, T, R/H)
        if q.is_cuda:
            flat = (part.flatten(0, 1) for part in (q, k, v))  # its fast kernels want four axes
            out = nn.functional.scaled_dot_product_attention(*flat).unflatten(0, q.shape[:2])
        else:
            scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (K, B, H, T, T)
            out = torch.softmax(scores, dim=-1) @ v
        return out.transpose(2, 3).flatten(-2).to(qkv.dtype)  # (K, B, T, R)


class ConstantProduct(torch.autograd.Function):
    """A constant (N, D) times K matrices (K, n, D), transposed and cut in two at column `at`.

    Gives (K, N, at) and (K, N, n - at) in the constant's precision. One product with K n columns,
    forward and for the weights' gradient; on a CPU in bfloat16 up to twice as fast forward and
    four times backward as the batched product that `torch.matmul` makes of it. The constant gets
    no gradient and is not copied.
    """

    @staticmethod
    def forward(ctx: Any, constant: Tensor, matrices: Tensor, at: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(constant)
        flat = constant @ matrices.flatten(0, 1).to(constant.dtype).T  # (N, K n)
        product = flat.unflatten(1, matrices.shape[:2]).transpose(0, 1)  # (K, N, n)
        return product[..., :at], product[..., at:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (constant,) = ctx.saved_tensors
        flat = torch.cat([part.transpose(0, 1) for part in gradients], dim=2)  # (N, K, n)
        product = flat.flatten(1).T @ constant  # (K n, D)
        return None, product.to(wide(constant.dtype)).unflatten(0, flat.shape[1:]), None


def centred(state: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A state (B, T, D) in float32 → (centred over D in `dtype`, its squared norm (B, T))."""
    rounded = (state - state.mean(dim=-1, keepdim=True)).to(dtype)
    precise = rounded.to(state.dtype)
    return rounded, (precise * precise).sum(dim=-1)
