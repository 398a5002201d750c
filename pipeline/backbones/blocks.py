"""What a backbone's blocks are made of, read from timm's modules by their attributes.

`describe` tells enough to build the same kind of block at another width, in plain JSON values, so
that a cache can carry it; `matrices` names a ViT block's weights for pruning. A block that is not
understood to its last parameter is described as unknown, with the reason: a guess here would be a
side network that is silently not the paper's.

    vit        pre-norm attention and feed-forward, with or without qk-norm, layer scale, biases
    swin       the same with attention in shifted windows and a relative position bias
    convnext   depthwise convolution, norm, feed-forward, layer scale
    unknown    anything else: `type` and `reason`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Grid = tuple[int, int] | None
ACTIVATIONS = {
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "QuickGELU": "quick_gelu",
    "SiLU": "silu",
    "ReLU": "relu",
}


class _Unknown(Exception):
    """Why a block is not understood."""


def describe(blocks: Sequence[nn.Module], grids: Sequence[Grid]) -> tuple[dict[str, Any], ...]:
    """One description a block; `grids` are (rows, columns) of each block's tokens, None if flat."""
    return tuple(_describe(block, grid) for block, grid in zip(blocks, grids, strict=True))


def _describe(block: nn.Module, grid: Grid) -> dict[str, Any]:
    try:
        reader = READERS.get(_timm_name(block))
        if reader is None:
            raise _Unknown("no block type that a ladder knows")
        described, understood = reader(block)
        extra = {name for name, _ in block.named_parameters()} - understood
        _require(not extra, f"unexpected parameters {', '.join(sorted(extra))}")
        _require(described["kind"] == "vit" or grid is not None, "its tokens are not on a grid")
    except _Unknown as reason:
        return {"kind": "unknown", "type": type(block).__name__, "reason": str(reason)}
    return {**described, "grid": None if grid is None else list(grid)}


def _timm_name(module: nn.Module) -> str:
    """`vision_transformer.Block`: other files of timm have other classes of the same name."""
    return f"{type(module).__module__.rsplit('.', 1)[-1]}.{type(module).__name__}"


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise _Unknown(reason)


def _vit(block: Any) -> tuple[dict[str, Any], set[str]]:
    attention = block.attn
    _require(type(attention).__name__ == "Attention", f"attention {type(attention).__name__}")
    for name in ("norm", "gate"):
        part = getattr(attention, name, None)
        _require(part is None or isinstance(part, nn.Identity), f"attention with a {name}")
    qk_norm = None if isinstance(attention.q_norm, nn.Identity) else _norm(attention.q_norm)
    _require(qk_norm is None or qk_norm == _norm(attention.k_norm), "q and k have unequal norms")
    scales = [not isinstance(scale, nn.Identity) for scale in (block.ls1, block.ls2)]
    _require(scales[0] == scales[1], "layer scale on one branch only")
    described = {
        "kind": "vit",
        **_attention(attention),
        **_feed_forward(block.mlp),
        **_two_norms(block),
        "qk_norm": qk_norm,
        "layer_scale": scales[0],
    }
    understood = set(_vit_names(described)) | {f"attn.{n}" for n in _names(attention)}
    return described, understood | {f"mlp.{n}" for n in _names(block.mlp)}


def _vit_names(described: dict[str, Any]) -> list[str]:
    norms = ["norm1.weight", "norm2.weight", "norm1.bias", "norm2.bias"]
    return norms + (["ls1.gamma", "ls2.gamma"] if described["layer_scale"] else [])


def _swin(block: Any) -> tuple[dict[str, Any], set[str]]:
    attention = block.attn
    described = {
        "kind": "swin",
        **_attention(attention),
        **_feed_forward(block.mlp),
        **_two_norms(block),
        "window": list(block.window_size),
        "shift": list(block.shift_size),
    }
    understood = {f"attn.{n}" for n in [*_names(attention), "relative_position_bias_table"]}
    norms = {"norm1.weight", "norm2.weight", "norm1.bias", "norm2.bias"}
    return described, understood | norms | {f"mlp.{n}" for n in _names(block.mlp)}


def _convnext(block: Any) -> tuple[dict[str, Any], set[str]]:
    conv = block.conv_dw
    _require(isinstance(block.shortcut, nn.Identity), "a shortcut that is not the identity")
    _require(tuple(conv.stride) == (1, 1), f"stride {conv.stride}")
    _require(tuple(conv.dilation) == (1, 1), f"dilation {conv.dilation}")
    size = conv.kernel_size[0]
    _require(conv.kernel_size == (size, size) and size % 2 == 1, f"kernel {conv.kernel_size}")
    described = {
        "kind": "convnext",
        "dim": conv.out_channels,
        "kernel": size,
        "conv_bias": conv.bias is not None,
        **_feed_forward(block.mlp),
        "norm": _norm(block.norm),
        "layer_scale": block.gamma is not None,
    }
    own = {"conv_dw.weight", "conv_dw.bias", "norm.weight", "norm.bias", "gamma"}
    return described, own | {f"mlp.{n}" for n in _names(block.mlp)}


