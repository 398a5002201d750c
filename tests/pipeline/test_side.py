"""One contract over all side networks; LAST against a reference written from the equations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config import Member, PassConfig
from pipeline.setting import settings_of
from pipeline.side import METHODS
from pipeline.side.contract import FeatureSpec, SideNetwork
from pipeline.side.last import LAST, LASTSettings
from pipeline.side.rank_space import Attention, Plan
from pipeline.side.settings import Settings, settings_in

pytestmark = pytest.mark.numerics

MakeSpec = Callable[..., FeatureSpec]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("linear", {"pool": "mean"}),
    ("linear", {"pool": "clsmean", "last_n": 3}),
    ("linear", {"tap": 2, "last_n": 2, "merge": "mean"}),
    ("lst", {"reduction": 4}),
    ("lst", {"reduction": 2, "keep_layers": "1,3", "pool": "cls"}),
    ("attentive", {"heads": 4}),
    ("attentive", {"mlp_ratio": 0.0}),
    ("miet", {"rank": 4}),
    ("miet", {"rank": 4, "modules": 3, "heads": 2, "k": 3, "pool": "cls"}),
    ("miet", {"rank": 4, "modules": 5, "groups": 2, "gather": "normsum"}),
    ("miet", {"rank": 4, "head": "last"}),
    ("last", {"rank": 4}),
    ("last", {"rank": 4, "gap": 2, "depth": 3, "heads": 2, "pool": "cls"}),
]
CASES += [(method, {}) for method in METHODS if method not in dict(CASES)]  # a new one, as it is


def build(
    spec: FeatureSpec, method: str, settings: dict[str, Any], seeds: tuple[int, ...] = (0, 1, 2)
) -> SideNetwork:
    """A float64 network whose parameters are all away from their special starting values."""
    kind = METHODS[method]
    network = kind(spec, kind.settings_class(**settings), seeds).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return network


def features_for(network: SideNetwork, rows: int = 3) -> dict[str, Tensor]:
    """Random tokens (rows, T, D) of the taps that the network asks for, float64."""
    generator = torch.Generator().manual_seed(2)
    features = {}
    for tap in network.sources(tuple(network.spec.taps)):
        shape = network.spec.taps[tap]
        size = (rows, shape.tokens, shape.dim)
        features[tap] = torch.randn(size, generator=generator, dtype=torch.float64)
    return features


def some(features: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {tap: tokens[rows] for tap, tokens in features.items()}


def run(network: SideNetwork, features: dict[str, Tensor]) -> Tensor:
    return network(network.operands(features, torch.float64))


def test_settings_that_need_more_than_settings_have_are_named(tmp_path: Path) -> None:
    file = tmp_path / "more.py"
    file.write_text("import torch\nclass MoreSettings(Settings):\n    kind: str = setting(torch)\n")
    with pytest.raises(NameError, match=r"more\.py: MoreSettings may use .* 'torch'"):
        settings_in(file, "MoreSettings")


def another(settings: Settings, name: str) -> Any:
    """Another value than a setting has."""
    value, about = getattr(settings, name), settings_of(type(settings))[name]
    return next(c for c in about.choices if c != value) if about.choices else value + 1


@pytest.mark.parametrize("method", METHODS)
class TestSettings:
    """What a method brings along for flags, help, search spaces and the reference."""

    def test_they_are_the_same_without_torch(self, method: str) -> None:
        network, light = METHODS[method], METHODS.settings(method)
        own = network.settings_class
        assert network.method == method and light is not own
        assert settings_of(light) == settings_of(own)
        assert (light.recipe, light.drops) == (own.recipe, own.drops)

    def test_each_is_a_setting_with_help_that_runs_on(self, method: str) -> None:
        settings = METHODS[method].settings_class
        found = settings_of(settings)
        assert list(found) == [field.name for field in dataclasses.fields(settings)]
        for name, about in found.items():
            assert about.help and not about.help.endswith("."), name
            assert about.default is not None or about.unset, name

    def test_names_mean_one_thing(self, method: str) -> None:
        """In one comma list for all methods, beside those of learning and of the pass."""
        found = settings_of(METHODS[method].settings_class)
        for other in METHODS.values():
            for name, about in settings_of(other.settings_class).items():
                assert name not in found or about.type == found[name].type
        for owner in (Member, PassConfig):
            assert not found.keys() & {field.name for field in dataclasses.fields(owner)}


@pytest.mark.parametrize(("method", "settings"), CASES)
class TestContract:
    def test_shape_and_determinism(
        self, make_spec: MakeSpec, method: str, settings: dict[str, Any]
    ) -> None:
        network = build(make_spec(), method, settings)
        features = features_for(network)
        logits = run(network, features)
        assert logits.shape == (3, 3, 5)
        assert torch.equal(logits, run(network, features))

    def test_it_has_branches_to_drop_where_it_says_so(
        self, make_spec: MakeSpec, method: str, settings: dict[str, Any]
    ) -> None:
        network = build(make_spec(), method, settings)
        assert (network.drop_sites > 0) == METHODS[method].settings_class.drops

    def test_idle_settings_decide_nothing(
        self, make_spec: MakeSpec, method: str, settings: dict[str, Any]
    ) -> None:
        network = build(make_spec(), method, settings)
        idle = {name: another(network.settings, name) for name in network.settings.idle()}
        again = build(make_spec(), method, {**settings, **idle})
        features = features_for(network)
        assert torch.equal(run(network, features), run(again, features))

    def test_every_parameter_gets_a_gradient_and_features_get_none(
        self, make_spec: MakeSpec, method: str, settings: dict[str, Any]
    ) -> None:
        network = build(make_spec(), method, settings)
        features = features_for(network)
        run(network, features).square().sum().backward()
        assert not any(tokens.requires_grad for tokens in features.values())
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            per_member = parameter.grad.flatten(1).abs().amax(dim=1)
            assert (per_member > 0).all(), name

    def test_two_batches_of_one_equal_a_batch_of_two(
        self, make_spec: MakeSpec, method: str, settings: dict[str, Any]
    ) -> None:
        network = build(make_spec(), method, settings)
        features = features_for(network, rows=2)
        apart = torch.cat(
            [run(network, some(features, slice(1))), run(network, some(features, slice(1, 2)))],
            dim=1,
        )
        torch.testing.assert_close(run(network, features), apart, rtol=1e-10, atol=1e-10)

    def test_a_member_does_not_depend_on_the_others(
        self, make_spec: MakeSpec, method: str, settings: dict[str, Any]
    ) -> None:
        kind = METHODS[method]
        shape = kind.settings_class(**settings)
        together = kind(make_spec(), shape, [5, 6, 7]).double()
        alone = kind(make_spec(), shape, [6]).double()
        for ours, theirs in zip(together.parameters(), alone.parameters(), strict=True):
            assert torch.equal(ours[1], theirs[0])
        features = features_for(alone)
        expected = run(alone, features)[0]
        torch.testing.assert_close(run(together, features)[1], expected, rtol=1e-10, atol=1e-10)

    def test_operands_do_not_alias_the_features(
        self, make_spec: MakeSpec, method: str, settings: dict[str, Any]
    ) -> None:
        """Read buffers are used again."""
        for norm in ("layer", "none"):
            network = build(make_spec(norm=norm), method, settings)
            for dtype in (torch.float64, torch.float32):
                features = {k: v.to(dtype) for k, v in features_for(network).items()}
                operands = network.operands(features, dtype)
                before = {name: values.clone() for name, values in operands.items()}
                for tokens in features.values():
                    tokens.zero_()
                for name, values in operands.items():
                    assert torch.equal(values, before[name]), name

    def test_a_wrong_width_names_both(
        self, make_spec: MakeSpec, method: str, settings: dict[str, Any]
    ) -> None:
        network = build(make_spec(), method, settings)
        narrow = {tap: tokens[..., :20] for tap, tokens in features_for(network).items()}
        with pytest.raises(ValueError, match=r"9 tokens of width 20, expected 9 of width 24"):
            network.operands(narrow, torch.float64)

    def test_state_round_trip(
        self, make_spec: MakeSpec, method: str, settings: dict[str, Any]
    ) -> None:
        network = build(make_spec(), method, settings)
        other = build(make_spec(), method, settings, seeds=(7, 8, 9))
        other.load_state_dict(network.state_dict())
        features = features_for(network)
        assert torch.equal(run(network, features), run(other, features))

    def test_low_precision_stays_close(
        self, make_spec: MakeSpec, method: str, settings: dict[str, Any]
    ) -> None:
        network = build(make_spec(), method, settings)
        features = features_for(network)
        exact = run(network, features)
        network.float()
        half = network(
            network.operands({k: v.half() for k, v in features.items()}, torch.bfloat16)
        ).double()
        assert (half - exact).abs().max() < 0.05 * exact.abs().max()


def reference(
    network: LAST, features: dict[str, Tensor], member: int, keep: Tensor | None = None
) -> Tensor:
    """LAST as the paper writes it: u_i = F_i(u_{i-1} + z_i), output u_m - sum(z_0 .. z_{m-1})."""
    settings, spec, chain, shape = network.settings, network.spec, network.chain, network.shape
    z = [features[tap] for tap in network.reads]
    rows, heads = len(z[0]), settings.heads
    u = z[0]
    module = 0
    for group in range(1, len(z)):
        u = u + z[group]
        for _ in range(settings.depth):
            weight, bias = chain.norm_weight[member, module], chain.norm_bias[member, module]
            normed = functional.layer_norm(u, (shape.dim,), weight, bias, 1e-6)
            projected = normed @ chain.qkv_weight[member, module].T
            projected = projected + chain.qkv_bias[member, module]
            split = (rows, shape.tokens, 3, heads, settings.rank // heads)
            q, k, v = projected.reshape(split).permute(2, 0, 3, 1, 4)
            scores = q @ k.mT / (settings.rank // heads) ** 0.5
            attended = (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
            up, up_bias = chain.up_weight[member, module], chain.up_bias[member, module]
            branch = attended @ up.T + up_bias
            u = u + (branch if keep is None else branch * keep[module, :, None, None])
            module += 1
    corrected = u - sum(z[:-1])
    if settings.pool == "cls":
        pooled = corrected[:, 0]
    else:
        pooled = corrected[:, shape.prefix_tokens :].mean(dim=1)
    assert spec.norm_weight is not None and spec.norm_bias is not None
    normed = functional.layer_norm(
        pooled, (shape.dim,), spec.norm_weight.double(), spec.norm_bias.double(), spec.norm_eps
    )
    return normed @ network.head.weight[member].T + network.head.bias[member]


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 4},
        {"rank": 4, "gap": 2},
        {"rank": 4, "depth": 3},
        {"rank": 4, "heads": 2},
        {"rank": 4, "pool": "cls"},
        {"rank": 6, "gap": 4, "depth": 2, "heads": 3, "pool": "cls"},
    ],
)
def test_last_equals_the_paper_recursion(
    make_spec: MakeSpec, settings: dict[str, Any], scale: float
) -> None:
    """The rank-space form, bias correction cancelled, is the recursion; also with a large Delta."""
    network = build(make_spec(), "last", settings)
    assert isinstance(network, LAST)
    with torch.no_grad():
        network.chain.up_weight *= scale
    features = features_for(network)
    logits = run(network, features)
    for member in range(3):
        expected = reference(network, features, member)
        torch.testing.assert_close(logits[member], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(
    "settings", [{"rank": 4}, {"rank": 4, "gap": 2, "depth": 3, "heads": 2, "pool": "cls"}]
)
def test_last_gradients_equal_those_of_the_recursion(
    make_spec: MakeSpec, settings: dict[str, Any], dropped: bool
) -> None:
    """The backward pass is written out; autograd differentiates the reference."""
    network = build(make_spec(), "last", settings)
    assert isinstance(network, LAST)
    features = features_for(network)
    target = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    keep = None
    if dropped:
        draws = torch.rand(3, network.drop_sites, 3, generator=torch.Generator().manual_seed(4))
        keep = ((draws > 0.4) / 0.6).double()
    operands = network.operands(features, torch.float64)
    (network(operands, keep) * target).sum().backward()
    ours = {name: parameter.grad for name, parameter in network.named_parameters()}
    network.zero_grad()
    for member in range(3):
        kept = None if keep is None else keep[member]
        (reference(network, features, member, kept) * target[member]).sum().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-8, atol=1e-9, msg=name)


def gradients(network: SideNetwork, rows: int, keep: Tensor | None) -> dict[str, Tensor]:
    """Of a sum of squared logits; and the logits themselves."""
    network.zero_grad()
    features = features_for(network, rows)
    logits = network(network.operands(features, torch.float64), keep)
    logits.square().sum().backward()
    found = {k: p.grad.clone() for k, p in network.named_parameters() if p.grad is not None}
    return {**found, "logits": logits.detach()}


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("last", {"rank": 4, "gap": 2, "depth": 2, "heads": 2, "pool": "cls"}),
        ("miet", {"rank": 4, "modules": 5, "groups": 2}),
    ],
)
def test_a_batch_computed_in_parts_is_the_same(
    make_spec: MakeSpec,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    settings: dict[str, Any],
    images: int,
) -> None:
    """Five images in parts of one, two and three; drop-path on."""
    network = build(make_spec(), method, settings)
    draws = torch.rand(3, network.drop_sites, 5, generator=torch.Generator().manual_seed(4))
    keep = ((draws > 0.4) / 0.6).double()
    whole = gradients(network, 5, keep)
    monkeypatch.setattr(Plan, "ROWS", images * 9 + 8)
    parts = gradients(network, 5, keep)
    for name, expected in whole.items():
        torch.testing.assert_close(parts[name], expected, rtol=1e-10, atol=1e-10, msg=name)


def test_members_together_are_members_one_by_one(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU takes one member at a time, other devices all."""
    network = build(make_spec(), "last", {"rank": 4, "depth": 2, "heads": 2})
    alone = gradients(network, 3, None)
    everything = [(slice(0, 3), slice(0, 3))]
    monkeypatch.setattr(Plan, "parts", lambda *_: everything)
    together = gradients(network, 3, None)
    for name, expected in alone.items():
        torch.testing.assert_close(together[name], expected, rtol=1e-10, atol=1e-10, msg=name)


