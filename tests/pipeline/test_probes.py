"""The two baselines against what they claim to be: DINOv2's linear and V-JEPA's attentive probe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.side.attentive import Attentive, AttentiveSettings
from pipeline.side.contract import FeatureSpec
from pipeline.side.linear import Linear, LinearSettings

pytestmark = pytest.mark.numerics

MakeSpec = Callable[..., FeatureSpec]


def taps_of(spec: FeatureSpec, rows: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        tap: torch.randn(rows, s.tokens, s.dim, generator=generator, dtype=torch.float64)
        for tap, s in spec.taps.items()
    }


def normed(spec: FeatureSpec, x: Tensor) -> Tensor:
    assert spec.norm_weight is not None and spec.norm_bias is not None
    weight, bias = spec.norm_weight.double(), spec.norm_bias.double()
    return functional.layer_norm(x, x.shape[-1:], weight, bias, spec.norm_eps)


def test_linear_reads_what_dinov2_reads(make_spec: MakeSpec) -> None:
    """Class tokens of the last four taps, normed, concatenated; the mean patch token behind."""
    spec = make_spec()
    z = taps_of(spec)
    network = Linear(spec, LinearSettings(last_n=4, pool="clsmean"), [0]).double()
    pooled = network.operands(z, torch.float64)["pooled"]
    tokens = [normed(spec, z[f"z{i}"][:, 0]) for i in (1, 2, 3, 4)]
    mean = normed(spec, z["z4"][:, 1:].mean(dim=1))
    torch.testing.assert_close(pooled, torch.cat([*tokens, mean], dim=-1))
    assert sum(p.numel() for p in network.parameters()) == 5 * (5 * 24 + 1)


def test_linear_averages_taps(make_spec: MakeSpec) -> None:
    spec = make_spec()
    z = taps_of(spec)
    settings = LinearSettings(tap=3, last_n=2, merge="mean", pool="mean")
    pooled = Linear(spec, settings, [0]).double().operands(z, torch.float64)["pooled"]
    expected = sum(normed(spec, z[tap][:, 1:].mean(dim=1)) for tap in ("z2", "z3"))
    torch.testing.assert_close(pooled, expected / 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"last_n": 9}, "last_n = 9: expected at most 5"),
        ({"merge": "sum"}, "merge = 'sum': expected concat or mean"),
        ({"pool": "clsmean", "merge": "mean"}, "expected concat with pool clsmean"),
    ],
)
def test_impossible_linear_settings(
    make_spec: MakeSpec, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Linear(make_spec(), LinearSettings(**settings), [0])


def test_linear_names_a_tap_that_is_not_there(make_spec: MakeSpec) -> None:
    with pytest.raises(LookupError, match=r"z7 is lacking \(there are z0 … z4\)"):
        Linear(make_spec(), LinearSettings(tap=7), [0])


@pytest.mark.parametrize("mlp_ratio", [4.0, 0.0])
def test_attentive_equals_cross_attention_from_one_query(
    make_spec: MakeSpec, mlp_ratio: float
) -> None:
    """torch's own attention, one member at a time; values and gradients."""
    spec = make_spec()
    network = Attentive(spec, AttentiveSettings(heads=4, mlp_ratio=mlp_ratio), [0, 1]).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    z = taps_of(spec)
    logits = network(network.operands(z, torch.float64))
    parameters = dict(network.named_parameters())
    expected = []
    for member in range(2):
        p = {name: values[member] for name, values in parameters.items()}
        x = functional.layer_norm(
            normed(spec, z["z4"]), (24,), p["norm1_weight"], p["norm1_bias"], 1e-6
        )
        query = p["query"].expand(3, 1, 24)
        y, _ = functional.multi_head_attention_forward(
            query.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1), 24, 4,
            in_proj_weight=None, q_proj_weight=p["q_weight"], k_proj_weight=p["k_weight"],
            v_proj_weight=p["v_weight"], use_separate_proj_weight=True,
            in_proj_bias=torch.cat([p["q_bias"], torch.zeros_like(p["q_bias"]), p["v_bias"]]),
            bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0.0,
            out_proj_weight=p["proj_weight"], out_proj_bias=p["proj_bias"],
        )  # fmt: skip
        y = y[0] + p["query"]
        if mlp_ratio:
            h = functional.layer_norm(y, (24,), p["norm2_weight"], p["norm2_bias"], 1e-6)
            h = functional.gelu(h @ p["fc1_weight"].T + p["fc1_bias"])
            y = y + h @ p["fc2_weight"].T + p["fc2_bias"]
        expected.append(y @ p["head.weight"].T + p["head.bias"])
    torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-9, atol=1e-9)
    ours = torch.autograd.grad(logits.square().sum(), list(network.parameters()))
    theirs = torch.autograd.grad(
        torch.stack(expected).square().sum(), list(network.parameters()), allow_unused=True
    )
    for name, one, other in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7, msg=name)


@pytest.mark.parametrize("mlp_ratio", [4.0, 0.0])
def test_attentive_parameter_formula(make_spec: MakeSpec, mlp_ratio: float) -> None:
    dim, classes = 24, 5
    network = Attentive(make_spec(), AttentiveSettings(mlp_ratio=mlp_ratio), [0])
    formula = dim + 2 * dim + 4 * dim**2 + 3 * dim + classes * (dim + 1)
    if mlp_ratio:
        formula += 2 * dim + round(2 * mlp_ratio * dim**2 + mlp_ratio * dim + dim)
    assert sum(p.numel() for p in network.parameters()) == formula


def test_attentive_heads_divide_the_width(make_spec: MakeSpec) -> None:
    assert Attentive(make_spec(dim=40), AttentiveSettings(), [0]).heads == 4
    with pytest.raises(ValueError, match="heads = 7: expected a divisor of the width 24"):
        Attentive(make_spec(), AttentiveSettings(heads=7), [0])