READERS: dict[str, Callable[[Any], tuple[dict[str, Any], set[str]]]] = {
    "vision_transformer.Block": _vit,
    "swin_transformer.SwinTransformerBlock": _swin,
    "convnext.ConvNeXtBlock": _convnext,
}


def _attention(attention: Any) -> dict[str, Any]:
    heads, width = int(attention.num_heads), int(attention.proj.in_features)
    return {
        "dim": int(attention.qkv.in_features),
        "heads": heads,
        "head_dim": width // heads,
        "qkv_bias": attention.qkv.bias is not None,
        "proj_bias": attention.proj.bias is not None,
    }


def _feed_forward(mlp: Any) -> dict[str, Any]:
    """`hidden` is the width that enters the second map; `ff` is `mlp` or `gated` (SwiGLU)."""
    kind = type(mlp).__name__
    _require(kind in ("Mlp", "SwiGLU", "GluMlp"), f"feed-forward part {kind}")
    _require(isinstance(mlp.norm, nn.Identity), "a norm inside the feed-forward part")
    act = type(mlp.act).__name__
    _require(act in ACTIVATIONS, f"activation {act}")
    first = mlp.fc1_g if kind == "SwiGLU" else mlp.fc1
    name = ACTIVATIONS[act]
    if name == "gelu" and getattr(mlp.act, "approximate", "none") == "tanh":
        name = "gelu_tanh"
    return {
        "ff": "mlp" if kind == "Mlp" else "gated",
        "hidden": int(mlp.fc2.weight.shape[1]),
        "act": name,
        "fc1_bias": first.bias is not None,
        "fc2_bias": mlp.fc2.bias is not None,
    }


def _two_norms(block: Any) -> dict[str, Any]:
    norm = _norm(block.norm1)
    _require(norm == _norm(block.norm2), "its two norms differ")
    return {"norm": norm}


def _norm(norm: Any) -> dict[str, Any]:
    kind = type(norm).__name__
    _require(isinstance(norm, nn.LayerNorm) or kind in ("RmsNorm", "RMSNorm"), f"norm {kind}")
    _require(norm.weight is not None and norm.eps is not None, f"{kind} without weight or eps")
    layer = isinstance(norm, nn.LayerNorm)
    return {
        "kind": "layer" if layer else "rms",
        "eps": float(norm.eps),
        "bias": layer and norm.bias is not None,
    }


def _names(part: nn.Module) -> list[str]:
    """The parameters of a part that `_attention`, `_norm` and `_feed_forward` have read."""
    read = ("qkv", "q_norm", "k_norm", "proj", "fc1", "fc1_g", "fc1_x", "fc2")
    return [name for name, _ in part.named_parameters() if name.rsplit(".", 1)[0] in read]


def matrices(block: Any, of: Callable[[Tensor], Tensor] = Tensor.detach) -> dict[str, Tensor]:
    """A ViT block's parameters under the names of a side block's, each passed through `of`.

    A gated feed-forward part is given as one `fc1`, the gate's rows first.
    """
    named: dict[str, Tensor | None] = {}
    attention, mlp = block.attn, block.mlp
    parts = {"norm1": block.norm1, "qkv": attention.qkv, "q_norm": attention.q_norm}
    parts |= {"k_norm": attention.k_norm, "proj": attention.proj, "norm2": block.norm2}
    for name, part in {**parts, "fc2": mlp.fc2}.items():
        for kind in ("weight", "bias"):
            named[f"{name}.{kind}"] = getattr(part, kind, None)
    named |= {name: getattr(getattr(block, name), "gamma", None) for name in ("ls1", "ls2")}
    found = {name: of(values) for name, values in named.items() if values is not None}
    for kind in ("weight", "bias"):
        halves = _first_maps(mlp, kind)
        if halves:
            found[f"fc1.{kind}"] = torch.cat([of(half) for half in halves])
    if type(mlp).__name__ == "GluMlp" and mlp.gate_last:
        for name in [name for name in found if name.startswith("fc1.")]:
            found[name] = found[name].roll(len(found[name]) // 2, dims=0)
    return found


def _first_maps(mlp: Any, kind: str) -> list[Tensor]:
    linears = [mlp.fc1_g, mlp.fc1_x] if type(mlp).__name__ == "SwiGLU" else [mlp.fc1]
    values = [getattr(linear, kind) for linear in linears]
    return [value for value in values if value is not None]