def test_networks_learn_side_by_side_in_threads(make_spec: MakeSpec) -> None:
    networks = [build(make_spec(), "last", {"rank": 4}, seeds=(i, i + 1)) for i in range(4)]
    expected = [gradients(network, 3, None) for network in networks]
    for _ in range(5):
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda network: gradients(network, 3, None), networks))
        for ours, theirs in zip(found, expected, strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 8.0, 100.0])
@pytest.mark.parametrize("asked", [1, 9])
def test_attention_and_its_gradients(size: float, asked: int, dtype: torch.dtype) -> None:
    """Both ways of computing it, also where exp alone leaves the range of numbers."""
    generator = torch.Generator().manual_seed(5)
    q, k, v, gradient = torch.randn(4, 6, 4, 9, generator=generator, dtype=torch.float64)
    q, k, v = (
        part.to(dtype).double().requires_grad_() for part in (q[..., :asked] * size, k * size, v)
    )
    gradient = gradient[..., :asked]
    scores = (q.mT @ k).to(dtype).double()  # rounded as ours are
    out = v @ torch.softmax(scores, dim=-1).mT
    expected = [out, *torch.autograd.grad(out, (q, k, v), gradient)]
    attention = Attention(*(part.detach().to(dtype) for part in (q, k, v)))
    sums = torch.promote_types(dtype, torch.float32)
    forward = attention.forward()
    ours = [forward, *attention.backward(gradient.to(sums), forward.to(dtype).to(sums))]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    for one, other, least in zip(ours, expected, (1, size, size, 1), strict=True):
        assert (one.double() - other).norm() < tolerance * max(other.norm(), least)
    if dtype == torch.float64:  # what other devices do
        fused = [attention._fused(attention.q, attention.k, attention.v)]
        fused += attention._fused_backward(gradient)
        for one, other in zip(fused, expected, strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-8, atol=1e-8)


