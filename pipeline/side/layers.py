"""Layers that several side networks share: pooling, the frozen norm, the head, two products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.side.contract import FeatureSpec, TokenShape, member_parameter, zero_parameter

LN_EPS = 1e-6  # ours: timm's ViTs use it throughout
MOST_BLOCKS = 2**16 - 1  # of a CUDA grid along the axes that fused attention gives to its batch


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


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v by torch's fused kernels: (N, H, T, e) each, q scaled already.

    N counts members times images, and some kernels fail above MOST_BLOCKS of them (pytorch issues
    142228 and 146704; it depends on the release): more are computed one part after the other.
    """
    parts = zip(q.split(MOST_BLOCKS), k.split(MOST_BLOCKS), v.split(MOST_BLOCKS), strict=True)
    done = [nn.functional.scaled_dot_product_attention(*part, scale=1.0) for part in parts]
    return done[0] if len(done) == 1 else torch.cat(done)


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
