"""The attentive probe: a trained query attends over all tokens of the last tap.

What V-JEPA's evaluation does (Bardes et al., arXiv 2404.08471; [code] `AttentiveClassifier`), and
in essence SigLIP's pooling head: one learned query, cross-attention over the normed tokens, a
feed-forward block, a linear classifier. A stronger baseline than the linear probe, still blind to
all layers but the last.

    y = query + Proj(Attention(W_q query, W_k LN(x), W_v LN(x)))      x = final norm(z_L)
    y = y + MLP(LN(y)),   logits = Linear(y)

Ours: no key bias (softmax cancels it), 12 heads where 12 divides D and otherwise their greatest
common divisor (V-JEPA: 12), `mlp_ratio 0` leaves the feed-forward block out.

Exact rewriting: with one query, W_k^T W_q query is one vector a head, and W_v may wait until tokens
are summed up. So no member ever holds an array (B, T, D): the keys are the constant itself.

Parameters: D + 2D + 4D² + 3D + [2D + 2 m D² + m D + D, m = mlp_ratio] + C (D + 1).
"""

from __future__ import annotations

import math
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
    member_parameter,
    zero_parameter,
)
from pipeline.side.layers import LN_EPS, ConstantProduct, FrozenNorm, Head, wide
from pipeline.side.settings import Settings, setting
from pipeline.side.tap import tap_depths, tap_names

STD = 0.02  # [code] of all initial weights


@dataclass(frozen=True, kw_only=True)
class AttentiveSettings(Settings):
    """Shape of an attentive probe; `heads` None is 12, or what 12 and D have in common."""

    heads: int | None = setting(
        None, help="attention heads", unset="12, or what 12 and the width share"
    )
    mlp_ratio: float = setting(4.0, help="of the feed-forward block")

    recipe: ClassVar[dict[str, Any]] = {"lr": 1e-3, "epochs": 30, "warmup_epochs": 3}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.heads is None or self.heads >= 1, "heads", "1 or more")
        self.require(self.mlp_ratio >= 0, "mlp_ratio", "0 or more")


class Attentive(SideNetwork):
    """K attentive probes."""

    method = "attentive"
    settings_class = AttentiveSettings

    def __init__(
        self, spec: FeatureSpec, settings: AttentiveSettings, seeds: Sequence[int]
    ) -> None:
        super().__init__(spec, settings, seeds)
        deepest = max(tap_depths(spec.taps), default=0)
        self.reads = find_taps(tap_names([deepest]), tuple(spec.taps), self.method)
        dim, members = spec.taps[self.reads[0]].dim, len(seeds)
        self.heads = settings.heads or math.gcd(12, dim)
        settings.require(dim % self.heads == 0, "heads", f"a divisor of the width {dim}")
        self.final_norm = FrozenNorm(spec, dim)

        def matrix(rows: int, columns: int, stream: int, scale: float = 1.0) -> nn.Parameter:
            return member_parameter((rows, columns), seeds, std=STD * scale, stream=stream)

        self.query = member_parameter((dim,), seeds, std=STD, stream=1)
        self.norm1_weight = nn.Parameter(torch.ones(members, dim))
        self.norm1_bias = zero_parameter((dim,), members)
        self.q_weight, self.q_bias = matrix(dim, dim, 2), zero_parameter((dim,), members)
        self.k_weight = matrix(dim, dim, 3)
        self.v_weight, self.v_bias = matrix(dim, dim, 4), zero_parameter((dim,), members)
        self.proj_weight = matrix(dim, dim, 5, 2**-0.5)  # [code] rescaled by its depth
        self.proj_bias = zero_parameter((dim,), members)
        self.hidden = round(settings.mlp_ratio * dim)
        if self.hidden:
            self.norm2_weight = nn.Parameter(torch.ones(members, dim))
            self.norm2_bias = zero_parameter((dim,), members)
            self.fc1_weight = matrix(self.hidden, dim, 6)
            self.fc1_bias = zero_parameter((self.hidden,), members)
            self.fc2_weight = matrix(dim, self.hidden, 7, 2**-0.5)
            self.fc2_bias = zero_parameter((dim,), members)
        self.head = Head(dim, spec.classes, seeds)

    @property
    def operand_key(self) -> tuple[str]:
        return (self.method,)

    def make_operands(self, features: Mapping[str, Tensor], dtype: torch.dtype) -> Operands:
        """`normed` (B, T, D): LN of the final-normed tokens, without a gain of its own."""
        tokens = features[self.reads[0]].to(wide(dtype))
        normed = nn.functional.layer_norm(self.final_norm(tokens), tokens.shape[-1:], eps=LN_EPS)
        return {"normed": normed.to(dtype)}

    def forward(self, operands: Mapping[str, Tensor], keep: Tensor | None = None) -> Tensor:
        y = self.query[:, None] + self._attend(operands["normed"])  # (K, B, D)
        if self.hidden:
            x = nn.functional.layer_norm(y, y.shape[-1:], eps=LN_EPS)
            x = x * self.norm2_weight[:, None] + self.norm2_bias[:, None]
            x = nn.functional.gelu(x @ self.fc1_weight.mT + self.fc1_bias[:, None])
            y = y + x @ self.fc2_weight.mT + self.fc2_bias[:, None]
        return self.head(y)

    def _attend(self, normed: Tensor) -> Tensor:
        """Proj(Attention(query, tokens)): (B, T, D) → (K, B, D)."""
        members, heads = self.members, self.heads
        batch, tokens, dim = normed.shape
        each = dim // heads
        q = (self.q_weight @ self.query[..., None])[..., 0] + self.q_bias  # (K, D)
        keys = self.k_weight.unflatten(1, (heads, each))  # (K, H, D/H, D)
        probes = (q.unflatten(1, (heads, 1, each)) @ keys)[:, :, 0]  # (K, H, D)
        probes = probes * self.norm1_weight[:, None] * each**-0.5
        scores, _ = ConstantProduct.apply(normed.flatten(0, 1), probes, heads)  # (K, B T, H)
        scores = scores.unflatten(1, (batch, tokens)).to(wide(normed.dtype))
        weights = scores.softmax(dim=2)  # (K, B, T, H)
        rows = weights.permute(1, 0, 3, 2).flatten(1, 2)  # (B, K H, T)
        summed = (rows.to(normed.dtype) @ normed).to(scores.dtype)  # (B, K H, D)
        summed = summed.unflatten(1, (members, heads)).permute(1, 2, 0, 3)  # (K, H, B, D)
        summed = summed * self.norm1_weight[:, None, None] + self.norm1_bias[:, None, None]
        values = summed @ self.v_weight.unflatten(1, (heads, each)).mT  # (K, H, B, D/H)
        joined = values.permute(0, 2, 1, 3).flatten(2) + self.v_bias[:, None]  # (K, B, D)
        return joined @ self.proj_weight.mT + self.proj_bias[:, None]
