"""MIET against the sum and the modules written out; the ways of making the sum agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.side.contract import FeatureSpec, TokenShape
from pipeline.side.gather import Gather, found_among
from pipeline.side.last import LAST, LASTSettings
from pipeline.side.miet import MIET, MIETSettings

pytestmark = pytest.mark.numerics

MakeSpec = Callable[..., FeatureSpec]


def build(spec: FeatureSpec, **settings: Any) -> MIET:
    """A float64 network of three members, away from its special starting values."""
    network = MIET(spec, MIETSettings(rank=4, **settings), [0, 1, 2]).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return network


def taps_of(spec: FeatureSpec, rows: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        tap: torch.randn(rows, s.tokens, s.dim, generator=generator, dtype=torch.float64)
        for tap, s in spec.taps.items()
    }


def reference(
    network: MIET, taps: dict[str, Tensor], member: int, keep: Tensor | None = None
) -> Tensor:
    """x_0 = z_0 + … + z_k; x_j = x_{j-1} + Delta_j; pool, trained LayerNorm, linear head."""
    settings, chain, dim = network.settings, network.chain, network.shape.dim
    sums = []
    for members in network.gather.sums.values():
        maps = [taps[tap] for tap in members]
        if network.gather.normed:
            maps = [functional.layer_norm(x, (dim,), eps=1e-6) for x in maps]
        sums.append(torch.stack(maps).sum(dim=0))
    x, added = sums[0], 1
    for j in range(settings.modules):
        while j * len(sums) // settings.modules >= added:
            x, added = x + sums[added], added + 1
        weight, bias = chain.norm_weight[member, j], chain.norm_bias[member, j]
        normed = functional.layer_norm(x, (dim,), weight, bias, 1e-6)
        projected = normed @ chain.qkv_weight[member, j].T + chain.qkv_bias[member, j]
        each = settings.rank // settings.heads
        q, k, v = projected.unflatten(-1, (3, settings.heads, each)).permute(2, 0, 3, 1, 4)
        attended = ((q @ k.mT / each**0.5).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
        branch = attended @ chain.up_weight[member, j].T + chain.up_bias[member, j]
        x = x + (branch if keep is None else branch * keep[j, :, None, None])
    pooled = pool(network, x)
    if settings.head == "last":  # LAST's: z_k + sum of Delta, through the frozen norm
        pooled = pool(network, taps[f"z{network.gather.k}"] + x - sum(sums))
        assert network.spec.norm_weight is not None and network.spec.norm_bias is not None
        weight, bias = network.spec.norm_weight.double(), network.spec.norm_bias.double()
    else:
        weight, bias = network.norm_weight[member], network.norm_bias[member]
    normed = functional.layer_norm(pooled, (dim,), weight, bias, 1e-6)
    return normed @ network.head.weight[member].T + network.head.bias[member]


def pool(network: MIET, x: Tensor) -> Tensor:
    return (
        x[:, 0] if network.settings.pool == "cls" else x[:, network.shape.prefix_tokens :].mean(1)
    )


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"k": 2},
        {"modules": 1},
        {"heads": 2, "pool": "cls"},
        {"gather": "normsum"},
        {"groups": 2},
        {"groups": 3, "modules": 5, "gather": "normsum", "k": 3},
        {"head": "last"},
        {"head": "last", "groups": 2, "k": 2, "pool": "cls"},
    ],
)
def test_miet_equals_the_modules_on_the_sum(
    make_spec: MakeSpec, settings: dict[str, Any], dropped: bool
) -> None:
    """Values and gradients, drop-path on and off."""
    network = build(make_spec(), **settings)
    taps = taps_of(network.spec)
    keep = None
    if dropped:
        draws = torch.rand(3, network.drop_sites, 3, generator=torch.Generator().manual_seed(4))
        keep = ((draws > 0.4) / 0.6).double()
    logits = network(network.operands(taps, torch.float64), keep)
    expected = torch.stack(
        [reference(network, taps, m, None if keep is None else keep[m]) for m in range(3)]
    )
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    ours = torch.autograd.grad(logits.square().sum(), list(network.parameters()))
    theirs = torch.autograd.grad(expected.square().sum(), list(network.parameters()))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "gather", [Gather(k=4), Gather(k=4, groups=2, normed=True), Gather(k=3, pooled=True)]
)
def test_sums_and_taps_give_the_same(make_spec: MakeSpec, gather: Gather) -> None:
    """A network made for a cache of sums takes whatever the cache holds from it."""
    spec = make_spec()
    taps = taps_of(spec)
    shape = spec.taps["z0"]
    shapes = dict.fromkeys(gather.sums, shape)
    if gather.pooled:
        shapes[gather.pool_name] = dataclasses.replace(shape, tokens=2)
    head = "last" if gather.pooled else "sum"
    network = build(dataclasses.replace(spec, taps=shapes), head=head)
    assert network.gather == gather
    assert network.sources(gather.names) == gather.names
    assert network.sources(tuple(taps)) == tuple(taps)[: gather.k + 1]
    from_sums = network(network.operands(gather.reduce(taps, 1), torch.float64))
    from_taps = network(network.operands(taps, torch.float64))
    torch.testing.assert_close(from_sums, from_taps, rtol=1e-12, atol=1e-12)


def test_names_of_sums() -> None:
    assert Gather(k=12).sums == {"z0..z12": tuple(f"z{i}" for i in range(13))}
    assert list(Gather(k=12, groups=3, normed=True).sums) == [
        "ln(z0..z4)", "ln(z5..z8)", "ln(z9..z12)",
    ]  # fmt: skip
    for gather in (Gather(k=12), Gather(k=0, pooled=True), Gather(k=7, groups=8, normed=True)):
        assert found_among(gather.names) == gather
        assert [tap for taps in gather.sums.values() for tap in taps] == [
            f"z{i}" for i in range(gather.k + 1)
        ]
    assert found_among(("z0", "z1")) is None
    with pytest.raises(ValueError, match="expected 1 to 3 groups"):
        Gather(k=2, groups=4)


def test_a_cache_of_sums_has_no_other_sums(make_spec: MakeSpec) -> None:
    spec = make_spec()
    sums = dataclasses.replace(spec, taps={"z0..z4": spec.taps["z0"]})
    for settings in ({"k": 3}, {"gather": "normsum"}, {"groups": 2}, {"head": "last"}):
        with pytest.raises(LookupError, match=r"there are z0\.\.z4"):
            MIET(sums, MIETSettings(**settings), [0])  # type: ignore[arg-type]
    with pytest.raises(LookupError, match=r"last needs the taps .* \(there are z0\.\.z4\)"):
        LAST(sums, LASTSettings(), [0])


def test_sums_need_equal_shapes(make_spec: MakeSpec) -> None:
    spec = make_spec(prefix_tokens=0)
    later = TokenShape(tokens=4, prefix_tokens=0, dim=48)
    staged = dataclasses.replace(spec, taps={**spec.taps, "z3": later, "z4": later})
    for network, settings in ((MIET, MIETSettings()), (LAST, LASTSettings())):
        with pytest.raises(ValueError, match=r"unequal shapes \(z0 … z2: 9 x 24, z3, z4: 4 x 48\)"):
            network(staged, settings, [0])  # type: ignore[operator]


@pytest.mark.parametrize(
    ("settings", "expected"), [({}, 206_016 + 1_536), ({"modules": 2, "rank": 8}, 55_344)]
)
def test_miet_parameter_counts_on_vit_b(
    make_spec: MakeSpec, settings: dict[str, Any], expected: int
) -> None:
    """n (2D + 3R(D + 1) + (R + 1) D) + 2D, and the head."""
    shape = MIETSettings(**settings)
    network = MIET(make_spec(12, dim=768, tokens=197, classes=10), shape, [0])
    n, rank, dim = shape.modules, shape.rank, 768
    formula = n * (2 * dim + 3 * rank * (dim + 1) + (rank + 1) * dim) + 2 * dim
    assert formula == expected
    assert sum(p.numel() for p in network.parameters()) == expected + 10 * (dim + 1)
