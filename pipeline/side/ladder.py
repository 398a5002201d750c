"""LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning.

Sung, Cho, Bansal. NeurIPS 2022, arXiv 2206.06522; code: ylsung/Ladder-Side-Tuning. [code]

    s = Down_0(z_0)
    for each kept block i:  g = sigmoid(alpha_i / 0.1)
                            s = SideBlock_i(g s + (1 - g) Down_i(z_i))
    logits = head(frozen final norm(Up(pool(side norm(s)))))

paper → code: reduction factor r → `reduction`; gate temperature → `temperature`; layer dropping →
`keep_layers`; side network initialisation → `init`; ladders ("side downsamples") → `downs`;
alpha → `gate`, 0 at the start; SideBlock_i → `blocks` (`ladder_blocks.py`).

What is whose. [code]: the recursion (the gate multiplies the side state, the mix comes before the
block, a dropped layer loses its ladder, gate and block together); SideBlock as the backbone's own
block at 1/r of the width, of the feed-forward width and of each head's width, with as many heads;
biased Down and Up; the side norm; initial weights by pruning (`pipeline/backbones/prune.py`);
layers numbered from 0. [ours]: pool, frozen norm and trained head (T5 goes on to its own language
head); pool before Up, which is exact; random weights start at 1 / sqrt(inputs) throughout, as in
T5's own blocks (its Down and Up start at 0.01); layer scale starts at 1; no dropout, but drop-path.

Hierarchical backbones, all [ours]: where grid and width change, f x f patches of s are laid side by
side and mapped to the new width, f being the ratio of the grids (Swin's merging without its norm;
a grid that f does not divide is padded with zeros, or cut if it came out smaller). Side blocks are
then Swin's (shifted windows, mask, relative position bias) or ConvNeXt's at 1/r of the width.

Parameters, with d = D/r and m = hidden/r, of n kept ViT blocks that have all biases: ladders
(n + 1)(D + 1)d, gates n, blocks n(4d(d + 1) + 2dm + m + d + 4d), side norm 2d, Up (d + 1)D, head
C(D + 1).
"""

from __future__ import annotations

import itertools
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
    zero_parameter,
)
from pipeline.side.ladder_blocks import KINDS, Linear, Norm, SideBlock
from pipeline.side.ladder_geometry import (
    Block,
    check_reduction,
    merge_factor,
    merged,
    side_by_side,
)
from pipeline.side.layers import FrozenNorm, Head, check_pool, pool_tokens
from pipeline.side.settings import Settings, setting
from pipeline.side.tap import grammatical, select, tap_depths, tap_names


@dataclass(frozen=True, kw_only=True)
class LSTSettings(Settings):
    """Shape of a ladder: `reduction` r, `keep_layers`, gate `temperature`, `init`, `pool`.

    `keep_layers` is `all`, `every:2` (counted back from the last), `last:3`, or layer numbers from
    0 as in the paper's code, `1,2,3,5`. `init` is `random`, or `pruned` from the cache's tables.
    """

    reduction: int = setting(8, help="r, by which widths are divided")
    keep_layers: str = setting(
        "all", help="all, every:2, last:3 or 1,2,3; several: spaces", commas=True, reads=True
    )
    temperature: float = setting(0.1, help="of the gates")
    init: str = setting("random", choices=("random", "pruned"), help="random or pruned")
    pool: str = setting("mean", choices=Settings.POOLS, help="mean (patch tokens) or cls")

    recipe: ClassVar[dict[str, Any]] = {"lr": 5e-3}
    drops = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.reduction >= 1, "reduction", "1 or more")
        self.require(grammatical(self.keep_layers), "keep_layers", KEEP_LAYERS)
        self.require(self.temperature > 0, "temperature", "more than 0")


KEEP_LAYERS = "all, every:2, last:3, or layer numbers from 0 such as 1,2,3,5"


def keep_layers(text: str, blocks: int) -> tuple[int, ...]:
    """Numbers from 0, ascending, of the layers that `text` keeps of `blocks`; see LSTSettings."""
    if not grammatical(text):
        raise ValueError(f"keep_layers = {text!r}: expected {KEEP_LAYERS}")
    chosen = select(text, blocks)
    if chosen[0] < 0 or chosen[-1] >= blocks:
        raise ValueError(f"keep_layers = {text!r}: the backbone has layers 0 to {blocks - 1}")
    return tuple(chosen)


