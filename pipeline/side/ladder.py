"""LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning.

Sung, Cho, Bansal. NeurIPS 2022, arXiv 2206.06522; code: ylsung/Ladder-Side-Tuning. [code]

    s = Down_0(z_0)
    for each kept block i:  g = sigmoid(alpha_i / 0.1)
                            s = SideBlock_i(g s + (1 - g) Down_i(z_i))
    logits = head(frozen final norm(Up(pool(side norm(s)))))

paper → code: reduction factor r → `reduction`; gate temperature → `temperature`; layer dropping →
`keep_layers`; side network initialisation → `init`; ladders ("side downsamples") → `downs`;
alpha → `gate`, 0 at the start; SideBlock_i → `blocks`.

What is whose. [code]: the recursion (the gate multiplies the side state, the mix comes before the
block, a dropped layer loses its ladder, gate and block together); SideBlock as the backbone's own
block at 1/r of the width, of the feed-forward width and of each head's width, with as many heads;
biased Down and Up; the side norm; initial weights by pruning (`pipeline/prune.py`); layers numbered
from 0. [ours]: pool, frozen norm and trained head (T5 goes on to its own language head); pool
before Up, which is exact; random weights start at 1 / sqrt(inputs) throughout, as in T5's own
blocks (its Down and Up start at 0.01); layer scale starts at 1; no dropout, but drop-path.

Hierarchical backbones, all [ours]: where grid and width change, f x f patches of s are laid side by
side and mapped to the new width, f being the ratio of the grids (Swin's merging without its norm;
a grid that f does not divide is padded with zeros, or cut if it came out smaller). Side blocks are
then Swin's (shifted windows, mask, relative position bias) or ConvNeXt's at 1/r of the width.

Parameters, with d = D/r and m = hidden/r, of n kept ViT blocks that have all biases: ladders
(n + 1)(D + 1)d, gates n, blocks n(4d(d + 1) + 2dm + m + d + 4d), side norm 2d, Up (d + 1)D, head
C(D + 1). `ladder_count` counts every variant.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.side.contract import (
    FeatureSpec,
    Operands,
    Settings,
    SideNetwork,
    find_taps,
    member_parameter,
    zero_parameter,
)
from pipeline.side.layers import (
    ConstantProduct,
    FrozenNorm,
    Head,
    check_pool,
    pool_tokens,
)

Block = Mapping[str, Any]  # one description of `pipeline.blocks.describe`
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": functional.silu,
    "relu": functional.relu,
}


@dataclass(frozen=True, kw_only=True)
class LSTSettings(Settings):
    """Shape of a ladder: `reduction` r, `keep_layers`, gate `temperature`, `init`, `pool`.

    `keep_layers` is `all`, `every:2` (counted back from the last), `last:3`, or layer numbers from
    0 as in the paper's code, `1,2,3,5`. `init` is `random`, or `pruned` from the cache's tables.
    """

    reduction: int = 8
    keep_layers: str = "all"
    temperature: float = 0.1
    init: str = "random"
    pool: str = "mean"

    def __post_init__(self) -> None:
        self.require(self.reduction >= 1, "reduction", "1 or more")
        self.require(_grammatical(self.keep_layers), "keep_layers", KEEP_LAYERS)
        self.require(self.temperature > 0, "temperature", "more than 0")
        self.require(self.init in ("random", "pruned"), "init", "random or pruned")
        self.require(self.pool in self.POOLS, "pool", " or ".join(self.POOLS))


KEEP_LAYERS = "all, every:2, last:3, or layer numbers from 0 such as 1,2,3,5"


def _grammatical(text: str) -> bool:
    kind, colon, number = text.partition(":")
    if colon:
        return kind in ("every", "last") and number.isdecimal() and int(number) >= 1
    return text == "all" or all(part.strip().isdecimal() for part in text.split(","))


def keep_layers(text: str, blocks: int) -> tuple[int, ...]:
    """Numbers from 0, ascending, of the layers that `text` keeps of `blocks`; see LSTSettings."""
    if not _grammatical(text):
        raise ValueError(f"keep_layers = {text!r}: expected {KEEP_LAYERS}")
    kind, _, number = text.partition(":")
    if kind == "every":
        chosen = list(range(blocks - 1, -1, -int(number)))[::-1]
    elif kind == "last":
        chosen = list(range(blocks - int(number), blocks))
    elif kind == "all":
        chosen = list(range(blocks))
    else:
        chosen = sorted({int(part) for part in text.split(",")})
    if chosen[0] < 0 or chosen[-1] >= blocks:
        raise ValueError(f"keep_layers = {text!r}: the backbone has layers 0 to {blocks - 1}")
    return tuple(chosen)


class Linear(nn.Module):
    """K linear maps: (K, …, n) → (K, …, m), in the precision `products`."""

    bias: Tensor | None

    def __init__(
        self, inputs: int, outputs: int, seeds: Sequence[int], streams: Iterator[int], bias: bool
    ) -> None:
        super().__init__()
        std = inputs**-0.5
        self.weight = member_parameter((outputs, inputs), seeds, std=std, stream=next(streams))
        self.register_parameter("bias", zero_parameter((outputs,), len(seeds)) if bias else None)

    def forward(self, x: Tensor, products: torch.dtype) -> Tensor:
        flat, weight = x.flatten(1, -2).to(products), self.weight.mT.to(products)  # (K, N, n)
        if self.bias is None:
            out = flat @ weight
        else:
            out = torch.baddbmm(self.bias[:, None].to(products), flat, weight)  # (K, N, m)
        return out.unflatten(1, x.shape[1:-1])  # (K, …, m)

    def of_constant(self, constant: Tensor) -> Tensor:
        """The same of a constant (…, n) that the members share, wider than the constant."""
        flat = constant.flatten(0, -2)  # (N, n)
        out, _ = ConstantProduct.apply(flat, self.weight, self.weight.shape[1])
        out = out.unflatten(1, constant.shape[:-1])  # (K, …, m)
        shape = (len(out), *[1] * (out.ndim - 2), out.shape[-1])
        return out.to(self.weight.dtype) if self.bias is None else out + self.bias.view(shape)


class Norm(nn.Module):
    """K norms over the last axis, (K, …, d) → (K, …, d), computed in the weights' precision."""

    bias: Tensor | None

    def __init__(self, dim: int, members: int, description: Block) -> None:
        super().__init__()
        self.kind, self.eps = description["kind"], description["eps"]
        self.weight = nn.Parameter(torch.ones(members, dim))
        bias = zero_parameter((dim,), members) if description["bias"] else None
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        norm = functional.layer_norm if self.kind == "layer" else functional.rms_norm
        shape = (len(x), *[1] * (x.ndim - 2), x.shape[-1])
        out = norm(x.to(self.weight.dtype), x.shape[-1:], eps=self.eps)
        if self.bias is None:
            return out * self.weight.view(shape)
        return torch.addcmul(self.bias.view(shape), out, self.weight.view(shape))