def test_last_starts_as_the_linear_probe(make_spec: MakeSpec) -> None:
    spec = make_spec()
    last = LAST(spec, LASTSettings(pool="cls"), [3]).double()
    kind = METHODS["linear"]
    linear = kind(spec, kind.settings_class(pool="cls"), [3]).double()
    features = features_for(last)
    torch.testing.assert_close(run(last, features), run(linear, features))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, 618_048), ({"gap": 2}, 309_024), ({"depth": 2}, 1_236_096), ({"rank": 8}, 322_848)],
)
def test_last_parameter_counts_on_vit_b(
    make_spec: MakeSpec, settings: dict[str, Any], expected: int
) -> None:
    """(L / g) S (2D + 3R(D + 1) + (R + 1) D), and the published scale of 0.66 M with a head."""
    spec = make_spec(12, dim=768, tokens=197, classes=10)
    network = LAST(spec, LASTSettings(**settings), [0])
    assert sum(p.numel() for p in network.chain.parameters()) == expected
    shape = LASTSettings(**settings)
    modules, rank = 12 // shape.gap * shape.depth, shape.rank
    assert modules * (2 * 768 + 3 * rank * 769 + (rank + 1) * 768) == expected
    assert sum(p.numel() for p in network.head.parameters()) == 10 * 769