class LST(SideNetwork):
    """K ladders of side blocks."""

    method = "lst"
    settings_class = LSTSettings

    def __init__(self, spec: FeatureSpec, settings: LSTSettings, seeds: Sequence[int]) -> None:
        super().__init__(spec, settings, seeds)
        if not spec.blocks:
            raise ValueError(
                "lst: this cache does not describe its backbone's blocks; extract again"
            )
        self.layers = keep_layers(settings.keep_layers, len(spec.blocks))
        wanted = [0, *(layer + 1 for layer in self.layers)]
        self.reads = find_taps(tap_names(wanted), tuple(spec.taps), self.method)
        kept = [spec.blocks[layer] for layer in self.layers]
        _check_blocks([spec.blocks[0], *kept], self.layers, settings)
        last = spec.taps[self.reads[-1]]
        check_pool(settings.pool, last)
        self.prefix_tokens = last.prefix_tokens
        self._make(spec, [spec.blocks[0], *kept], seeds)

    def _make(self, spec: FeatureSpec, path: Sequence[Block], seeds: Sequence[int]) -> None:
        """`path` is the blocks whose outputs the ladders tap, in front the one that z0 enters."""
        streams, reduction = itertools.count(1), self.settings.reduction
        widths = [block["dim"] // reduction for block in path]
        ladders = zip(self.reads, path, widths, strict=True)
        self.downs = nn.ModuleDict(
            {tap: Linear(block["dim"], d, seeds, streams, True) for tap, block, d in ladders}
        )
        self.merges, self.blocks = nn.ModuleDict(), nn.ModuleDict()
        for layer, before, block in zip(self.layers, path, path[1:], strict=False):
            if merged(before, block):
                inputs = merge_factor(before, block) ** 2 * (before["dim"] // reduction)
                outputs = block["dim"] // reduction
                self.merges[str(layer)] = Linear(inputs, outputs, seeds, streams, False)
            self.blocks[str(layer)] = KINDS[block["kind"]](block, reduction, seeds, streams)
        self.gate = zero_parameter((len(self.layers),), len(seeds))
        self.norm = Norm(widths[-1], len(seeds), path[-1]["norm"])
        (deepest,) = tap_names([max(tap_depths(spec.taps))])
        dim = len(spec.norm_weight) if spec.norm_weight is not None else spec.taps[deepest].dim
        self.up = Linear(widths[-1], dim, seeds, streams, True)
        self.final_norm = FrozenNorm(spec, dim)
        self.head = Head(dim, spec.classes, seeds)

    @property
    def operand_key(self) -> tuple[Any, ...]:
        return (self.method, self.reads)

    @property
    def drop_sites(self) -> int:
        return sum(block.sites for block in self._side_blocks())

    def _side_blocks(self) -> list[SideBlock]:
        return [block for block in self.blocks.values() if isinstance(block, SideBlock)]

    def make_operands(self, features: Mapping[str, Tensor], dtype: torch.dtype) -> Operands:
        """The taps themselves: z0 and the outputs of the kept blocks, each (B, T, D)."""
        contiguous = torch.contiguous_format
        return {
            tap: features[tap].to(dtype, copy=True, memory_format=contiguous) for tap in self.reads
        }

    def forward(self, operands: Mapping[str, Tensor], keep: Tensor | None = None) -> Tensor:
        products = operands[self.reads[0]].dtype
        state = self._down(self.reads[0], operands)  # (K, B, T, d)
        gates = torch.sigmoid(self.gate / self.settings.temperature)  # (K, kept blocks)
        before, site = self.spec.blocks[0], 0
        for i, (layer, side) in enumerate(zip(self.layers, self._side_blocks(), strict=True)):
            if str(layer) in self.merges:
                patches = side_by_side(state, before, side.block)
                state = self.merges[str(layer)](patches, products).to(state.dtype)
            gate = gates[:, i, None, None, None]
            state = torch.lerp(self._down(self.reads[i + 1], operands), state, gate)
            own = None if keep is None else keep[:, site : site + side.sites]
            state = side(state, own, products)
            before, site = side.block, site + side.sites
        pooled = pool_tokens(self.norm(state), self.settings.pool, self.prefix_tokens)  # (K, B, d)
        return self.head(self.final_norm(self.up(pooled, pooled.dtype)))

    def _down(self, tap: str, operands: Mapping[str, Tensor]) -> Tensor:
        ladder = self.downs[tap]
        assert isinstance(ladder, Linear)
        return ladder.of_constant(operands[tap])

    def start_from(self, initial: Mapping[str, Tensor]) -> None:
        if self.settings.init != "pruned":
            return
        targets = {"norm": self.norm} | {
            f"block{layer}/": block
            for layer, block in zip(self.layers, self._side_blocks(), strict=True)
        }
        for prefix, module in targets.items():
            for name, parameter in module.named_parameters():
                joint = "" if prefix.endswith("/") else "_"
                self._copy(f"{prefix}{joint}{name.replace('.', '_')}", parameter, initial)

    def _copy(self, name: str, parameter: nn.Parameter, initial: Mapping[str, Tensor]) -> None:
        found = initial.get(name)
        if found is None or found.shape != parameter.shape[1:]:
            came = "no pruned weights" if not initial else f"pruned weights without {name}"
            if found is not None:
                came = f"{name} of shape {tuple(found.shape)}, not {tuple(parameter.shape[1:])}"
            raise LookupError(
                f"init = 'pruned': the cache has {came}. Extract with --ladder-init magnitude "
                f"--reduction {self.settings.reduction} and these layers kept "
                f"(--keep-layers {self.settings.keep_layers})."
            )
        with torch.no_grad():
            parameter.copy_(found.expand_as(parameter))


def _check_blocks(path: Sequence[Block], layers: Sequence[int], settings: LSTSettings) -> None:
    """Refuse what a ladder cannot be built on. `path` is block 0, then the kept ones."""
    for layer, block in zip([0, *layers], path, strict=True):
        if block["kind"] not in KINDS:
            kind, reason = block.get("type", block["kind"]), block.get("reason", "unknown")
            raise ValueError(
                f"lst: block {layer} of this backbone is of type {kind}, of which no side block "
                f"can be made ({reason}); last, miet, attentive and linear need no blocks"
            )
        if settings.init == "pruned" and block["kind"] != "vit":
            raise ValueError("init = 'pruned': expected a plain ViT; this backbone is hierarchical")
        check_reduction(block, layer, settings.reduction)
