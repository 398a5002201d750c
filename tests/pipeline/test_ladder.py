"""LST against references: the equations written plainly, and timm's own blocks, in float64."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from ladder_counts import (
    attention_count,
    block_count,
    ladder_count,
    linear_count,
    norm_count,
    parameter_count,
)
from timm.layers import LayerNorm, QuickGELU, RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.convnext import ConvNeXtBlock
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional

from pipeline.backbones.blocks import describe, matrices
from pipeline.side.contract import FeatureSpec, TokenShape
from pipeline.side.ladder import LST, LSTSettings, keep_layers
from pipeline.side.ladder_blocks import KINDS, LeanAttention, SideBlock

pytestmark = pytest.mark.numerics

LAYER = {"kind": "layer", "eps": 1e-6, "bias": True}
RMS = {"kind": "rms", "eps": 1e-6, "bias": False}
NO_BIAS = {"qkv_bias": False, "proj_bias": False, "fc1_bias": False, "fc2_bias": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer scale, qk-norm": {"layer_scale": True, "qk_norm": LAYER},
    "gated, no biases, rms": {"ff": "gated", "act": "silu", "norm": RMS, **NO_BIAS},
    "rms qk-norm": {"norm": RMS, "qk_norm": RMS, "qkv_bias": False},
}


def vit(dim: int = 48, heads: int = 3, **changes: Any) -> dict[str, Any]:
    defaults = {"kind": "vit", "dim": dim, "heads": heads, "head_dim": dim // heads, "grid": None}
    parts = {"ff": "mlp", "hidden": 4 * dim, "act": "gelu", "norm": LAYER, "qk_norm": None}
    biases = {"qkv_bias": True, "proj_bias": True, "fc1_bias": True, "fc2_bias": True}
    return {**defaults, **parts, **biases, "layer_scale": False, **changes}


def swin(dim: int, grid: tuple[int, int], shift: int, window: int = 3) -> dict[str, Any]:
    changes = {"kind": "swin", "grid": list(grid), "window": [window] * 2, "shift": [shift] * 2}
    return vit(dim, 2, **changes)


def convnext(dim: int, grid: tuple[int, int]) -> dict[str, Any]:
    block = vit(dim, 1, kind="convnext", grid=list(grid), layer_scale=True)
    for name in ("heads", "head_dim", "qk_norm", "qkv_bias", "proj_bias"):
        del block[name]
    return {**block, "kernel": 3, "conv_bias": True}


def make_spec(blocks: list[dict[str, Any]], prefix_tokens: int = 1, **changes: Any) -> FeatureSpec:
    """z0 has the shape that enters block 1; a flat block has 7 tokens."""
    grids = [block["grid"] for block in (blocks[0], *blocks)]
    dims = [block["dim"] for block in (blocks[0], *blocks)]
    taps = {
        f"z{i}": TokenShape(tokens=math.prod(grid or [7]), prefix_tokens=prefix_tokens, dim=dim)
        for i, (grid, dim) in enumerate(zip(grids, dims, strict=True))
    }
    generator = torch.Generator().manual_seed(7)
    defaults: dict[str, Any] = {
        "taps": taps,
        "classes": 5,
        "norm": "layer",
        "norm_eps": 1e-6,
        "norm_weight": torch.rand(dims[-1], generator=generator) + 0.5,
        "norm_bias": torch.rand(dims[-1], generator=generator),
        "blocks": tuple(blocks),
    }
    return FeatureSpec(**{**defaults, **changes})


def shake(module: nn.Module) -> nn.Module:
    """Parameters away from their special starting values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def build(spec: FeatureSpec, seeds: tuple[int, ...] = (0, 1, 2), **settings: Any) -> LST:
    network = shake(LST(spec, LSTSettings(**{"reduction": 4, **settings}), seeds).double())
    assert isinstance(network, LST)
    with torch.no_grad():
        network.gate *= 0.2  # the temperature divides by 0.1
    return network


