"""Side blocks of a ladder: the backbone's own kinds of block at 1/r of the width, K at a time.

Made from a block's description (`pipeline/backbones/blocks.py`), they know nothing of ladders and
gates. Each equals timm's block of that width with the same weights (tests, in float64): pre-norm
ViT blocks with or without layer scale, qk-norm and biases, GELU or SwiGLU; Swin's shifted windows;
ConvNeXt's depthwise convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.side.contract import member_parameter, zero_parameter
from pipeline.side.ladder_geometry import Block, relative_index, side_shape, window_mask
from pipeline.side.layers import ConstantProduct, fused_attention

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": functional.silu,
    "relu": functional.relu,
}


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
    names that `pipeline.backbones.blocks.matrices` gives to the backbone's.
    """

    sites = 2

    def __init__(
        self, block: Block, reduction: int, seeds: Sequence[int], streams: Iterator[int]
    ) -> None:
        super().__init__()
        self.block = block
        dim, hidden, _ = side_shape(block, reduction)
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
        dim, _, head = side_shape(block, reduction)
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
            out = fused_attention(q, k, v).unflatten(0, x.shape[:2])  # (K, N, H, T, e)
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
        self.register_buffer("index", relative_index(rows, columns), persistent=False)
        self.register_buffer("mask", window_mask(block), persistent=False)

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
        dim, _, _ = side_shape(block, reduction)
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
