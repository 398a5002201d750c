"""Taps against forward hooks registered here, on every kind of plain ViT; weights and norms."""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from cache import Reader
from pipeline.backbones.timm_models import TimmBackbone, load_backbone
from pipeline.backbones.weights import weights_sha256
from pipeline.errors import BackboneError, SettingError
from pipeline.features.taps import parse_taps
from pipeline.side.contract import FeatureSpec, TokenShape
from pipeline.side.layers import FrozenNorm, pool_tokens

pytestmark = pytest.mark.numerics

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent.parent
KINDS = {  # name → prefix tokens
    "vit_tiny_patch16_224": 1,
    "vit_medium_patch16_reg4_gap_256": 4,  # register tokens, no class token
    "vit_small_patch14_reg4_dinov2": 5,  # class and register tokens, layer scale
    "deit_tiny_distilled_patch16_224": 2,
    "vit_base_patch16_clip_224": 1,  # norm_pre
    "vit_base_patch16_siglip_224": 0,  # attention pooling, no class token
    "vit_small_patch14_dinov2": 1,  # layer scale
    "vit_tiny_patch16_224.augreg_in21k": 1,
    "eva02_tiny_patch14_224": 1,  # rotary embedding, SwiGLU
    "vit_small_patch16_dinov3": 5,
    "vit_relpos_medium_patch16_cls_224": 1,
    "test_vit2": 1,  # average pooling, fc_norm
}
SIZES = {
    "vit_small_patch14_dinov2": 70,
    "vit_small_patch14_reg4_dinov2": 70,
    "eva02_tiny_patch14_224": 70,
}


def load(name: str) -> TimmBackbone:
    side = SIZES.get(name, 64)
    return load_backbone(
        name, device=CPU, pretrained=False, preprocessing={"img_size": (side, side)}
    )


def read(backbone: TimmBackbone, images: Tensor) -> dict[int, Tensor]:
    taps: dict[int, Tensor] = {}
    backbone.read_taps(
        images, lambda tap, x: taps.update({int(tap[1:]): x.clone()}), precision=torch.float32
    )
    return taps