class SideBlock(nn.Module):
    """What the three kinds share: the feed-forward part, layer scale, the residual sum.

    `forward` takes a state (K, B, T, d) and `keep` (K, sites, B) or None. Parameters bear the
    names that `pipeline.blocks.matrices` gives to the backbone's.
    """

    sites = 2

    def __init__(
        self, block: Block, reduction: int, seeds: Sequence[int], streams: Iterator[int]
    ) -> None:
        super().__init__()
        self.block = block
        dim, hidden, _ = _side_shape(block, reduction)
        first = hidden * (2 if block["ff"] == "gated" else 1)
        self.fc1 = Linear(dim, first, seeds, streams, block["fc1_bias"])
        self.fc2 = Linear(hidden, dim, seeds, streams, block["fc2_bias"])
        self.activation = ACTIVATIONS[block["act"]]

    def _scale(self, name: str, dim: int, members: int) -> None:
        """A layer scale, where the block has it."""
        scale = nn.Parameter(torch.ones(members, dim)) if self.block.get("layer_scale") else None
        self.register_parameter(name, scale)

    def _feed_forward(self, x: Tensor, products: torch.dtype) -> Tensor:
        hidden = self.fc1(x, products)
        if self.block["ff"] == "gated":
            gate, value = hidden.chunk(2, dim=-1)
            return self.fc2(self.activation(gate) * value, products)
        return self.fc2(self.activation(hidden), products)

    def _add(
        self, x: Tensor, branch: Tensor, scale: Tensor | None, keep: Tensor | None, site: int
    ) -> Tensor:
        if scale is not None:
            branch = branch * scale[:, None, None]
        if keep is not None:
            branch = branch * keep[:, site, :, None, None]
        return x + branch