def test_drop_path_drops_whole_branches(make_spec: MakeSpec) -> None:
    """All branches dropped leaves the linear probe; a factor of one changes nothing."""
    network = build(make_spec(), "last", {"rank": 4, "pool": "cls"})
    features = features_for(network)
    operands = network.operands(features, torch.float64)
    ones = torch.ones(3, network.drop_sites, 3, dtype=torch.float64)
    assert network.drop_sites == 4
    assert torch.equal(network(operands, ones), network(operands))
    probe = build(network.spec, "linear", {"pool": "cls"})
    probe.load_state_dict(
        {k: v for k, v in network.state_dict().items() if not k.startswith("chain.")}
    )
    expected = run(probe, features)
    torch.testing.assert_close(network(operands, ones * 0), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank = 0: expected 1 or more"),
        ({"heads": 3}, "heads = 3: expected a divisor of 16"),
        ({"pool": "max"}, "pool = 'max': expected mean or cls"),
        ({"gap": 5}, "gap = 5: expected a divisor of the 4 blocks"),
    ],
)
def test_impossible_settings(make_spec: MakeSpec, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAST(make_spec(), LASTSettings(**settings), [0])


def test_missing_taps_are_named(make_spec: MakeSpec) -> None:
    whole = make_spec()
    spec = dataclasses.replace(whole, taps={tap: whole.taps[tap] for tap in ("z0", "z2", "z4")})
    with pytest.raises(LookupError, match=r"z1, z3 are lacking \(there are z0, z2, z4\)"):
        LAST(spec, LASTSettings(), [0])
    LAST(spec, LASTSettings(gap=2), [0])


def test_class_token_pool_needs_a_class_token(make_spec: MakeSpec) -> None:
    spec = make_spec(prefix_tokens=0)
    for method in METHODS.values():
        if "pool" in method.settings_class.__dataclass_fields__:
            with pytest.raises(ValueError, match="no class token"):
                method(spec, method.settings_class(pool="cls"), [0])  # type: ignore[call-arg]


def test_attention_in_bfloat16_divides_by_the_exact_sum() -> None:
    """On a CPU the weights are bfloat16, their sum over 197 tokens is not."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 16, 197, generator=generator).bfloat16() for _ in range(3))
    weights, total = Attention(q, k, v)._weights()
    assert weights.dtype == torch.bfloat16 and total.dtype == torch.float32
    torch.testing.assert_close(total[:, 0], weights.double().sum(dim=-1).float(), rtol=1e-6, atol=0)
