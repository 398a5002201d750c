"""Pruned initial weights against a walk over timm's own module, written index by index."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import SwiGLU, SwiGLUPacked
from torch import Tensor, nn
from torch.nn import functional

from pipeline.backbones.blocks import describe, matrices
from pipeline.backbones.prune import Importance, fisher, fit_probe, ladder_tables, magnitude, prune
from pipeline.side.contract import FeatureSpec, TokenShape
from pipeline.side.ladder import LST, LSTSettings

pytestmark = pytest.mark.numerics

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer scale, qk-norm": {"init_values": 1e-5, "qk_norm": True},
    "swiglu": {"mlp_layer": SwiGLU, "act_layer": nn.SiLU, "mlp_ratio": 2},
    "packed, no biases": {"mlp_layer": SwiGLUPacked, "proj_bias": False, "qkv_bias": False},
}
CPU = torch.device("cpu")


def make_model(**changes: Any) -> Any:
    """timm's test_vit, width 64, two heads, every parameter away from its starting value."""
    if changes.get("mlp_layer") is SwiGLUPacked:
        changes["act_layer"] = nn.SiLU
    model = timm.create_model("test_vit", img_size=32, num_classes=0, **changes)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


def images(count: int = 12) -> Iterator[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(6)
    for number in range(count):
        yield torch.randn(3, 32, 32, generator=generator) + number % 3, number % 3


def tables(model: Any, how: str = "magnitude", **changes: Any) -> dict[str, np.ndarray]:
    defaults: dict[str, Any] = {"reduction": 4, "layers": range(6), "classes": 3, "pool": "cls"}
    given = {**defaults, "prefix_tokens": 1, "device": CPU, "seed": 0, **changes}
    return ladder_tables(model, how=how, images=images, **given)


def keep(importance: np.ndarray, count: int) -> list[int]:
    """The rows with the largest sum of absolute values, in their own order."""
    sums = [sum(abs(value) for value in row) for row in importance.astype(np.float64)]
    ranked = sorted(range(len(sums)), key=lambda row: sums[row], reverse=True)
    return sorted(ranked[:count])


def walk(
    model: Any, first: np.ndarray, scores: list[dict[str, np.ndarray]], r: int
) -> dict[str, np.ndarray]:
    """The paper's walk, on numpy arrays."""
    result: dict[str, np.ndarray] = {}
    rows = keep(first.reshape(len(first), -1), len(first) // r)
    for i, block in enumerate(model.blocks):
        weights = {name: values.numpy() for name, values in matrices(block).items()}
        before = f"block{i}/"

        def put(name: str, kept: list[int], weights: Any = weights, before: str = before) -> None:
            if name in weights:
                result[before + name.replace(".", "_")] = weights[name][kept]

        def cut(name: str, into: list[int], out: int, w: Any = weights, s: Any = scores[i]) -> Any:
            columns = s[f"{name}.weight"][:, into].astype(np.float64)
            size = len(columns) // out
            product = np.ones((size, len(into)))
            for part in range(out):
                product = product * columns[part * size : (part + 1) * size]
            return w[f"{name}.weight"][:, into], size, product

        def matrix(
            name: str, into: list[int], out: int = 1, before: str = before, put: Any = put
        ) -> list[int]:
            weight, size, product = cut(name, into, out)
            kept = keep(product, size // r)
            every = [part * size + row for part in range(out) for row in kept]
            result[f"{before}{name}_weight"] = weight[every]
            put(f"{name}.bias", every)
            return kept

        put("norm1.weight", rows)
        put("norm1.bias", rows)
        attended = matrix("qkv", rows, 3)
        for name in ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"):
            if name in weights:
                head, size = 64 // 2, 64 // 2 // r
                places = [attended[: len(attended) // 2], attended[len(attended) // 2 :]]
                values = [
                    (weights[name][places[0][t] % head] + weights[name][places[1][t] % head]) / 2
                    for t in range(size)
                ]
                result[before + name.replace(".", "_")] = np.array(values)
        middle = matrix("proj", attended)
        for name in ("ls1", "norm2.weight", "norm2.bias"):
            put(name, middle)
        hidden = matrix("fc1", middle, 2 if type(block.mlp).__name__ != "Mlp" else 1)
        rows = matrix("fc2", hidden)
        put("ls2", rows)
    result["norm_weight"] = model.norm.weight.numpy()[rows]
    result["norm_bias"] = model.norm.bias.numpy()[rows]
    return result


def same(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert ours.keys() == expected.keys()
    for name, values in ours.items():
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected[name], rtol=1e-6, err_msg=name)


def numbers(importance: Importance) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
    blocks = [{name: v.numpy() for name, v in block.items()} for block in importance.blocks]
    return importance.first.numpy(), blocks


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_magnitude_keeps_what_the_walk_keeps(changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    scores = [{name: values.numpy() for name, values in matrices(b).items()} for b in model.blocks]
    same(tables(model), walk(model, model.patch_embed.proj.weight.numpy(), scores, 4))


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_a_given_importance_decides(changes: dict[str, Any]) -> None:
    """Tiny values, as squared gradients are: their products must not vanish."""
    model = make_model(**changes)
    generator = torch.Generator().manual_seed(8)
    sizes = magnitude(model, model.blocks)

    def random(values: Tensor) -> Tensor:
        return 1e-15 * torch.rand(values.shape, generator=generator)

    blocks = [{name: random(values) for name, values in block.items()} for block in sizes.blocks]
    importance = Importance(first=random(sizes.first), blocks=blocks)
    norm = {"weight": model.norm.weight, "bias": model.norm.bias}
    weights = [matrices(block) for block in model.blocks]
    ours = prune(weights, importance, norm=norm, heads=2, reduction=4, layers=range(6))
    same(ours, walk(model, *numbers(importance), 4))


def test_dropped_layers_are_walked_through() -> None:
    model = make_model()
    everything, some = tables(model), tables(model, layers=[1, 5])
    assert {name.partition("/")[0] for name in some} == {
        "block1",
        "block5",
        "norm_weight",
        "norm_bias",
    }
    for name, values in some.items():
        assert np.array_equal(values, everything[name])


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("name", ["plain", "swiglu", "packed, no biases"])
def test_fisher_is_the_sum_of_squared_gradients(name: str, pool: str) -> None:
    model = make_model(**MODELS[name])
    steps: list[tuple[int, int]] = []
    ours = fisher(
        model,
        model.blocks,
        images,
        classes=3,
        pool=pool,
        prefix_tokens=1,
        device=CPU,
        seed=0,
        report=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(done, 12) for done in range(1, 13)]
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())

    def pooled(batch: Tensor) -> Tensor:
        tokens = model.forward_features(batch)
        return tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)

    batch, labels = zip(*images(), strict=True)
    weight, bias = fit_probe(pooled(torch.stack(batch)), torch.tensor(labels), 3, 0)
    model.requires_grad_(True)
    sums: dict[int, Tensor] = {id(p): torch.zeros_like(p) for p in model.parameters()}
    for image, label in images():
        model.zero_grad()
        logits = functional.linear(pooled(image[None]), weight, bias)
        functional.cross_entropy(logits, torch.tensor([label])).backward()
        for p in model.parameters():
            sums[id(p)] += p.grad.square() if p.grad is not None else 0
    torch.testing.assert_close(
        ours.first, sums[id(model.patch_embed.proj.weight)], rtol=1e-4, atol=0
    )
    assert ours.first.max() > 0
    for block, scores in zip(model.blocks, ours.blocks, strict=True):
        expected = matrices(block, lambda values: sums[id(values)])
        for matrix, values in scores.items():
            torch.testing.assert_close(values, expected[matrix], rtol=1e-4, atol=1e-12)
            assert values.max() > 0


def test_the_probe_is_at_its_minimum() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 8, generator=generator), torch.arange(40) % 4
    weight, bias = (values.double().requires_grad_() for values in fit_probe(x, y, 4, 0))
    loss = functional.cross_entropy(x.double() @ weight.T + bias, y)
    (loss + 1e-3 / 2 * weight.square().sum()).backward()
    assert weight.grad is not None and bias.grad is not None
    assert weight.grad.abs().max() < 1e-6 and bias.grad.abs().max() < 1e-6
    for ours, other in zip(fit_probe(x, y, 4, 0), fit_probe(x, y, 4, 1), strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-4)


def test_fisher_tables_are_deterministic_and_their_own() -> None:
    model = make_model()
    ours, again, size = tables(model, "fisher"), tables(model, "fisher"), tables(model)
    assert ours.keys() == size.keys()
    assert all(np.array_equal(values, again[name]) for name, values in ours.items())
    assert not np.array_equal(ours["block3/fc1_weight"], size["block3/fc1_weight"])


def ladder(model: Any, **settings: Any) -> LST:
    """An untrained ladder on the model's blocks."""
    shape = TokenShape(tokens=5, prefix_tokens=1, dim=64)
    spec = FeatureSpec(
        taps={f"z{i}": shape for i in range(7)},
        classes=3,
        blocks=describe(model.blocks, [None] * 6),
    )
    return LST(spec, LSTSettings(**{"reduction": 4, "init": "pruned", **settings}), [0, 1])


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_start_from_copies_into_every_member(changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    found = {name: torch.from_numpy(values) for name, values in tables(model).items()}
    network, untouched = ladder(model, keep_layers="every:2"), ladder(model, keep_layers="every:2")
    network.start_from(found)
    copied = set()
    for name, parameter in network.named_parameters():
        table = name.replace("blocks.", "block")
        table = table.replace(".", "/", 1) if table.startswith("block") else table
        table = table.replace(".", "_")
        if table in found:
            copied.add(table)
            for member in parameter:
                assert torch.equal(member, found[table]), name
        else:
            assert not table.startswith(("block", "norm")), name
            assert torch.equal(parameter, untouched.get_parameter(name)), name
    kept = {name for name in found if name.startswith(("block1/", "block3/", "block5/", "norm_"))}
    assert copied == kept


def test_start_from_refuses_what_does_not_fit() -> None:
    model = make_model()
    found = {name: torch.from_numpy(values) for name, values in tables(model).items()}
    with pytest.raises(LookupError, match=r"no pruned weights.*--ladder-init magnitude"):
        ladder(model).start_from({})
    with pytest.raises(LookupError, match=r"shape \(16,\), not \(8,\).*--reduction 8"):
        ladder(model, reduction=8).start_from(found)
    some = {name: values for name, values in found.items() if not name.startswith("block3/")}
    with pytest.raises(LookupError, match="without block3/"):
        ladder(model).start_from(some)
    network = ladder(model, init="random")
    before = {name: values.clone() for name, values in network.state_dict().items()}
    network.start_from(found)
    assert all(torch.equal(values, before[name]) for name, values in network.state_dict().items())


def test_only_plain_vits_can_be_pruned() -> None:
    with pytest.raises(ValueError, match="expected a plain ViT, came ConvNeXt"):
        tables(timm.create_model("test_convnext"))
    with pytest.raises(ValueError, match=r"reduction = 3: .* block 0 \(64\)"):
        tables(make_model(), reduction=3)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_relpos_small_patch16_224", "no block type that a ladder knows"),
        ("test_convnext", "not on a grid"),
    ],
)
def test_blocks_that_are_not_understood_say_why(name: str, reason: str) -> None:
    model = timm.create_model(name)
    blocks = model.blocks if hasattr(model, "blocks") else model.stages[0].blocks
    described = describe(list(blocks)[:1], [None])[0]
    assert described["kind"] == "unknown" and reason in described["reason"]
    gated = make_model()
    gated.blocks[0].attn.norm = nn.LayerNorm(64)
    gated.blocks[1].extra = nn.Parameter(torch.zeros(1))
    kinds = describe(gated.blocks, [None] * 6)
    assert kinds[0]["reason"] == "attention with a norm"
    assert kinds[1]["reason"] == "unexpected parameters extra"
    assert kinds[2]["kind"] == "vit"
