"""Backbones in stages: taps of unequal shape become several stacks; three methods train on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import extract_config, train_config
from torch import Tensor

from cache import Reader, verify
from pipeline.backbones.timm_models import load_backbone
from pipeline.config import Member
from pipeline.errors import SettingError
from pipeline.extract import extract
from pipeline.train import train
from sidecache import evaluate

pytestmark = pytest.mark.numerics

CPU = torch.device("cpu")
SWIN, CONVNEXT, RESNET = "swin_tiny_patch4_window7_224", "test_convnext", "resnet18"


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        (SWIN, [(64, 96)] * 3 + [(16, 192)] * 2 + [(4, 384)] * 6 + [(1, 768)] * 2),
        (CONVNEXT, [(64, 24)] * 2 + [(16, 32)] * 2 + [(4, 48)] * 4 + [(1, 64)] * 2),
        (RESNET, [(64, 64)] * 3 + [(16, 128)] * 2 + [(4, 256)] * 2 + [(1, 512)] * 2),
    ],
)
def test_taps_are_the_blocks_maps_row_by_row(name: str, shapes: list[tuple[int, int]]) -> None:
    """z0 enters the first block; zi leaves block i: against hooks registered here."""
    backbone = load_backbone(
        name, device=CPU, pretrained=False, preprocessing={"img_size": (32, 32)}
    )
    assert [(shape.tokens, shape.dim) for shape in backbone.taps.values()] == shapes
    model: Any = backbone.model
    if name == SWIN:
        blocks = [block for stage in model.layers for block in stage.blocks]
    elif name == CONVNEXT:
        blocks = [block for stage in model.stages for block in stage.blocks]
    else:
        blocks = [*model.layer1, *model.layer2, *model.layer3, *model.layer4]
    seen: list[Tensor] = []
    blocks[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    for block in blocks:
        block.register_forward_hook(lambda _m, _a, out: seen.append(out))
    images = torch.randn(2, 3, 32, 32)
    ours: dict[str, Tensor] = {}
    backbone.read_taps(
        images, lambda tap, x: ours.update({tap: x.clone()}), precision=torch.float32
    )
    assert list(ours) == list(backbone.taps) == [f"z{i}" for i in range(len(seen))]
    for tokens, x in zip(ours.values(), seen, strict=True):
        rows = x if name == SWIN else x.permute(0, 2, 3, 1)  # (B, H, W, D)
        assert torch.equal(tokens, rows.reshape(tokens.shape))


def test_final_norm_is_the_one_behind_the_pool() -> None:
    """Pooled, normed by our constants, classified: the model's own logits."""
    import timm

    torch.manual_seed(0)
    model: Any = timm.create_model(CONVNEXT, num_classes=7).eval()
    with torch.no_grad():
        model.head.norm.weight.uniform_(0.5, 1.5)
        model.head.norm.bias.normal_()
        images = torch.randn(2, 3, 32, 32)
        expected = model(images)
        pooled = model.forward_features(images).mean(dim=(2, 3))
        from pipeline.backbones.timm_models import _final_norm

        norm = _final_norm(model, CONVNEXT)
        normed = torch.nn.functional.layer_norm(
            pooled, pooled.shape[-1:], norm.weight, norm.bias, norm.eps
        )
        torch.testing.assert_close(model.head.fc(normed), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module", params=[SWIN, CONVNEXT])
def staged_cache(
    request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("staged") / "c.zarr"
    extract(extract_config(images, out, model=request.param))
    return out


def test_one_stack_a_stage(staged_cache: Path) -> None:
    with Reader(staged_cache) as reader:
        stacks = reader.manifest.stacks
        assert [stack.name for stack in stacks] == ["stage1", "stage2", "stage3", "stage4"]
        taps = [tap for stack in stacks for tap in stack.taps]
        assert taps == [f"z{i}" for i in range(len(taps))]
    assert verify(staged_cache).ok


@pytest.mark.parametrize("method", ["linear", "attentive", "lst"])
def test_methods_without_a_sum_train_on_stages(
    staged_cache: Path, tmp_path: Path, method: str
) -> None:
    settings: dict[str, Any] = {"linear": {"pool": "mean", "last_n": 3}}.get(method, {})
    member = Member(method=method, epochs=3, warmup_epochs=1, settings=settings)
    for resident in ("ram", "disk"):
        result = train(train_config(staged_cache, tmp_path / resident, member, resident=resident))
        assert result.members[0].stopped is None
    first, second = (evaluate(tmp_path / r, device="cpu", amp=False)[0] for r in ("ram", "disk"))
    assert first.loss == second.loss


@pytest.mark.parametrize("method", ["last", "miet"])
def test_methods_with_a_sum_refuse(staged_cache: Path, tmp_path: Path, method: str) -> None:
    with pytest.raises(SettingError, match=r"taps are added up, and those .* have unequal shapes"):
        train(train_config(staged_cache, tmp_path / "run", Member(method=method)))


def test_no_sum_over_stages(images: Path, tmp_path: Path) -> None:
    config = extract_config(images, tmp_path / "c.zarr", model=CONVNEXT, gather="sum")
    with pytest.raises(SettingError, match="a sum over taps is defined where all have one shape"):
        extract(config)


@pytest.mark.usefixtures("no_hub")
def test_an_early_stage_alone(images: Path, tmp_path: Path) -> None:
    """The final norm is another stage's there; the cached and the live member still agree."""
    extract(extract_config(images, tmp_path / "c.zarr", model=CONVNEXT, taps="0,1,2"))
    member = Member(method="linear", epochs=3, warmup_epochs=1, settings={"pool": "mean"})
    train(train_config(tmp_path / "c.zarr", tmp_path / "run", member))
    arguments: dict[str, Any] = {"device": "cpu", "amp": False}
    (cached,) = evaluate(tmp_path / "run", **arguments)
    (live,) = evaluate(tmp_path / "run", images=str(images), workers=0, **arguments)
    assert live.loss == pytest.approx(cached.loss, rel=1e-4)