@pytest.mark.parametrize("name", KINDS)
def test_taps_equal_forward_hooks(name: str) -> None:
    backbone = load(name)
    assert backbone.prefix_tokens == KINDS[name]
    images = torch.randn(2, 3, *backbone.preprocessing.img_size)
    ours = read(backbone, images)

    seen: dict[int, Tensor] = {}
    model: Any = backbone.model

    def first(_module: Any, args: Any, kwargs: Any) -> None:
        seen[0] = (args[0] if args else kwargs["x"]).clone()

    handles = [model.blocks[0].register_forward_pre_hook(first, with_kwargs=True)]
    for i, block in enumerate(model.blocks, start=1):
        handles.append(
            block.register_forward_hook(lambda _m, _a, out, i=i: seen.update({i: out.clone()}))
        )
    with torch.no_grad():
        model.forward_features(images)
    assert sorted(ours) == list(range(backbone.blocks + 1)) == sorted(seen)
    for i, tokens in seen.items():
        shape = backbone.taps[f"z{i}"]
        assert tokens.shape == (2, shape.tokens, shape.dim)
        assert (ours[i] - tokens).abs().max() <= 1e-6


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224", "test_vit2"])
def test_last_tap_final_norm_and_head_give_the_models_own_logits(name: str) -> None:
    """Raw zL, pooled and normed by our constants, is what the model's own head sees."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, img_size=64).eval()
    norm = model.norm if not isinstance(model.norm, torch.nn.Identity) else model.fc_norm
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        pooled_first = isinstance(model.norm, torch.nn.Identity)
        tokens = model.blocks(model._pos_embed(model.patch_embed(images)))
    shape = TokenShape(tokens=tokens.shape[1], prefix_tokens=1, dim=tokens.shape[2])
    spec = FeatureSpec(
        taps={"z1": shape}, classes=2,
        norm="layer", norm_eps=norm.eps, norm_weight=norm.weight.data, norm_bias=norm.bias.data,
    )  # fmt: skip
    pooled = pool_tokens(tokens, "mean" if pooled_first else "cls", 1)
    with torch.no_grad():
        logits = model.head(FrozenNorm(spec, shape.dim)(pooled))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("mean", [(0.485, 0.456, 0.406), (0.5, 0.5, 0.5), (0.0, 1.0, 0.3)])
def test_pixels_normalised_are_the_transform_bit_for_bit(
    crop_mode: str, mean: tuple[float, float, float]
) -> None:
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (70, 90, 3), np.uint8)) for _ in range(3)]
    ramp = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    how = {"crop_mode": crop_mode, "mean": mean, "std": (0.229, 0.224, 0.1)}
    backbone = load_backbone(
        "test_convnext", device=CPU, pretrained=False, preprocessing={"img_size": (48, 64), **how}
    )
    whole = backbone.preprocessing.transform()
    pixels = backbone.preprocessing.transform(normalize=False)
    for image in images:
        found = pixels(image)
        assert found.dtype == torch.uint8 and found.shape == (3, 48, 64)
        assert torch.equal(backbone.normalised(found[None])[0], whole(image))
    exact = dataclasses.replace(backbone.preprocessing, img_size=(16, 16), crop_pct=1.0)
    every = exact.transform(normalize=False)(Image.fromarray(ramp))
    assert len(every.unique()) == 256
    expected = exact.transform()(Image.fromarray(ramp))
    assert torch.equal(backbone.normalised(every[None])[0], expected)


def test_taps_of_pixels_are_those_of_the_normalised_images() -> None:
    backbone = load("test_vit")
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    ours, theirs = (read(backbone, x) for x in (pixels, backbone.normalised(pixels)))
    assert all(torch.equal(ours[i], theirs[i]) for i in theirs)


def test_fewer_taps_run_fewer_blocks() -> None:
    backbone = load("test_vit")
    images = torch.randn(2, 3, 64, 64)
    everything = read(backbone, images)
    backbone.keep(("z0", "z2", "z3"))
    assert len(backbone.model.blocks) == 3  # type: ignore[arg-type]
    fewer = read(backbone, images)
    assert [torch.equal(fewer[i], everything[i]) for i in (0, 2, 3)] == [True] * 3


def test_weights_from_a_file_are_the_weights(tmp_path: Path) -> None:
    """safetensors and pth, with a classifier of another size: same digest, same taps."""
    torch.manual_seed(3)
    model: Any = timm.create_model("test_vit", num_classes=7)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth")
    one, other = (
        load_backbone("test_vit", device=CPU, weights=tmp_path / name)
        for name in ("w.safetensors", "w.pth")
    )
    random = load_backbone("test_vit", device=CPU, pretrained=False)
    assert one.weights_sha256 == other.weights_sha256 != random.weights_sha256
    state: Any = one.model.state_dict()
    assert torch.equal(state["blocks.5.mlp.fc2.weight"], model.blocks[5].mlp.fc2.weight)


class Payload:
    """What a hostile file holds in place of a tensor: unpickled, it makes the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("container", [None, "state_dict", "model"])
