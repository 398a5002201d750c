"""`import sidecache`: what it exports, what it costs to import, and that its examples run."""

from __future__ import annotations

import doctest
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sidecache
from pipeline.errors import MissingPackage, MissingTaps, SettingError


def test_exported_names_are_these() -> None:
    assert sidecache.__all__ == [
        "__version__", "copy", "errors", "evaluate", "extract", "from_arrays", "label", "load",
        "open", "predict", "report", "sweep", "train",
    ]  # fmt: skip
    public = {name for name, value in vars(sidecache).items() if inspect.isfunction(value)}
    assert {name for name in public if not name.startswith("_")} <= set(sidecache.__all__)
    for name in sidecache.__all__:
        assert name == "__version__" or inspect.getdoc(getattr(sidecache, name)), name


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, sidecache; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "timm", "zarr", "h5py", "numpy", "optuna", "jinja2", "click", "rich", "yaml"}
    assert not heavy & set(done.stdout.split())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library as by the commands; it stays the error that a failing import is."""
    for name in ("pipeline.sweep", "pipeline.search.proposals"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingPackage, match=r"pip install 'sidecache\[sweep\]'") as caught:
        sidecache.sweep("c.zarr", space={"method": "linear"}, out="run")
    assert isinstance(caught.value, ImportError) and caught.value.name == "optuna"


def test_its_examples_run(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the file, in one folder, which holds `photos/`."""
    shutil.copytree(images, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    tests = doctest.DocTestFinder().find(sidecache, "sidecache")
    order = {name: place for place, name in enumerate([
        "sidecache", "sidecache.extract", "sidecache.train", "sidecache.copy", "sidecache.sweep",
        "sidecache.evaluate", "sidecache.report", "sidecache.load", "sidecache.open",
        "sidecache.label", "sidecache.from_arrays",
    ])}  # fmt: skip
    with_examples = [test for test in tests if test.examples]
    assert {test.name for test in with_examples} == set(order)
    for test in sorted(with_examples, key=lambda test: order[test.name]):
        assert runner.run(test).failed == 0, test.name


@pytest.fixture
def trained(images: Path, tmp_path: Path) -> Path:
    cache, run = tmp_path / "c.zarr", tmp_path / "run"
    sidecache.extract(images, model="test_vit", pretrained=False, out=cache, dtype="float32",
                      amp=False, device="cpu", workers=0, img_size=(32, 32))  # fmt: skip
    sidecache.train(cache, method="last", epochs=3, amp=False, device="cpu", out=run)
    return run


def test_a_loaded_member_predicts_what_predict_does(trained: Path, images: Path) -> None:
    model = sidecache.load(trained, pretrained=False, device="cpu")
    photo = next(iter(sorted((images / "test").rglob("*.png"))))
    pixels = model.transform(Image.open(photo).convert("RGB"))
    outputs = model(pixels[None])
    assert isinstance(model, torch.nn.Module) and not any(
        parameter.requires_grad for parameter in model.parameters()
    )
    [score] = sidecache.evaluate(trained)
    files = sorted((images / "test").rglob("*.png"))
    batch = torch.stack([model.transform(Image.open(file).convert("RGB")) for file in files])
    named = [model.classes[index] for index in model(batch).argmax(dim=1)]
    right = np.mean([name == file.parent.name for name, file in zip(named, files, strict=True)])
    assert score.scores["top1"] == pytest.approx(right)
    assert outputs.shape == (1, 3)


def test_a_dataset_feeds_a_loader_with_workers(trained: Path, tmp_path: Path) -> None:
    features = sidecache.open(tmp_path / "c.zarr")
    dataset = features.dataset("train", taps=["z0", "z6"])
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=1)
    tokens, labels = next(iter(loader))
    rows = features.rows("train")[:4]
    np.testing.assert_array_equal(tokens["z6"].numpy(), features.tap("z6", rows))
    np.testing.assert_array_equal(labels.numpy(), features.labels()[rows])
    with pytest.raises(MissingTaps, match=r"no tap 'z9'.*z0, z1"):
        features.dataset("train", taps=["z9"])


def test_tensors_in_memory_make_a_cache(tmp_path: Path) -> None:
    values = {f"z{tap}": torch.randn(10, 4) for tap in range(2)}
    features = sidecache.from_arrays(tmp_path / "m.h5", values, labels=[0.5] * 9 + [None],
                                     dtype="float32")  # fmt: skip
    assert features.taps == ("z0", "z1") and len(features) == 10
    np.testing.assert_array_equal(features.tap("z1", [3])[0, 0], values["z1"][3].numpy())
    assert np.isnan(features.labels()[9])
    again = sidecache.from_arrays(tmp_path / "m.h5", values, labels=[0.5] * 9 + [None],
                                  dtype="float32")  # fmt: skip
    assert again.reader.content == features.reader.content
    with pytest.raises(SettingError, match=r"labels: expected one for each of 10 rows, came 3"):
        sidecache.from_arrays(tmp_path / "n.h5", values, labels=[1, 2, 3])
    with pytest.raises(SettingError, match=r"tap z1: expected \(10, tokens, dim\)"):
        sidecache.from_arrays(tmp_path / "n.h5", {"z0": np.zeros((10, 4)), "z1": np.zeros((9, 4))})
