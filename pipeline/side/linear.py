"""The linear probe: a trained linear classifier on the pooled, normed last tap.

The baseline that side-tuning is measured against: it asks what the frozen output alone gives.
Pool, the backbone's frozen final norm, one linear layer; the same head as LAST, so that LAST at
step 0 *is* this network. Ours: the order pool → norm, and the class token as the default pool.

Parameters: C (D + 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.side.contract import FeatureSpec, Operands, Settings, SideNetwork, find_taps
from pipeline.side.layers import FrozenNorm, Head, check_pool, pool_tokens, wide


@dataclass(frozen=True, kw_only=True)
class LinearSettings(Settings):
    """Shape of a linear probe: only its `pool`."""

    pool: str = "cls"

    def __post_init__(self) -> None:
        self.require(self.pool in self.POOLS, "pool", " or ".join(self.POOLS))


class Linear(SideNetwork):
    """K linear probes."""

    method = "linear"
    settings_class = LinearSettings
    recipe: ClassVar[dict[str, Any]] = {"lr": 1e-2, "epochs": 100, "warmup_epochs": 5}

    def __init__(self, spec: FeatureSpec, settings: LinearSettings, seeds: Sequence[int]) -> None:
        super().__init__(spec, settings, seeds)
        check_pool(settings.pool, spec)
        self.final_norm = FrozenNorm(spec)
        self.head = Head(spec, seeds, stream=0)

    @staticmethod
    def taps(settings: LinearSettings, available: Sequence[str]) -> tuple[str, ...]:
        """The deepest tap."""
        deepest = max(available, key=lambda tap: int(tap[1:]))
        return find_taps([deepest], available, "linear")

    def operands(self, features: Tensor, dtype: torch.dtype) -> Operands:
        """`pooled` (B, D): pooled and normed, all that the probe ever reads."""
        last = features[:, -1].to(wide(dtype))
        pooled = pool_tokens(last, self.settings.pool, self.spec.prefix_tokens)
        return {"pooled": self.final_norm(pooled)}

    def forward(self, operands: Mapping[str, Tensor], keep: Tensor | None = None) -> Tensor:
        return self.head(operands["pooled"])