def test_weights_from_a_file_are_never_executed(
    tmp_path: Path, zipped: bool, container: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a timm that executes pickles, as versions do that this project allows."""

    def executing(path: str, *_: Any, **__: Any) -> Any:
        return torch.load(path, weights_only=False)

    monkeypatch.setattr("timm.models.load_state_dict", executing)
    monkeypatch.setattr("timm.models._builder.load_state_dict", executing)
    path, mark = tmp_path / "w.pth", tmp_path / "executed"
    state = {**timm.create_model("test_vit").state_dict(), "head.bias": Payload(mark)}
    torch.save(
        {container: state} if container else state, path, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(BackboneError, match=r"w\.pth: .*mkdir.*Nothing .* executed.*safetensors"):
        load_backbone("test_vit", device=CPU, weights=path)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # it is as hostile as it says
    assert mark.exists()


def test_weights_in_every_container_that_timm_knows(tmp_path: Path) -> None:
    """Averaged weights first; prefixes of wrappers removed; arguments of a training beside them."""
    path = tmp_path / "w.pth"
    torch.manual_seed(3)
    wanted, other = (timm.create_model("test_vit").state_dict() for _ in range(2))
    torch.save(wanted, path)
    digest = load_backbone("test_vit", device=CPU, weights=path).weights_sha256
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in wanted.items()}
    for saved in (
        {"state_dict_ema": wanted, "state_dict": other, "epoch": 3},
        {"model_ema": wanted, "model": other, "state_dict": other},
        {"model": wanted, "model_ema": None, "args": argparse.Namespace(lr=0.1)},
        {"state_dict": wrapped, "optimizer": {"state": {}}},
        {"encoder": {f"module.{name}": tensor for name, tensor in wanted.items()}, "epoch": 1},
    ):
        torch.save(saved, path)
        backbone = load_backbone("test_vit", device=CPU, weights=path)
        assert backbone.weights_sha256 == digest
        assert "state_dict" not in backbone.model.pretrained_cfg  # type: ignore[operator]


def test_weights_in_the_layout_of_dinov2_and_of_another_size(tmp_path: Path) -> None:
    """timm renames and resizes: as when it loads them itself."""
    model: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    state = {**model.state_dict(), "mask_token": torch.zeros(1, 192)}
    for layer in ("weight", "bias"):
        state[f"blocks.0.mlp.w12.{layer}"] = state.pop(f"blocks.0.mlp.fc1.{layer}")
    torch.save(state, tmp_path / "w.pth")
    at = {"device": CPU, "weights": tmp_path / "w.pth"}
    same = load_backbone("vit_tiny_patch16_224", preprocessing={"img_size": (32, 32)}, **at)
    loaded: Any = same.model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor)
    larger: Any = load_backbone("vit_tiny_patch16_224", **at).model
    assert larger.pos_embed.shape == (1, 197, 192)


def test_a_model_of_the_hub_by_its_repository(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a hub's client left it on the disk; a process of its own, since that reads its
    environment once."""
    model = timm.create_model("test_vit", img_size=32, num_classes=3)
    repository = tmp_path / "hub" / "models--somebody--small"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    timm.models.save_for_hf(model, snapshot, safe_serialization=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    flags = ["--img-size", "32", "-j", "0", "--device", "cpu"]

    def extract(name: str, out: str) -> subprocess.CompletedProcess[str]:
        line = ["cli.py", "extract", str(images), "--model", name, "--out", str(tmp_path / out)]
        return subprocess.run(
            [sys.executable, *line, *flags], cwd=ROOT, capture_output=True, text=True
        )

    assert extract("hf-hub:somebody/small", "c.zarr").returncode == 0
    with Reader(tmp_path / "c.zarr") as reader:
        backbone = reader.manifest.identity["backbone"]
    model.reset_classifier(0)
    assert backbone["name"] == "hf-hub:somebody/small"
    assert backbone["weights_sha256"] == weights_sha256(model)
    refused = extract("hf-hub:somebody/other", "d.zarr")
    assert refused.returncode == 1 and "could not be loaded" in refused.stderr


def test_random_weights_come_from_the_seed_and_leave_the_global_stream_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    digests = [
        load_backbone("test_vit", device=CPU, pretrained=False, seed=seed).weights_sha256
        for seed in (0, 0, 1)
    ]
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(torch.rand(3), expected)


def test_messages_name_what_was_expected(tmp_path: Path) -> None:
    state = timm.create_model("test_vit").state_dict()
    partial = tmp_path / "partial.safetensors"
    save_file({k: v for k, v in state.items() if not k.startswith("blocks.5")}, partial)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nonsense")
    for name, held in (
        ("list", [1]),
        ("empty", {}),
        ("numbers", {1: 2}),
        ("other", {"patch_embed.proj.weight": "text"}),
    ):
        torch.save(held, tmp_path / f"{name}.pth")
    (tmp_path / "broken.pth").write_bytes(b"nonsense")
    cases = [
        ("no_such_vit", {}, "timm has no model 'no_such_vit'; close to it"),
        ("densenet121", {"pretrained": False}, "expected a model made of a run of blocks"),
        ("test_vit", {"weights": tmp_path / "absent.pth"}, "there is no such file"),
        ("test_vit", {"weights": broken}, "could not read it"),
        ("test_vit", {"weights": tmp_path / "broken.pth"}, r"could not read it \(no tensors"),
        ("test_vit", {"weights": tmp_path / "list.pth"}, "tensors by name.* came a list. Save"),
        ("test_vit", {"weights": tmp_path / "empty.pth"}, "came nothing"),
        ("test_vit", {"weights": tmp_path / "numbers.pth"}, "came a dict"),
        ("test_vit", {"weights": tmp_path / "other.pth"}, "does not fit test_vit"),
        ("test_vit", {"weights": partial}, "does not fit test_vit.*blocks.5"),
        ("test_vit2", {"weights": partial}, "does not fit test_vit2"),
    ]
    for name, arguments, message in cases:
        with pytest.raises(BackboneError, match=message):
            load_backbone(name, device=CPU, **arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6]),
        ("0,3,6", [0, 3, 6]),
        ("z6, z0", [0, 6]),
        ("every:2", [0, 2, 4, 6]),
        ("every:4", [2, 6]),
        ("last:2", [5, 6]),
    ],
)
def test_taps_grammar(text: str, expected: list[int]) -> None:
    assert parse_taps(text, 6) == tuple(f"z{i}" for i in expected)


