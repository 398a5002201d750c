"""Small honest doubles: timm's `test_vit`, random weights, a few 32-pixel images, no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import device
from pipeline.backbones import behind
from pipeline.backbones.contract import Backbone
from pipeline.config import ExtractConfig, Member, TrainConfig
from pipeline.extract import extract
from pipeline.side.contract import FeatureSpec, TokenShape

VIT_BLOCK: dict[str, Any] = {  # a plain pre-norm block, as `pipeline.backbones.blocks` describes it
    "kind": "vit", "dim": 768, "heads": 12, "head_dim": 64, "qkv_bias": True, "proj_bias": True,
    "ff": "mlp", "hidden": 3072, "act": "gelu", "fc1_bias": True, "fc2_bias": True,
    "norm": {"kind": "layer", "eps": 1e-6, "bias": True}, "qk_norm": None, "layer_scale": False,
    "grid": None,
}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--real-data", help="folder with real image sets and weights/, for slow checks"
    )
    parser.addoption(
        "--bfloat16",
        choices=["auto", "on", "off"],
        default="auto",
        help="what precision to choose where nothing asks for one: as on a processor with bfloat16 "
        "hardware, or without (in this process; commands that tests start see the real processor)",
    )


def pytest_configure(config: pytest.Config) -> None:
    forced = config.getoption("--bfloat16")
    if forced != "auto":
        device._cpu_has_bfloat16 = lambda: forced == "on"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What was skipped, and why: a line that stands beside the counts."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
    )
    told = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
    terminalreporter.write_line(f"skipped: {told or 'nothing'}")


@pytest.fixture
def real_data(request: pytest.FixtureRequest) -> Path:
    """The folder given with --real-data; the test is skipped without it."""
    folder = request.config.getoption("--real-data")
    if folder is None:
        pytest.skip("needs real image sets and weights: pytest --real-data DIR")
    return Path(folder)


def paint(folder: Path, *, train: int = 4, val: int = 2, test: int = 2, side: int = 32) -> Path:
    """A class folder tree: three classes told apart by colour, noise on top."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val), ("test", test)):
        for label, name in enumerate(("blue", "green", "red")):
            for number in range(count):
                pixels = random.integers(0, 120, (side, side, 3), dtype=np.uint8)
                pixels[..., 2 - label] += 120
                path = folder / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images in three classes and three splits. Read-only: paint your own to change one."""
    return paint(tmp_path_factory.mktemp("images"))


def extract_config(images: Path, out: Path, **changes: object) -> ExtractConfig:
    """test_vit at 32 pixels (4 + 1 tokens), float32, no worker processes: fast and exact."""
    defaults: dict[str, object] = {
        "model": "test_vit",
        "pretrained": False,
        "img_size": (32, 32),
        "batch_size": 5,
        "workers": 0,
        "device": "cpu",
        "amp": False,
        "dtype": "float32",
    }
    return ExtractConfig(images=str(images), out=str(out), **{**defaults, **changes})


@pytest.fixture(scope="session", params=["zarr", "h5"])
def cache(
    request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The images' cache in each format."""
    out = tmp_path_factory.mktemp("cache") / f"features.{request.param}"
    extract(extract_config(images, out))
    return out


@pytest.fixture(scope="session")
def zarr_cache(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images' cache, where one format is enough."""
    out = tmp_path_factory.mktemp("cache") / "features.zarr"
    extract(extract_config(images, out))
    return out


@pytest.fixture(scope="session")
def tasks_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Painted images with a colour, marks that follow from it, and a number; some have none."""
    folder = paint(tmp_path_factory.mktemp("tasks"), train=8, val=4)
    lines = ["path,label:colour,labels:marks,value:warmth,split"]
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        colour, split = path.parent.name, path.parent.parent.name
        marks = {"red": "warm;bright", "green": "bright", "blue": "-"}[colour]
        warmth = {"red": "30", "green": "20", "blue": "-10"}[colour]
        if number % 7 == 0:
            colour = ""
        lines.append(f"{path.relative_to(folder)},{colour},{marks},{warmth},{split}")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    out = tmp_path_factory.mktemp("cache") / "tasks.zarr"
    extract(extract_config(folder / "list.csv", out))
    return out


def train_config(cache: Path, out: Path, *members: Member, **changes: object) -> TrainConfig:
    """A short float32 pass on the CPU."""
    defaults: dict[str, object] = {"device": "cpu", "amp": False, "batch_size": 5}
    chosen = members or (Member(method="last", epochs=3, warmup_epochs=1, settings={"rank": 4}),)
    return TrainConfig(cache=str(cache), out=str(out), members=chosen, **{**defaults, **changes})


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A member goes live with the random weights that its cache was extracted with."""
    real = behind.load_backbone

    def load(name: str, **arguments: Any) -> Backbone:
        return real(name, **{**arguments, "pretrained": False})

    monkeypatch.setattr(behind, "load_backbone", load)


@pytest.fixture
def make_spec() -> Callable[..., FeatureSpec]:
    """A feature shape with a random final norm."""

    def make(
        blocks: int = 4, *, tokens: int = 9, prefix_tokens: int = 1, dim: int = 24, **changes: Any
    ) -> FeatureSpec:
        generator = torch.Generator().manual_seed(7)
        shape = TokenShape(tokens=tokens, prefix_tokens=prefix_tokens, dim=dim)
        defaults: dict[str, Any] = {
            "taps": {f"z{i}": shape for i in range(blocks + 1)},
            "classes": 5,
            "blocks": ({**VIT_BLOCK, "dim": dim, "head_dim": dim // 3, "heads": 3, "hidden": 48},)
            * blocks,
            "norm": "layer",
            "norm_eps": 1e-6,
            "norm_weight": torch.rand(dim, generator=generator) + 0.5,
            "norm_bias": torch.rand(dim, generator=generator),
        }
        return FeatureSpec(**{**defaults, **changes})

    return make