def features_for(spec: FeatureSpec, rows: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        tap: torch.randn(rows, shape.tokens, shape.dim, generator=generator, dtype=torch.float64)
        for tap, shape in spec.taps.items()
    }


def run(network: LST, features: dict[str, Tensor], keep: Tensor | None = None) -> Tensor:
    return network(network.operands(features, torch.float64), keep)


Parameters = dict[str, Tensor]


def normed(x: Tensor, p: Parameters, name: str, norm: dict[str, Any]) -> Tensor:
    """LayerNorm or RMSNorm over the last axis, from its definition."""
    if norm["kind"] == "layer":
        x = x - x.mean(dim=-1, keepdim=True)
    x = x / (x.square().mean(dim=-1, keepdim=True) + norm["eps"]).sqrt() * p[f"{name}.weight"]
    return x + p.get(f"{name}.bias", 0)


def linear(x: Tensor, p: Parameters, name: str) -> Tensor:
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)


def reference_block(x: Tensor, p: Parameters, block: dict[str, Any], keep: Tensor | None) -> Tensor:
    """A pre-norm ViT block, one member, one head after the other."""
    kept = torch.ones(2, len(x), dtype=x.dtype) if keep is None else keep
    q, k, v = linear(normed(x, p, "norm1", block["norm"]), p, "qkv").chunk(3, dim=-1)
    outputs = []
    for head in zip(*(part.chunk(block["heads"], dim=-1) for part in (q, k, v)), strict=True):
        q, k, v = head
        if block["qk_norm"]:
            q, k = (
                normed(q, p, "q_norm", block["qk_norm"]),
                normed(k, p, "k_norm", block["qk_norm"]),
            )
        outputs.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1) @ v)
    branch = linear(torch.cat(outputs, dim=-1), p, "proj") * p.get("ls1", 1)
    x = x + branch * kept[0, :, None, None]
    hidden = linear(normed(x, p, "norm2", block["norm"]), p, "fc1")
    if block["ff"] == "gated":
        gate, value = hidden.chunk(2, dim=-1)
        hidden = functional.silu(gate) * value
    else:
        hidden = functional.gelu(hidden)
    return x + linear(hidden, p, "fc2") * p.get("ls2", 1) * kept[1, :, None, None]


def reference(
    network: LST, features: dict[str, Tensor], member: int, keep: Tensor | None = None
) -> Tensor:
    """The ladder as the docstring has it, one member of a plain ViT."""
    p = {name: parameter[member] for name, parameter in network.named_parameters()}
    spec, settings = network.spec, network.settings
    s = linear(features["z0"], p, "downs.z0")
    for i, layer in enumerate(network.layers):
        g = 1 / (1 + torch.exp(-p["gate"][i] / 0.1))
        s = g * s + (1 - g) * linear(features[f"z{layer + 1}"], p, f"downs.z{layer + 1}")
        start = f"blocks.{layer}."
        own = {name.removeprefix(start): v for name, v in p.items() if name.startswith(start)}
        kept = None if keep is None else keep[2 * i : 2 * i + 2]
        s = reference_block(s, own, dict(spec.blocks[layer]), kept)
    s = normed(s, p, "norm", spec.blocks[-1]["norm"])
    up = linear(s[:, 0] if settings.pool == "cls" else s[:, 1:].mean(dim=1), p, "up")
    assert spec.norm_weight is not None and spec.norm_bias is not None
    final = {"final.weight": spec.norm_weight.double(), "final.bias": spec.norm_bias.double()}
    return linear(normed(up, final, "final", LAYER), p, "head")


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("settings", [{}, {"keep_layers": "0,2,3", "pool": "cls"}])
def test_logits_and_gradients_equal_the_equations(
    settings: dict[str, Any], variant: str, dropped: bool
) -> None:
    spec = make_spec([vit(**VARIANTS[variant])] * 4)
    network, features = build(spec, **settings), features_for(spec)
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(3, 3, 5, generator=generator, dtype=torch.float64)
    keep = None
    if dropped:
        keep = ((torch.rand(3, network.drop_sites, 3, generator=generator) > 0.4) / 0.6).double()
    logits = run(network, features, keep)
    (logits * target).sum().backward()
    ours = {name: parameter.grad for name, parameter in network.named_parameters()}
    network.zero_grad()
    for member in range(3):
        kept = None if keep is None else keep[member]
        expected = reference(network, features, member, kept)
        torch.testing.assert_close(logits[member], expected, rtol=1e-9, atol=1e-9)
        (expected * target[member]).sum().backward()
    for name, parameter in network.named_parameters():
        assert dropped or (ours[name].flatten(1).abs().amax(1) > 0).all(), name
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-8, atol=1e-9, msg=name)