class ViTBlock(SideBlock):
    """timm's pre-norm `Block`: attention, then the feed-forward part."""

    ls1: Tensor | None
    ls2: Tensor | None

    def __init__(
        self, block: Block, reduction: int, seeds: Sequence[int], streams: Iterator[int]
    ) -> None:
        super().__init__(block, reduction, seeds, streams)
        dim, _, head = _side_shape(block, reduction)
        self.heads, inner = block["heads"], block["heads"] * head
        self.norm1 = Norm(dim, len(seeds), block["norm"])
        self.qkv = Linear(dim, 3 * inner, seeds, streams, block["qkv_bias"])
        self.proj = Linear(inner, dim, seeds, streams, block["proj_bias"])
        self.norm2 = Norm(dim, len(seeds), block["norm"])
        self.q_norm = self.k_norm = None
        if block.get("qk_norm"):
            self.q_norm = Norm(head, len(seeds), block["qk_norm"])
            self.k_norm = Norm(head, len(seeds), block["qk_norm"])
        self._scale("ls1", dim, len(seeds))
        self._scale("ls2", dim, len(seeds))

    def forward(self, x: Tensor, keep: Tensor | None, products: torch.dtype) -> Tensor:
        x = self._add(x, self._mix(self.norm1(x), products), self.ls1, keep, 0)
        return self._add(x, self._feed_forward(self.norm2(x), products), self.ls2, keep, 1)

    def _mix(self, x: Tensor, products: torch.dtype) -> Tensor:
        return self._attend(x, products, None)

    def _attend(self, x: Tensor, products: torch.dtype, added: Tensor | None) -> Tensor:
        """(K, N, T, d) → (K, N, T, d); `added`, which broadcasts to (K, N, H, T, T), is added to
        the scores."""
        qkv = self.qkv(x, products).unflatten(-1, (3, self.heads, -1))  # (K, N, T, 3, H, e)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).contiguous()  # each (K, N, H, T, e)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k).to(products)
        q = (q * q.shape[-1] ** -0.5).to(products)
        if added is not None:
            out = torch.softmax(q @ k.mT + added, dim=-1).to(products) @ v
        elif q.is_cuda:
            q, k, v = (part.flatten(0, 1) for part in (q, k, v))  # (K N, H, T, e): fused kernels
            out = functional.scaled_dot_product_attention(q, k, v, scale=1.0)
            out = out.unflatten(0, x.shape[:2])  # (K, N, H, T, e)
        else:
            flat = (part.flatten(0, 2) for part in (q, k, v))  # each (K N H, T, e)
            out = LeanAttention.apply(*flat).view_as(q)
        return self.proj(out.transpose(2, 3).flatten(-2), products)  # (K, N, T, d)


