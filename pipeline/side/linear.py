"""The linear probe: a trained linear classifier on pooled, normed tokens.

The baseline that side-tuning is measured against: it asks what the frozen output alone gives. At
its defaults: the last tap's class token, the backbone's frozen final norm, one linear layer; the
same head as LAST, so that LAST at step 0 *is* this network.

As in DINOv2's evaluation [code]: the last n taps, each normed by the final norm, their class
tokens concatenated, and if wished the mean patch token of the last one behind them (`pool
clsmean`). Ours: the order pool → norm, `tap`, and `merge mean` (the average of the taps in place
of their concatenation).

Parameters: C (n D + 1) concatenated; C (D + 1) for one tap or averaged; D more columns for clsmean.
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
)
from pipeline.side.layers import FrozenNorm, Head, check_pool, pool_tokens, wide
from pipeline.side.settings import Settings, setting
from pipeline.side.tap import tap_depths, tap_names


@dataclass(frozen=True, kw_only=True)
class LinearSettings(Settings):
    """What a linear probe reads: the `last_n` taps up to `tap` (None: the deepest), how each is
    pooled, and whether several are concatenated or averaged (`merge`)."""

    pool: str = setting(
        "cls", choices=(*Settings.POOLS, "clsmean"), help="mean, cls or clsmean (both)"
    )
    tap: int | None = setting(
        None, help="the deepest tap it reads", unset="the deepest there is", reads=True
    )
    last_n: int = setting(1, help="that many taps up to it", reads=True)
    merge: str = setting(
        "concat", choices=("concat", "mean"), help="concat or mean of several taps"
    )

    recipe: ClassVar[dict[str, Any]] = {"lr": 1e-2, "epochs": 100, "warmup_epochs": 5}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.tap is None or self.tap >= 0, "tap", "0 or more")
        self.require(self.last_n >= 1, "last_n", "1 or more")
        self.require(
            self.merge == "concat" or self.pool != "clsmean", "merge", "concat with pool clsmean"
        )

    def idle(self) -> dict[str, str]:
        return {"merge": "last_n is 1, and there is nothing to merge"} if self.last_n == 1 else {}


class Linear(SideNetwork):
    """K linear probes."""

    method = "linear"
    settings_class = LinearSettings
    together_on_cpu = 64  # so small that dispatching it costs more than computing it

    def __init__(self, spec: FeatureSpec, settings: LinearSettings, seeds: Sequence[int]) -> None:
        super().__init__(spec, settings, seeds)
        there = tap_depths(spec.taps)
        last = max(there, default=0) if settings.tap is None else settings.tap
        chosen = [i for i in there if i <= last][-settings.last_n :]
        if settings.tap is not None and settings.tap not in there:
            chosen = [settings.tap]  # not there: named below
        self.reads = find_taps(tap_names(chosen or [0]), tuple(spec.taps), self.method)
        settings.require(
            len(self.reads) == settings.last_n, "last_n", f"at most {len(self.reads)}, as there are"
        )
        shapes = [spec.taps[tap] for tap in self.reads]
        for shape in shapes:
            check_pool("mean" if settings.pool == "mean" else "cls", shape)
        dims = [shape.dim for shape in shapes]
        self.norms = nn.ModuleList(FrozenNorm(spec, dim) for dim in dims)
        width = sum(dims) + (dims[-1] if settings.pool == "clsmean" else 0)
        if settings.merge == "mean":
            width = spec.common_shape(self.reads).dim
        self.head = Head(width, spec.classes, seeds)

    def make_operands(self, features: Mapping[str, Tensor], dtype: torch.dtype) -> Operands:
        """`pooled` (B, width): pooled and normed, all that the probe ever reads."""
        pools = ["mean" if self.settings.pool == "mean" else "cls"] * len(self.reads)
        taps = list(zip(self.reads, pools, self.norms, strict=True))
        if self.settings.pool == "clsmean":
            taps.append((self.reads[-1], "mean", self.norms[-1]))
        parts = []
        for tap, pool, norm in taps:
            tokens = features[tap].to(wide(dtype))
            parts.append(norm(pool_tokens(tokens, pool, self.spec.taps[tap].prefix_tokens)))
        if self.settings.merge == "mean":
            return {"pooled": torch.stack(parts).mean(dim=0)}
        return {"pooled": torch.cat(parts, dim=-1)}

    def forward(self, operands: Mapping[str, Tensor], keep: Tensor | None = None) -> Tensor:
        return self.head(operands["pooled"])