def alone(side: SideBlock, member: int) -> Parameters:
    return {name: parameter[member].detach() for name, parameter in side.named_parameters()}


def made(block: nn.Module, grid: tuple[int, int] | None) -> SideBlock:
    """A side block of width 1/1 with two members, away from its starting values."""
    described = describe([block], [grid])[0]
    assert described["kind"] in KINDS, described
    kind = KINDS[described["kind"]]
    side = shake(kind(described, 1, [4, 5], itertools.count(1)).double())
    assert isinstance(side, SideBlock)
    assert sum(p[0].numel() for p in side.parameters()) == block_count(described, 1)
    assert sum(p.numel() for p in block.parameters()) == block_count(described, 1)
    return side


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_bias": True},
        {"qkv_bias": True, "init_values": 0.1, "qk_norm": True},
        {"mlp_layer": SwiGLU, "proj_bias": False, "act_layer": nn.SiLU},
        {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU},
        {"mlp_layer": SwiGLUPacked, "act_layer": nn.GELU},
        {"norm_layer": RmsNorm, "qk_norm": True, "act_layer": QuickGELU},
        {"act_layer": nn.ReLU, "mlp_ratio": 2.0},
        {"norm_layer": lambda dim, **kwargs: LayerNorm(dim, eps=1e-3, **kwargs)},
    ],
)
def test_vit_block_is_timms(changes: dict[str, Any]) -> None:
    """One member's weights copied into timm's block give the same output."""
    block = Block(12, 3, **{"norm_layer": LayerNorm, **changes}).double().eval()
    side = made(block, None)
    x = torch.randn(2, 2, 7, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ours = side(x, None, torch.float64)
    for member in range(2):
        weights = alone(side, member)
        named = matrices(block)
        assert named.keys() == weights.keys()
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                parameter.copy_(timms(name, weights))
        for name, values in matrices(block).items():
            assert torch.equal(values, weights[name]), name
        torch.testing.assert_close(ours[member], block(x[member]), rtol=1e-10, atol=1e-10)


def test_lean_attention_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in several parts, the last one smaller."""
    monkeypatch.setattr(LeanAttention, "SCORES", 2 * 7**2)
    generator = torch.Generator().manual_seed(3)
    q, k, v, target = torch.randn(4, 5, 7, 3, generator=generator, dtype=torch.float64)
    inputs = [part.requires_grad_() for part in (q, k, v)]
    ours, plain = LeanAttention.apply(*inputs), (q @ k.mT).softmax(dim=-1) @ v
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(ours, inputs, target)
    expected = torch.autograd.grad(plain, inputs, target)
    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-12)


def timms(name: str, weights: Parameters) -> Tensor:
    """The value of timm's parameter `name`, from a side block's."""
    short = name.removeprefix("attn.").removeprefix("mlp.").removesuffix(".gamma")
    if short.startswith(("fc1_g", "fc1_x")):
        return weights[f"fc1.{short.partition('.')[2]}"].chunk(2)[short.startswith("fc1_x")]
    return weights[short]


@pytest.mark.parametrize(
    ("grid", "window", "shift"), [((6, 6), 3, 0), ((6, 9), 3, 1), ((5, 7), 3, 1), ((2, 2), 4, 2)]
)
def test_swin_block_is_timms(grid: tuple[int, int], window: int, shift: int) -> None:
    """Also where the windows do not divide the grid, and where one window holds it."""
    block = SwinTransformerBlock(
        12, grid, num_heads=2, window_size=window, shift_size=shift, norm_layer=LayerNorm
    )
    block = block.double().eval()
    side = made(block, grid)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, grid[0] * grid[1], 12, generator=generator, dtype=torch.float64)
    ours = side(x, None, torch.float64)
    for member in range(2):
        weights = alone(side, member)
        weights["relative_position_bias_table"] = weights.pop("position_bias")
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                parameter.copy_(timms(name, weights))
        expected = block(x[member].unflatten(1, grid)).flatten(1, 2)
        torch.testing.assert_close(ours[member], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "changes",
    [{}, {"conv_mlp": True, "kernel_size": 5}, {"ls_init_value": None, "conv_bias": False}],
)
def test_convnext_block_is_timms(changes: dict[str, Any]) -> None:
    block = ConvNeXtBlock(12, **changes).double().eval()
    side = made(block, (4, 5))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 20, 12, generator=generator, dtype=torch.float64)
    ours = side(x, None, torch.float64)
    renamed = {"conv_dw.weight": "conv_weight", "conv_dw.bias": "conv_bias", "gamma": "ls"}
    for member in range(2):
        weights = alone(side, member)
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                value = weights[renamed.get(name, name.removeprefix("mlp."))]
                parameter.copy_(value.reshape(parameter.shape))
        maps = x[member].unflatten(1, (4, 5)).permute(0, 3, 1, 2)  # (B, D, H, W)
        expected = block(maps).flatten(2).mT  # (B, T, D)
        torch.testing.assert_close(ours[member], expected, rtol=1e-10, atol=1e-10)


HIERARCHIES = {
    "swin": [swin(16, (5, 6), 0), swin(16, (5, 6), 1), swin(32, (3, 3), 0)],
    "convnext": [convnext(16, (5, 5)), convnext(16, (5, 5)), convnext(32, (2, 2))],
}


@pytest.mark.parametrize("kind", HIERARCHIES)
@pytest.mark.parametrize("keep", ["all", "last:1"])
def test_hierarchical_ladder_equals_the_equations(kind: str, keep: str) -> None:
    """Merging, padded (swin) or cut (convnext), member by member."""
    spec = make_spec(HIERARCHIES[kind], prefix_tokens=0)
    network, features = build(spec, keep_layers=keep), features_for(spec)
    logits = run(network, features)
    for member in range(3):
        p = {name: parameter[member] for name, parameter in network.named_parameters()}
        s, before = linear(features["z0"], p, "downs.z0"), spec.blocks[0]
        for i, layer in enumerate(network.layers):
            block = spec.blocks[layer]
            if block["grid"] != before["grid"]:
                patches = torch.stack([merged(row, before["grid"], block["grid"]) for row in s])
                s = linear(patches, p, f"merges.{layer}")
            g = torch.sigmoid(p["gate"][i] / 0.1)
            s = g * s + (1 - g) * linear(features[f"z{layer + 1}"], p, f"downs.z{layer + 1}")
            side = network.blocks[str(layer)]
            s = side(s.expand(3, *s.shape), None, torch.float64)[member]
            before = block
        up = linear(normed(s, p, "norm", LAYER).mean(dim=1), p, "up")
        expected = linear(network.final_norm(up), p, "head")
        torch.testing.assert_close(logits[member], expected, rtol=1e-9, atol=1e-9)


def merged(tokens: Tensor, before: list[int], after: list[int]) -> Tensor:
    """(T, d) → (T', 4d): four neighbours side by side, row by row; zeros beyond the edge."""
    zero = torch.zeros_like(tokens[0])

    def at(row: int, column: int) -> Tensor:
        inside = row < before[0] and column < before[1]
        return tokens[row * before[1] + column] if inside else zero

    places = itertools.product(range(after[0]), range(after[1]))
    corners = list(itertools.product((0, 1), (0, 1)))
    return torch.stack(
        [torch.cat([at(2 * row + i, 2 * column + j) for i, j in corners]) for row, column in places]
    )


@pytest.mark.parametrize("blocks", [[vit()] * 3, *HIERARCHIES.values()])
def test_members_are_independent(blocks: list[dict[str, Any]]) -> None:
    spec = make_spec(blocks, prefix_tokens=0)
    settings, features = LSTSettings(reduction=4), features_for(spec)
    together = LST(spec, settings, [5, 6, 7]).double()
    one = LST(spec, settings, [6]).double()
    for ours, theirs in zip(together.parameters(), one.parameters(), strict=True):
        assert torch.equal(ours[1], theirs[0])
    torch.testing.assert_close(run(together, features)[1], run(one, features)[0])
    random = [p[0].flatten()[:4] for p in one.parameters() if p.flatten()[:4].unique().numel() > 1]
    assert len({tuple(values.tolist()) for values in random}) == len(random)  # no stream twice


@pytest.mark.parametrize("keep", ["all", "every:2", "last:1"])
@pytest.mark.parametrize(
    "blocks", [*([vit(**changes)] * 4 for changes in VARIANTS.values()), *HIERARCHIES.values()]
)
def test_parameter_count_is_the_modules(blocks: list[dict[str, Any]], keep: str) -> None:
    spec = make_spec(blocks, prefix_tokens=0)
    network = LST(spec, LSTSettings(reduction=4, keep_layers=keep), [0])
    path = [blocks[0], *(blocks[layer] for layer in network.layers)]
    counted = parameter_count(path, 4, blocks[-1]["dim"], 5)
    assert counted == sum(parameter.numel() for parameter in network.parameters())


def test_formula_on_vit_b() -> None:
    """The formula in the docstring."""
    width, d, m, n = 768, 96, 384, 12
    block = 4 * d * (d + 1) + 2 * d * m + m + d + 4 * d
    ladder = (n + 1) * (width + 1) * d + n + n * block + 2 * d
    assert ladder_count([vit(768, 12)] * 13, 8) == ladder
    head = (d + 1) * width + 10 * (width + 1)
    assert parameter_count([vit(768, 12)] * 13, 8, 768, 10) == ladder + head


@pytest.mark.parametrize(
    ("dim", "heads", "head_dim", "hidden", "layers", "kept", "published"),
    [
        (768, 12, 64, 3072, 12, 9, 3_878_712),  # T5-base, layers 1,2,3,5,6,7,9,10,11
        (768, 12, 64, 3072, 12, 12, 5_097_240),  # T5-base, nothing dropped
        (1024, 16, 64, 4096, 24, 12, 9_057_328),  # T5-large, every second layer
        (1024, 32, 128, 16384, 24, 1, 2_494_896),  # T5-3B, the last layer
    ],
)
def test_t5_counts(
    dim: int, heads: int, head_dim: int, hidden: int, layers: int, kept: int, published: int
) -> None:
    """Everything whose name says "side" is trained: a ladder beside the encoder, one beside the
    decoder, one Up, behind the decoder. Linear maps of T5's blocks have no bias, its norms are
    RMS; Down and Up have biases. A decoder block has a cross attention with a norm more. Gates of
    dropped layers exist and count, never used. The first kept block of each ladder has a relative
    attention bias, 32 buckets x heads, which keeps its size.
    """
    block = vit(dim, heads, head_dim=head_dim, hidden=hidden, norm=RMS, **NO_BIAS)
    encoder = ladder_count([block] * (kept + 1), 8, gates=layers) + 32 * heads
    cross = attention_count(block, 8) + norm_count(dim // 8, RMS)
    assert 2 * encoder + kept * cross + linear_count(dim // 8, dim) == published


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", (0, 1, 2, 3, 4)),
        ("every:2", (0, 2, 4)),
        ("every:3", (1, 4)),
        ("last:2", (3, 4)),
        ("3,1", (1, 3)),
    ],
)
def test_keep_layers(text: str, expected: tuple[int, ...]) -> None:
    assert keep_layers(text, 5) == expected


def test_t5_large_keeps_every_second_layer() -> None:
    assert keep_layers("every:2", 24) == (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduction": 0}, "reduction = 0: expected 1 or more"),
        ({"reduction": 5}, r"reduction = 5: .* block 0 \(48\) .* \(3 of width 16\)"),
        ({"reduction": 6}, r"reduction = 6: .* block 0 \(48\) .* \(3 of width 16\)"),
        ({"keep_layers": "some"}, "keep_layers = 'some': expected all, every:2, last:3"),
        ({"keep_layers": "every:0"}, "keep_layers = 'every:0'"),
        ({"keep_layers": "1,4"}, "keep_layers = '1,4': the backbone has layers 0 to 3"),
        ({"keep_layers": "last:5"}, "keep_layers = 'last:5': the backbone has layers 0 to 3"),
        ({"temperature": 0.0}, "temperature = 0.0: expected more than 0"),
        ({"init": "zero"}, "init = 'zero': expected random or pruned"),
        ({"pool": "max"}, "pool = 'max'"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LST(make_spec([vit()] * 4), LSTSettings(**settings), [0])


def test_what_a_cache_may_lack() -> None:
    spec = make_spec([vit()] * 4)
    taps = {tap: shape for tap, shape in spec.taps.items() if tap not in ("z0", "z2")}
    with pytest.raises(LookupError, match="lst needs the taps z0, z2, z4; z0, z2 are lacking"):
        LST(dataclasses.replace(spec, taps=taps), LSTSettings(keep_layers="every:2"), [0])
    with pytest.raises(ValueError, match="does not describe its backbone's blocks; extract again"):
        LST(dataclasses.replace(spec, blocks=()), LSTSettings(), [0])
    with pytest.raises(ValueError, match="no class token"):
        LST(make_spec([vit()] * 4, prefix_tokens=0), LSTSettings(pool="cls"), [0])
    blocks = [*spec.blocks[:3], {"kind": "unknown", "type": "EvaBlock", "reason": "rope"}]
    with pytest.raises(ValueError, match=r"block 3 of this backbone is of type EvaBlock.*\(rope\)"):
        LST(dataclasses.replace(spec, blocks=tuple(blocks)), LSTSettings(), [0])
    with pytest.raises(ValueError, match="expected a plain ViT; this backbone is hierarchical"):
        LST(make_spec(HIERARCHIES["swin"]), LSTSettings(reduction=4, init="pruned"), [0])


def test_operands_are_own_memory_and_shared_by_reads() -> None:
    spec = make_spec([vit()] * 4)
    network, features = build(spec, keep_layers="1,3"), features_for(spec)
    operands = network.operands(features, torch.float64)
    assert list(operands) == ["z0", "z2", "z4"]
    assert all(operands[tap].data_ptr() != features[tap].data_ptr() for tap in operands)
    assert network.operand_key == build(spec, keep_layers="every:2", pool="cls").operand_key
    assert network.operand_key != build(spec).operand_key


def test_weight_decay_is_for_matrices() -> None:
    block = vit(**VARIANTS["layer scale, qk-norm"])
    for blocks in ([block] * 2, *HIERARCHIES.values()):
        network = LST(make_spec(blocks, prefix_tokens=0), LSTSettings(reduction=4), [0])
        for name, parameter in network.named_parameters():
            matrix = parameter.ndim > 2 and not name.endswith("position_bias")
            assert network.decayed(name) == matrix, name


@pytest.mark.parametrize("blocks", [[vit()] * 3, *HIERARCHIES.values()])
def test_low_precision_stays_close(blocks: list[dict[str, Any]]) -> None:
    spec = make_spec(blocks, prefix_tokens=0)
    network, features = build(spec), features_for(spec)
    exact = run(network, features)
    network.float()
    half = network(network.operands(features, torch.bfloat16))
    assert half.dtype == torch.float32
    assert (half.double() - exact).abs().max() < 0.05 * exact.abs().max()