class LeanAttention(torch.autograd.Function):
    """softmax(q k^T) v of (G, T, e) each, on the CPU, a few of the G at a time.

    Scores are computed again in the backward pass and never leave the processor's cache. With
    heads of width 8 they would be most of a ladder's memory. Measured at T = 197: as fast as
    keeping them in bfloat16, up to twice as fast in float32; in bfloat16 almost three times as
    fast as the fused kernel.
    """

    SCORES = 2**19  # held at a time

    @staticmethod
    def _parts(q: Tensor) -> Iterator[slice]:
        size = max(1, LeanAttention.SCORES // q.shape[1] ** 2)
        return (slice(start, start + size) for start in range(0, len(q), size))

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        out = torch.empty_like(v)
        for part in LeanAttention._parts(q):
            torch.bmm(torch.softmax(q[part] @ k[part].mT, dim=-1), v[part], out=out[part])
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        out = gradients[0].contiguous()
        to_q, to_k, to_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for part in LeanAttention._parts(q):
            weights = torch.softmax(q[part] @ k[part].mT, dim=-1)
            torch.bmm(weights.mT, out[part], out=to_v[part])
            scores = torch.ops.aten._softmax_backward_data(
                out[part] @ v[part].mT, weights, -1, weights.dtype
            )
            torch.bmm(scores, k[part], out=to_q[part])
            torch.bmm(scores.mT, q[part], out=to_k[part])
        return to_q, to_k, to_v


class SwinBlock(ViTBlock):
    """Swin's block: the attention of a ViT block in windows, every second one shifted."""

    index: Tensor
    mask: Tensor | None

    def __init__(
        self, block: Block, reduction: int, seeds: Sequence[int], streams: Iterator[int]
    ) -> None:
        super().__init__(block, reduction, seeds, streams)
        rows, columns = self.window = tuple(block["window"])
        table = ((2 * rows - 1) * (2 * columns - 1), self.heads)
        self.position_bias = member_parameter(table, seeds, std=0.02, stream=next(streams))
        self.register_buffer("index", _relative_index(rows, columns), persistent=False)
        self.register_buffer("mask", _window_mask(block), persistent=False)

    def _mix(self, x: Tensor, products: torch.dtype) -> Tensor:
        (rows, columns), shift = self.block["grid"], tuple(self.block["shift"])
        x = x.unflatten(2, (rows, columns)).roll((-shift[0], -shift[1]), (2, 3))
        down, right = (-rows % self.window[0], -columns % self.window[1])
        x = functional.pad(x, (0, 0, 0, right, 0, down))  # (K, B, H, W, d), whole windows
        tall, broad = x.shape[2] // self.window[0], x.shape[3] // self.window[1]
        windows = self._windows(x, tall, broad)  # (K, B windows, area, d)
        mixed = self._attend(windows, products, self._added(x.shape[1]))
        parts = mixed.unflatten(2, self.window).unflatten(1, (x.shape[1], tall, broad))
        whole = parts.transpose(3, 4).flatten(4, 5).flatten(2, 3)  # (K, B, H, W, d)
        return whole[:, :, :rows, :columns].roll(shift, (2, 3)).flatten(2, 3)  # (K, B, T, d)

    def _windows(self, x: Tensor, tall: int, broad: int) -> Tensor:
        x = x.unflatten(3, (broad, -1)).unflatten(2, (tall, -1))  # (K, B, tall, h, broad, w, d)
        return x.transpose(3, 4).flatten(4, 5).flatten(1, 3)  # (K, B windows, area, d)

    def _added(self, batch: int) -> Tensor:
        """Position bias and mask, (K, B windows or 1, H, area, area)."""
        bias = self.position_bias[:, self.index].permute(0, 3, 1, 2)[:, None]
        if self.mask is None:
            return bias
        return (bias + self.mask[:, None].to(bias.dtype)).repeat(1, batch, 1, 1, 1)


class ConvNeXtBlock(SideBlock):
    """ConvNeXt's block: depthwise convolution, norm, feed-forward, one residual sum."""

    sites = 1
    ls: Tensor | None
    conv_bias: Tensor | None

    def __init__(
        self, block: Block, reduction: int, seeds: Sequence[int], streams: Iterator[int]
    ) -> None:
        super().__init__(block, reduction, seeds, streams)
        dim, _, _ = _side_shape(block, reduction)
        size = block["kernel"]
        shape = (dim, size, size)
        self.conv_weight = member_parameter(shape, seeds, std=1 / size, stream=next(streams))
        bias = zero_parameter((dim,), len(seeds)) if block["conv_bias"] else None
        self.register_parameter("conv_bias", bias)
        self.norm = Norm(dim, len(seeds), block["norm"])
        self._scale("ls", dim, len(seeds))

    def forward(self, x: Tensor, keep: Tensor | None, products: torch.dtype) -> Tensor:
        branch = self._feed_forward(self.norm(self._convolve(x, products)), products)
        return self._add(x, branch, self.ls, keep, 0)

    def _convolve(self, x: Tensor, products: torch.dtype) -> Tensor:
        """All members in one grouped convolution of K d channels."""
        members, _, _, dim = x.shape
        maps = (
            x.permute(1, 0, 3, 2).flatten(1, 2).unflatten(2, self.block["grid"])
        )  # (B, K d, H, W)
        weight = self.conv_weight.flatten(0, 1)[:, None].to(products)  # (K d, 1, k, k)
        out = functional.conv2d(
            maps.to(products), weight, padding=self.block["kernel"] // 2, groups=members * dim
        )
        out = out.to(x.dtype).flatten(2).unflatten(1, (members, dim)).permute(1, 0, 3, 2)
        return (
            out if self.conv_bias is None else out + self.conv_bias[:, None, None]
        )  # (K, B, T, d)


KINDS: dict[str, type[SideBlock]] = {"vit": ViTBlock, "swin": SwinBlock, "convnext": ConvNeXtBlock}


def _side_shape(block: Block, reduction: int) -> tuple[int, int, int]:
    """Width, feed-forward width and head width of a side block; 0 for a block without heads."""
    head = block["head_dim"] // reduction if "heads" in block else 0
    return block["dim"] // reduction, max(1, block["hidden"] // reduction), head


def _relative_index(rows: int, columns: int) -> Tensor:
    """(area, area): which row of the position table tells where one token lies from another."""
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))  # (area, 2)
    apart = places[:, None] - places[None] + torch.tensor([rows - 1, columns - 1])
    return apart[..., 0] * (2 * columns - 1) + apart[..., 1]


