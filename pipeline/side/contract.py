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

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pipeline.side.settings import Settings
from pipeline.side.tap import listed, tap_depths

Operands = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class TokenShape:
    """One tap: T `tokens`, the first `prefix_tokens` of them class or registers, of width D."""

    tokens: int
    prefix_tokens: int
    dim: int


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """What a side network must know about the features.

    `taps` maps names, in the backbone's order, to shapes; a plain ViT's are all equal. What
    names mean is in `pipeline/side/tap.py`.
    `norm` is the backbone's own final norm, frozen: kind `layer`, `rms` or `none`, with `eps`;
    `norm_weight` and `norm_bias` are (D,) float32, or None where the norm has none.
    `blocks` describes each block of the backbone, the first for z1 (`pipeline/side/ladder.py`).
    """

    taps: Mapping[str, TokenShape]
    classes: int
    norm: str = "none"
    norm_eps: float = 0.0
    norm_weight: Tensor | None = field(default=None, compare=False)
    norm_bias: Tensor | None = field(default=None, compare=False)
    blocks: tuple[Mapping[str, Any], ...] = ()

    def common_shape(self, taps: Sequence[str]) -> TokenShape:
        """The one shape of taps to be added up. Raises ValueError naming them if they differ."""
        runs = [list(run) for _, run in itertools.groupby(taps, self.taps.__getitem__)]
        shapes = [self.taps[run[0]] for run in runs]
        if len(set(shapes)) == 1:
            return shapes[0]
        told = ", ".join(
            f"{listed(run)}: {shape.tokens} x {shape.dim}"
            for run, shape in zip(runs, shapes, strict=True)
        )
        raise ValueError(
            f"taps are added up, and those of this backbone have unequal shapes ({told}); "
            f"expected a plain ViT. linear, attentive and lst work on such a backbone."
        )


class SideNetwork(nn.Module):
    """K side networks of one shape.

    Subclasses name themselves (`method`) and their `Settings` class, set `reads` (the taps that
    they read, chosen from `spec.taps`) when they are made, and implement `make_operands` and
    `forward`. Making one raises LookupError naming taps that are lacking, ValueError naming a
    setting that does not suit the features. All parameters have shape (K, …).
    """

    method: ClassVar[str]
    settings_class: ClassVar[type[Settings]]
    together_on_cpu: ClassVar[int] = 2  # members; more cohorts than cores keep all cores busy
    reads: tuple[str, ...]

    def __init__(self, spec: FeatureSpec, settings: Any, seeds: Sequence[int]) -> None:
        super().__init__()
        self.spec = spec
        self.settings = settings
        self.members = len(seeds)

    def sources(self, available: Sequence[str]) -> tuple[str, ...]:
        """Those of `available` taps that `operands` needs. Raises LookupError naming the lacking.

        The same as `reads`, unless the method can make what it reads out of other taps.
        """
        return find_taps(self.reads, available, self.method)

    def operands(self, features: Mapping[str, Tensor], dtype: torch.dtype) -> Operands:
        """Turn features, a (B, T, D) a tap, into what `forward` reads; no parameter is involved.

        `features` holds the taps that `sources` named. Wide operands come in `dtype`, the
        precision that the network computes in; narrow ones in float32 (float64 if `dtype` is).
        Every operand has B rows in front and memory of its own, because that of `features` is
        used again. Raises ValueError naming both shapes if a tap has another than `spec` says.
        """
        of_sums = next(iter(self.spec.taps.values()))  # taps that a sum is made of have its shape
        for tap in self.sources(tuple(features)):
            shape = self.spec.taps.get(tap, of_sums)
            expected, came = (shape.tokens, shape.dim), tuple(features[tap].shape[1:])
            if came != expected:
                raise ValueError(
                    f"{self.method}: tap {tap} has {came[0]} tokens of width {came[-1]}, expected "
                    f"{expected[0]} of width {expected[1]}"
                )
        return self.make_operands(features, dtype)

    def make_operands(self, features: Mapping[str, Tensor], dtype: torch.dtype) -> Operands:
        """The method's own part of `operands`, on features of the right shapes."""
        raise NotImplementedError

    def forward(self, operands: Mapping[str, Tensor], keep: Tensor | None = None) -> Tensor:
        """Logits (K, B, C) in float32.

        `keep` (K, `drop_sites`, B) holds the drop-path factors, 0 or 1 / (1 - rate), of each
        residual branch; None in evaluation.
        """
        raise NotImplementedError

    def start_from(self, initial: Mapping[str, Tensor]) -> None:
        """Before training: take what the cache offers to start from. Nothing, by default.

        `initial` holds the cache's tables below `ladder/`. Raises LookupError if settings ask
        for what is not there.
        """

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
    """`wanted`, or LookupError naming the taps that are lacking."""
    missing = [tap for tap in wanted if tap not in available]
    if missing:
        advice = "Extract again with --taps all, or choose settings that need fewer taps."
        if not tap_depths(available):
            advice = "Sums are what miet alone reads; extract again without --gather."
        raise LookupError(
            f"{method} needs the taps {listed(wanted)}; {listed(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} lacking (there are {listed(available)}). "
            f"{advice}"
        )
    return tuple(wanted)