@pytest.mark.parametrize("text", ["", "some", "every:0", "every:x", "last:0", "0,7", "-1", "1:2:3"])
def test_taps_grammar_refuses(text: str) -> None:
    with pytest.raises(SettingError, match="--taps"):
        parse_taps(text, 6)


def write_jax(model: Any, path: Path) -> None:
    """The model's weights in the original JAX layout, as Google published its ViTs."""
    heads, width = model.blocks[0].attn.num_heads, model.embed_dim
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    out = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    for i in range(len(model.blocks)):
        ours, theirs = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        for j, norm in enumerate(("norm1", "norm2")):
            out[f"{theirs}LayerNorm_{2 * j}/scale"] = state[f"{ours}{norm}.weight"]
            out[f"{theirs}LayerNorm_{2 * j}/bias"] = state[f"{ours}{norm}.bias"]
        kernels = state[f"{ours}attn.qkv.weight"].reshape(3, heads, width // heads, width)
        biases = state[f"{ours}attn.qkv.bias"].reshape(3, heads, width // heads)
        for kernel, bias, name in zip(kernels, biases, ("query", "key", "value"), strict=True):
            out[f"{attention}{name}/kernel"] = kernel.transpose(2, 0, 1)
            out[f"{attention}{name}/bias"] = bias
        projection = state[f"{ours}attn.proj.weight"].T
        out[f"{attention}out/kernel"] = projection.reshape(heads, width // heads, width)
        out[f"{attention}out/bias"] = state[f"{ours}attn.proj.bias"]
        for j, layer in enumerate(("fc1", "fc2")):
            out[f"{theirs}MlpBlock_3/Dense_{j}/kernel"] = state[f"{ours}mlp.{layer}.weight"].T
            out[f"{theirs}MlpBlock_3/Dense_{j}/bias"] = state[f"{ours}mlp.{layer}.bias"]
    np.savez(path, **out)


def test_weights_from_a_jax_file(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model: Any = timm.create_model("test_vit", num_classes=7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    write_jax(model, tmp_path / "w.npz")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    jax, own = (
        load_backbone("test_vit", device=CPU, weights=tmp_path / name)
        for name in ("w.npz", "w.pth")
    )
    assert jax.weights_sha256 == own.weights_sha256
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    with pytest.raises(BackboneError, match=r"other\.npz does not fit test_vit"):
        load_backbone("test_vit", device=CPU, weights=tmp_path / "other.npz")