def _window_mask(block: Block) -> Tensor | None:
    """(windows, area, area): -100, as in Swin, between tokens brought together by the shift."""
    if not any(block["shift"]):
        return None
    regions = []
    for size, window, shift in zip(block["grid"], block["window"], block["shift"], strict=True):
        length = math.ceil(size / window) * window
        region = torch.zeros(length, dtype=torch.long)
        if shift:
            region[length - window :] = 1
            region[length - shift :] = 2
        regions.append(region.unflatten(0, (-1, window)))  # (windows along this axis, window)
    rows, columns = regions
    ids = 3 * rows[:, None, :, None] + columns[None, :, None, :]  # (tall, broad, h, w)
    ids = ids.flatten(2).flatten(0, 1)  # (windows, area)
    return torch.where(ids[:, :, None] == ids[:, None], 0.0, -100.0)


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
        wanted = ["z0", *(f"z{layer + 1}" for layer in self.layers)]
        self.reads = find_taps(wanted, tuple(spec.taps), self.method)
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
            if _merged(before, block):
                inputs = _merge_factor(before, block) ** 2 * (before["dim"] // reduction)
                outputs = block["dim"] // reduction
                self.merges[str(layer)] = Linear(inputs, outputs, seeds, streams, False)
            self.blocks[str(layer)] = KINDS[block["kind"]](block, reduction, seeds, streams)
        self.gate = zero_parameter((len(self.layers),), len(seeds))
        self.norm = Norm(widths[-1], len(seeds), path[-1]["norm"])
        deepest = max(spec.taps, key=lambda tap: int(tap[1:]) if tap[1:].isdigit() else -1)
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

    def operands(self, features: Mapping[str, Tensor], dtype: torch.dtype) -> Operands:
        """The taps themselves: z0 and the outputs of the kept blocks, each (B, T, D)."""
        contiguous = torch.contiguous_format
        return {
            tap: features[tap].to(dtype, copy=True, memory_format=contiguous) for tap in self.reads
        }

    def forward(self, operands: Mapping[str, Tensor], keep: Tensor | None = None) -> Tensor:
        products = operands["z0"].dtype
        state = self._down("z0", operands)  # (K, B, T, d)
        gates = torch.sigmoid(self.gate / self.settings.temperature)  # (K, kept blocks)
        before, site = self.spec.blocks[0], 0
        for i, (layer, side) in enumerate(zip(self.layers, self._side_blocks(), strict=True)):
            if str(layer) in self.merges:
                patches = _patches(state, before, side.block)
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


def check_reduction(block: Block, layer: int, reduction: int) -> None:
    """Refuse a reduction that does not divide a block's width, and that of each of its heads."""
    dim, heads = block["dim"], block.get("heads", 1)
    head = block["head_dim"] if "heads" in block else dim
    if dim % reduction or head % reduction:
        raise ValueError(
            f"reduction = {reduction}: expected a divisor of the width of block {layer} ({dim}) "
            f"and of that of each of its heads ({heads} of width {head})"
        )


def _merged(before: Block, block: Block) -> bool:
    """Whether the side state changes its shape between two blocks."""
    return (before["grid"], before["dim"]) != (block["grid"], block["dim"])


def _merge_factor(before: Block, block: Block) -> int:
    if before["grid"] is None or block["grid"] is None:
        return 1
    return max(1, round(before["grid"][0] / block["grid"][0]))


def _patches(state: Tensor, before: Block, block: Block) -> Tensor:
    """(K, B, T, d) on the grid of `before` → (K, B, T', f f d) on the grid of `block`."""
    factor = _merge_factor(before, block)
    rows, columns = (factor * side for side in block["grid"])
    grid = state.unflatten(2, before["grid"])[:, :, :rows, :columns]  # (K, B, H, W, d)
    grid = functional.pad(grid, (0, 0, 0, columns - grid.shape[3], 0, rows - grid.shape[2]))
    parts = grid.unflatten(3, (-1, factor)).unflatten(2, (-1, factor))  # (K, B, H', f, W', f, d)
    return parts.permute(0, 1, 2, 4, 3, 5, 6).flatten(4).flatten(2, 3)  # (K, B, T', f f d)


def linear_count(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + (outputs if bias else 0)


def norm_count(dim: int, norm: Block) -> int:
    return dim * (2 if norm["bias"] else 1)


def attention_count(block: Block, reduction: int) -> int:
    """q, k, v and the output map of a side block, with the norms of q and k."""
    dim, _, head = _side_shape(block, reduction)
    inner = block["heads"] * head
    maps = linear_count(dim, 3 * inner, block["qkv_bias"])
    maps += linear_count(inner, dim, block["proj_bias"])
    return maps + (2 * norm_count(head, block["qk_norm"]) if block.get("qk_norm") else 0)


def block_count(block: Block, reduction: int) -> int:
    """Parameters of one side block."""
    dim, hidden, _ = _side_shape(block, reduction)
    first = hidden * (2 if block["ff"] == "gated" else 1)
    count = linear_count(dim, first, block["fc1_bias"])
    count += linear_count(hidden, dim, block["fc2_bias"])
    sites = KINDS[block["kind"]].sites
    count += sites * (norm_count(dim, block["norm"]) + dim * bool(block.get("layer_scale")))
    if block["kind"] == "convnext":
        return count + linear_count(block["kernel"] ** 2, dim, block["conv_bias"])
    count += attention_count(block, reduction)
    if block["kind"] == "swin":
        rows, columns = block["window"]
        count += (2 * rows - 1) * (2 * columns - 1) * block["heads"]
    return count


def ladder_count(path: Sequence[Block], reduction: int, *, gates: int | None = None) -> int:
    """Parameters of a ladder: downs, gates, merges, side blocks, side norm.

    `path` is the block that z0 enters, then the kept ones; one gate a kept block, or `gates`.
    """
    widths = [block["dim"] // reduction for block in path]
    count = sum(linear_count(block["dim"], d) for block, d in zip(path, widths, strict=True))
    count += len(path) - 1 if gates is None else gates
    for before, block in itertools.pairwise(path):
        count += block_count(block, reduction)
        if _merged(before, block):
            inputs = _merge_factor(before, block) ** 2 * (before["dim"] // reduction)
            count += linear_count(inputs, block["dim"] // reduction, bias=False)
    return count + norm_count(widths[-1], path[-1]["norm"])


def parameter_count(path: Sequence[Block], reduction: int, dim: int, classes: int) -> int:
    """All parameters of one LST network that ends in width `dim`: ladder, Up, head."""
    up = linear_count(path[-1]["dim"] // reduction, dim)
    return ladder_count(path, reduction) + up + linear_count(dim, classes)
