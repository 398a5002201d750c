"""What a side network is: the seam between cached features and everything that trains on them.

A side network sees tensors, never a backbone and never a cache. K members of one shape are one
module: every parameter carries a leading axis K, so that K settings train in one batched pass.

The one idea to hold: features are constants. Whatever can be computed from them without a
parameter is an **operand**. `operands` does that once per row (at load time if the features stay
resident), and `forward` sees operands only.

Shape legend, used in every file of `pipeline/side`:

    B  rows in the batch          T  tokens (prefix first, then patches)    D  backbone width
    R  rank                       L  backbone blocks                        C  classes
    K  members                    M  low-rank attention modules in a chain
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Operands = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """What a side network must know about the features: their shape and the final norm.

    `taps` are the names in the order in which they lie in the feature array, `("z0", …)`.
    `norm` is the backbone's own final norm, frozen: kind `layer`, `rms` or `none`, with `eps`;
    `norm_weight` and `norm_bias` are (D,) float32, or None where the norm has none.
    """

    taps: tuple[str, ...]
    tokens: int
    prefix_tokens: int
    dim: int
    classes: int
    norm: str = "none"
    norm_eps: float = 0.0
    norm_weight: Tensor | None = field(default=None, compare=False)
    norm_bias: Tensor | None = field(default=None, compare=False)

    @property
    def blocks(self) -> int:
        """L: the number of the deepest tap present."""
        return max(int(tap[1:]) for tap in self.taps)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that decide a network's shape; members that share them are stacked.

    Raises ValueError on an impossible value when it is made.
    """

    POOLS: ClassVar[tuple[str, ...]] = ("mean", "cls")

    def require(self, condition: bool, name: str, expected: str) -> None:
        """Refuse a value: `name` is the setting, `expected` what would be right."""
        if not condition:
            raise ValueError(f"{name} = {getattr(self, name)!r}: expected {expected}")


class SideNetwork(nn.Module):
    """K side networks of one shape.

    Subclasses name themselves (`method`), their `Settings` class, the taps they need, and
    implement `operands` and `forward`. All parameters have shape (K, …).
    """

    method: ClassVar[str]
    settings_class: ClassVar[type[Settings]]
    recipe: ClassVar[dict[str, Any]] = {}  # learning settings that suit the method; ours

    def __init__(self, spec: FeatureSpec, settings: Any, seeds: Sequence[int]) -> None:
        super().__init__()
        self.spec = spec
        self.settings = settings
        self.members = len(seeds)

    @staticmethod
    def taps(settings: Any, available: Sequence[str]) -> tuple[str, ...]:
        """The taps that a network with these settings reads, given those in the cache.

        Raises LookupError naming what is missing.
        """
        raise NotImplementedError

    def operands(self, features: Tensor, dtype: torch.dtype) -> Operands:
        """Turn features (B, taps, T, D) into what `forward` reads; no parameter is involved.

        `features` holds the taps that `taps` names, in that order. Wide operands come in
        `dtype`, the precision that the network computes in; narrow ones in float32 (float64 if
        `dtype` is float64). Every operand has B rows in front and memory of its own, because that
        of `features` is used again.
        """
        raise NotImplementedError

    def forward(self, operands: Mapping[str, Tensor], keep: Tensor | None = None) -> Tensor:
        """Logits (K, B, C) in float32.

        `keep` (K, `drop_sites`, B) holds the drop-path factors, 0 or 1 / (1 - rate), of each
        residual branch; None in evaluation.
        """
        raise NotImplementedError

    @property
    def operand_key(self) -> tuple[Any, ...]:
        """Networks with equal keys make equal operands, and share them."""
        return (self.method, self.settings)

    @property
    def drop_sites(self) -> int:
        """How many residual branches drop-path can drop; 0 if the method has none."""
        return 0

    def decayed(self, name: str) -> bool:
        """Whether weight decay applies to a parameter: matrices yes, biases and norms no."""
        return name.endswith("weight") and "norm" not in name


def member_parameter(
    shape: Sequence[int], seeds: Sequence[int], *, std: float, stream: int
) -> nn.Parameter:
    """A parameter (K, *shape), each member drawn from its own seed: normal, cut at two sigma.

    `stream` tells the parameters of one member apart. A member's values depend on its seed and
    the stream alone, never on K, its position, or the other members.
    """
    values = torch.empty(len(seeds), *shape)
    for member, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + stream) % 2**63)
        nn.init.trunc_normal_(values[member], std=std, a=-2 * std, b=2 * std, generator=generator)
    return nn.Parameter(values)


def zero_parameter(shape: Sequence[int], members: int) -> nn.Parameter:
    """A parameter (K, *shape) of zeros."""
    return nn.Parameter(torch.zeros(members, *shape))


def find_taps(wanted: Sequence[str], available: Sequence[str], method: str) -> tuple[str, ...]:
    """`wanted`, or LookupError naming the taps that the cache lacks."""
    missing = [tap for tap in wanted if tap not in available]
    if missing:
        raise LookupError(
            f"{method} needs the taps {', '.join(wanted)}; "
            f"the cache lacks {', '.join(missing)} (it has {', '.join(available)}). "
            f"Extract again with --taps all, or choose settings that need fewer taps."
        )
    return tuple(wanted)
