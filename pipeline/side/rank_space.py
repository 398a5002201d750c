"""Chains of low-rank attention modules, exactly, without a wide array per member.

Written plainly, module j of one member computes

    x_j = S_j + sum_{i<j} Delta_i          S_j a constant of the data, wide (T, D)
    Delta_j = Attention(LN(x_j) A_q, LN(x_j) A_k, LN(x_j) A_v) Up + up_bias

which keeps two wide arrays a module. But Delta_i = A_i W_i^T, with A_i (T, R) the attention output:
a member's own part of the state never leaves rank space. With

    P   = (A_q, A_k, A_v)^T * gain          (3R, D)    LN's gain folded into the projections
    W_i = (Up, up_bias)                     (D, R+1)   and a 1 appended to A_i
    E   = (A_1, …, A_{j-1})                 (T, c)     c = (j-1)(R+1)
    U   = (W_1, …, W_{j-1})^T               (c, D)
    _c  = mean over D taken away

LN(x_j) needs no wide array of its own:

    LN(x_j) P^T = (S_c P_c^T + E U_c P_c^T) / sqrt(variance + eps)
    D variance  = |S_c|^2 + 2 rowsum((S_c U_c^T) * E) + |E U_c|^2

so the only wide product is S_c (P_c^T, U_c^T): one for all K members, whose columns stand side by
side, forward and for the weights' gradient; S needs none. At D = 768, R = 16 a member's memory
falls about twelvefold. |E U_c|^2 grows by one block of U_c U_c^T a module and is accumulated.

Sums that can cancel (the variance) stay in float32 whatever the precision of the products. The
backward pass is written out: autograd would copy E at every module and hold every copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Attend = Callable[[Tensor], Tensor]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision for sums and narrow operands beside products in `dtype`."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Constants:
    """What is no parameter: `states` S_c (B, T, D) and `squares` |S_c|^2 (B, T) by number,
    `state_of` the state that each module reads, `keep` (K, M, B) or None, LN's `eps`, and
    `attend`: (K, B, T, 3R) → (K, B, T, R)."""

    states: Sequence[Tensor]
    squares: Sequence[Tensor]
    state_of: Sequence[int]
    keep: Tensor | None
    eps: float
    attend: Attend


@dataclass(frozen=True)
class _Kept:
    """What module j leaves for the backward pass."""

    overlap: Tensor  # S_c U_c^T (K, N, c)
    normed: Tensor  # LN(x_j) P^T without its bias (K, N, 3R)
    scale: Tensor  # 1 / sqrt(variance + eps) (K, N)
    growth: Tensor  # (E, A_j) times the column of U_c U_c^T that A_j brings (K, N, R+1)
    qkv: Tensor  # leaf of the attention's own graph
    attended: Tensor  # its end


class _Chain(torch.autograd.Function):
    """(P_c (K, M, 3R, D), bias (K, M, 3R), U_c (K, M(R+1), D)) → E (K, N, M(R+1)); N = B T."""

    @staticmethod
    def forward(
        ctx: Any, projections: Tensor, bias: Tensor, ups: Tensor, constants: Constants
    ) -> Tensor:
        first = constants.states[0]
        batch, tokens, dim = first.shape
        products, sums = first.dtype, wide(first.dtype)
        members, modules, rank3, _ = projections.shape
        columns = ups.shape[1] // modules
        gram = ups @ ups.mT  # (K, M(R+1), M(R+1))
        own = torch.zeros((), dtype=sums, device=first.device)  # |E U_c|^2 (K, N)
        out = first.new_empty(members, batch * tokens, ups.shape[1], dtype=sums)
        kept: list[_Kept] = []
        for j, i in enumerate(constants.state_of):
            used, now = j * columns, (j + 1) * columns
            earlier, branch = out[..., :used], out[..., used:now]
            matrices = torch.cat([projections[:, j], ups[:, :used]], dim=1)  # (K, 3R + used, D)
            product = _side_by_side(constants.states[i], matrices)
            state_part, overlap = product[..., :rank3], product[..., rank3:]
            variance = constants.squares[i].reshape(-1) + own
            if used:
                variance = variance + 2 * (overlap * earlier).sum(dim=-1)
                cross = (ups[:, :used] @ projections[:, j].mT).to(products)  # (K, used, 3R)
                state_part = state_part + earlier.to(products) @ cross
            scale = torch.rsqrt(variance.clamp_min(0) / dim + constants.eps).expand(members, -1)
            normed = state_part * scale[..., None]
            qkv = (normed + bias[:, j, None]).unflatten(1, (batch, tokens))
            with torch.enable_grad():
                qkv = qkv.detach().requires_grad_()
                attended = constants.attend(qkv)
            branch[..., :-1] = attended.detach().flatten(1, 2)
            branch[..., -1] = 1
            if constants.keep is not None:
                branch.unflatten(1, (batch, tokens)).mul_(constants.keep[:, j, :, None, None])
            growth = out[..., :now] @ _column(gram, used, now)
            own = own + (growth * branch).sum(dim=-1)
            kept.append(_Kept(overlap, normed, scale, growth, qkv, attended))
        ctx.save_for_backward(projections, ups, out)
        ctx.gram, ctx.kept, ctx.constants = gram, kept, constants
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        projections, ups, out = ctx.saved_tensors
        constants: Constants = ctx.constants
        batch, tokens, dim = constants.states[0].shape
        products = constants.states[0].dtype
        modules, rank3 = projections.shape[1:3]
        columns = ups.shape[1] // modules
        d_out = gradients[0].clone()  # (K, N, M(R+1)), grows as later modules read earlier ones
        d_projections, d_ups = torch.zeros_like(projections), torch.zeros_like(ups)
        d_bias = projections.new_zeros(projections.shape[:3])
        d_gram = torch.zeros_like(ctx.gram)
        d_own = torch.zeros_like(out[..., 0])  # (K, N): of |E U_c|^2 after module j
        for j in reversed(range(modules)):
            used, now = j * columns, (j + 1) * columns
            kept: _Kept = ctx.kept[j]
            earlier, branch = out[..., :used], out[..., used:now]
            if now < out.shape[2]:
                pulled = d_own[..., None] * branch
                d_out[..., used:now].addcmul_(d_own[..., None], kept.growth)
                d_out[..., :now] += pulled @ _column(ctx.gram, used, now).mT
                d_column = out[..., :now].mT @ pulled  # (K, now, R+1)
                d_gram[:, :used, used:now] += 2 * d_column[:, :used]
                d_gram[:, used:now, used:now] += d_column[:, used:]
            d_attended = d_out[..., used : now - 1].unflatten(1, (batch, tokens))
            if constants.keep is not None:
                d_attended = d_attended * constants.keep[:, j, :, None, None]
            (d_qkv,) = torch.autograd.grad(kept.attended, kept.qkv, d_attended)
            d_qkv = d_qkv.flatten(1, 2)  # (K, N, 3R)
            d_bias[:, j] = d_qkv.sum(dim=1)
            along = (d_qkv * kept.normed).sum(dim=-1)
            d_variance = along * kept.scale.square() * (-0.5 / dim)  # (K, N)
            d_own += d_variance
            parts = [(d_qkv * kept.scale[..., None]).to(products)]
            if used:
                twice = 2 * d_variance[..., None]
                cross = (ups[:, :used] @ projections[:, j].mT).to(products)
                d_out[..., :used] += parts[0] @ cross.mT
                d_out[..., :used].addcmul_(twice, kept.overlap)
                d_cross = (earlier.to(products).mT @ parts[0]).to(ups.dtype)  # (K, used, 3R)
                d_projections[:, j] += d_cross.mT @ ups[:, :used]
                d_ups[:, :used] += d_cross @ projections[:, j]
                parts.append((twice * earlier).to(products))
            d_matrices = _weight_gradient(constants.states[constants.state_of[j]], parts)
            d_projections[:, j] += d_matrices[:, :rank3]
            d_ups[:, :used] += d_matrices[:, rank3:]
        d_ups += (d_gram + d_gram.mT) @ ups
        return d_projections, d_bias, d_ups, None


def run_chain(projections: Tensor, bias: Tensor, ups: Tensor, constants: Constants) -> Tensor:
    """Attention outputs of all modules, each with its 1, (K, B, T, M(R+1)); `result @ ups` with
    uncentred ups is the sum of all Delta.

    `projections` P_c (K, M, 3R, D) and `ups` U_c (K, M(R+1), D) are centred over D; `bias`
    (K, M, 3R) includes LN's shift.
    """
    out: Tensor = _Chain.apply(projections, bias, ups, constants)
    return out.unflatten(1, constants.states[0].shape[:2])


def centred(state: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A state (B, T, D) in float32 → (S_c (B, T, D) in `dtype`, |S_c|^2 (B, T))."""
    rounded = (state - state.mean(dim=-1, keepdim=True)).to(dtype)
    precise = rounded.to(state.dtype)
    return rounded, (precise * precise).sum(dim=-1)


def _column(gram: Tensor, used: int, now: int) -> Tensor:
    """The block column by which |E U_c|^2 grows, off-diagonal twice, (K, now, R+1)."""
    column = gram[:, :now, used:now]
    return torch.cat([2 * column[:, :used], column[:, used:]], dim=1)


def _side_by_side(state: Tensor, matrices: Tensor) -> Tensor:
    """(B, T, D) times (K, n, D) transposed → (K, BT, n), as one product with K n columns.

    On a CPU in bfloat16 up to twice as fast as the batched product that `matmul` makes of it.
    """
    flat = state.flatten(0, 1) @ matrices.flatten(0, 1).to(state.dtype).T  # (BT, K n)
    return flat.unflatten(1, matrices.shape[:2]).transpose(0, 1)


def _weight_gradient(state: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """The gradient of `_side_by_side` in its matrices, (K, n, D); `parts` (K, BT, …) make n."""
    flat = torch.cat([part.transpose(0, 1) for part in parts], dim=2)  # (BT, K, n)
    product = flat.flatten(1).T @ state.flatten(0, 1)  # (K n, D)
    return product.to(wide(state.dtype)).unflatten(0, flat.shape[1:])
