"""timm's data sets: torchvision's, webdataset's shards, Hugging Face's, TensorFlow's; spools."""

from __future__ import annotations

import gc
import hashlib
import io
import os
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from image_files import encoded, fails, noise, numbers_of, put, tar_of, tree, triples

from pipeline.errors import ImageError
from pipeline.sources.open import open_source
from pipeline.sources.spool import Spool, _remove


def test_torch_image_folder(tmp_path: Path) -> None:
    tree(tmp_path, "train/b/1.png", "train/a/1.png", "validation/a/2.png")
    source = open_source("torch/image_folder", data_dir=str(tmp_path), splits=("train", "val"))
    assert source.target("label").classes == ("a", "b")
    assert triples(source) == [
        ("train/a/1.png", 0, "train"),
        ("train/b/1.png", 1, "train"),
        ("validation/a/2.png", 0, "val"),
    ]
    assert source.open(2).getpixel((0, 0)) == (2, 253, 7)
    one = open_source("torch/image_folder", data_dir=str(tmp_path / "train"))
    assert [row.key for row in one.rows] == ["a/1.png", "b/1.png"]


def test_torch_image_folder_names_the_broken_row(tmp_path: Path) -> None:
    """timm's and torchvision's data sets would give the next image, or no name."""
    path = put(tmp_path / "a/1.png", b"broken")
    tree(tmp_path, "a/2.png")
    with pytest.raises(ImageError, match=re.escape(str(path))):
        open_source("torch/image_folder", data_dir=str(tmp_path)).open(0)


def idx(path: Path, array: np.ndarray) -> None:
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    put(path, head + array.tobytes())


def test_torch_data_set_of_pixels(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST/raw"
    pixels = np.random.default_rng(2).integers(0, 256, (5, 28, 28), np.uint8)
    for part, stop in (("train", 3), ("t10k", 2)):
        idx(raw / f"{part}-images-idx3-ubyte", pixels[:stop])
        idx(raw / f"{part}-labels-idx1-ubyte", np.array([7, 2, 1], np.uint8)[:stop])
    source = open_source("torch/mnist", data_dir=str(tmp_path), splits=("train", "test"))
    assert source.target("label").classes[7] == "7 - seven"
    assert numbers_of(source) == [7, 2, 1, 7, 2]
    assert [row.split for row in source.rows] == ["train"] * 3 + ["test"] * 2
    assert len({row.key for row in source.rows}) == 5
    assert (np.asarray(source.open(4))[..., 1] == pixels[1]).all()
    expected = hashlib.sha256(b"L 28 28\n" + pixels[1].tobytes()).digest()
    assert source.sha256(4) == source.sha256(1) == expected
    copy = pickle.loads(pickle.dumps(source))
    assert copy.open(2).tobytes() == source.open(2).tobytes()
    named = open_source(
        "torch/mnist", data_dir=str(tmp_path), splits=("train=test", "holdout=train")
    )
    assert named.splits == ("train", "holdout")
    assert len([row for row in named.rows if row.split == "train"]) == 2


def test_torch_errors(tmp_path: Path) -> None:
    root = str(tree(tmp_path, "a/1.png"))
    fails("torch/cifar10", "needs a folder", "--data-dir")
    fails("torch/cifar10", "split train", f"--data-dir {root}", "--dataset-download", data_dir=root)
    fails("torch/cifar10", "no columns", "leave out", data_dir=root, target_key="fine")
    fails("torch/cifar10", "train and test alone", data_dir=root, splits=("train", "val"))
    fails("torch/image_folder", "no folder", root, data_dir=root, splits=("train", "test"))
    fails("torch/unknown", "Unknown torchvision dataset", data_dir=root)
    fails("torch/mnist", "have one name", data_dir=root, splits=("val", "validation"))


def wds_shard(path: Path, numbers: range, **extra: bytes) -> dict[str, bytes]:
    members = {}
    for number in numbers:
        members[f"{number:03d}.jpg"] = encoded(number, "JPEG")
        members[f"{number:03d}.cls"] = str(number % 3).encode()
    tar_of(path, members | extra)
    return members


@pytest.mark.filterwarnings("ignore")
def test_wds(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    files = wds_shard(tmp_path / "t-0.tar", range(3)) | wds_shard(tmp_path / "t-1.tar", range(3, 5))
    what = {"splits": ("train=t-{0..1}.tar",), "data_dir": str(tmp_path)}
    source = open_source("wds/any", **what)
    keys = [f"t-{number // 3}.tar/{number:03d}" for number in range(5)]
    assert triples(source) == [(key, i % 3, "train") for i, key in enumerate(keys)]
    assert source.target("label").classes == ("0", "1", "2")
    for number in range(5):
        assert source.sha256(number) == hashlib.sha256(files[f"{number:03d}.jpg"]).digest()
    assert triples(open_source(f"wds/{tmp_path}", splits=what["splits"])) == triples(source)
    pickle.loads(pickle.dumps(source)).open(4)


@pytest.mark.filterwarnings("ignore")
def test_wds_keeps_and_names_broken_rows(tmp_path: Path) -> None:
    """timm's reader drops them with a log line."""
    pytest.importorskip("webdataset")
    broken = {"002.jpg": b"bad", "002.cls": b"1"}
    wds_shard(tmp_path / "s.tar", range(2), **broken)
    source = open_source("wds/any", splits=("train=s.tar",), data_dir=str(tmp_path))
    assert len(source.rows) == 3
    with pytest.raises(ImageError, match=r"wds/any, member s\.tar/002: not an image"):
        source.open(2)


@pytest.mark.filterwarnings("ignore")
def test_wds_labels_in_json(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    members = {"a.jpg": encoded(kind="JPEG"), "a.json": b'{"kind": 1, "colour": 4}'}
    tar_of(tmp_path / "s.tar", members)
    what = {"splits": ("train=s.tar",), "data_dir": str(tmp_path)}
    assert numbers_of(open_source("wds/x", target_key="colour", **what))[0] == 4
    fails("wds/x", "sample a", "'size'", "only kind, colour", target_key="size", **what)
    fails("wds/x", "sample a", "no .cls", "--target-key", **what)
    fails("wds/x", "sample a has no png", "jpg, json", "--input-key", input_key="png", **what)
    fails("wds/x", "split train", "not found", data_dir=str(tmp_path))
    what["splits"] = ("train=none.tar",)
    fails("wds/x", "shard none.tar", "no local file", **what)


@pytest.mark.filterwarnings("ignore")
def test_wds_copies_remote_shards_to_a_spool_that_goes_with_the_source(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    wds_shard(tmp_path / "s.tar", range(2))
    splits = (f"train=pipe:cat {tmp_path}/s.tar",)
    source = open_source("wds/x", splits=splits, data_dir="")
    folder = Path(source.spans[0].file).parent  # type: ignore[attr-defined]
    assert folder.is_dir()
    assert source.open(1).size == (8, 8)
    del source
    gc.collect()
    assert not folder.exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prefix", ["hfds", "hfids"])
def test_hugging_face_data_sets(tmp_path: Path, prefix: str) -> None:
    pytest.importorskip("datasets")
    root = tree(tmp_path / "set", *(f"{s}/{c}/{s}.png" for s in ("train", "test") for c in "ba"))
    name, data_dir = f"{prefix}/{root}", str(tmp_path / "hub")
    source = open_source(name, splits=("train", "test"), data_dir=data_dir)
    assert source.target("label").classes == ("a", "b")
    assert [(label, split) for _, label, split in triples(source)] == [
        (0, "train"),
        (1, "train"),
        (0, "test"),
        (1, "test"),
    ]
    files = [root / name for name in ("train/a/train.png", "train/b/train.png")]
    for index, file in enumerate(files):
        assert source.sha256(index) == hashlib.sha256(file.read_bytes()).digest()
    assert pickle.loads(pickle.dumps(source)).open(3).tobytes() == source.open(3).tobytes()
    fails(name, "split none", "none", splits=("none",), data_dir=data_dir)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prefix", ["hfds", "hfids"])
def test_hugging_face_rows_that_are_broken(tmp_path: Path, prefix: str) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict(
        {
            "photo": [{"bytes": encoded(), "path": None}, {"bytes": b"bad", "path": None}, None],
            "kind": [5, 0, 1],
        }
    )
    (tmp_path / "set").mkdir()
    table.cast_column("photo", datasets.Image(decode=False)).to_parquet(
        tmp_path / "set/train.parquet"
    )
    name = f"{prefix}/{tmp_path}/set"
    source = open_source(name, input_key="photo", target_key="kind", data_dir=str(tmp_path / "hub"))
    assert source.target("label").classes == ("0", "1", "2", "3", "4", "5")
    assert source.open(0).size == (8, 8)
    for index in (1, 2):
        with pytest.raises(ImageError, match=f"row train/0000000{index}: .*--on-error skip"):
            source.open(index)
    fails(name, "label", "--input-key image, --target-key label", data_dir=str(tmp_path / "hub"))


@pytest.mark.filterwarnings("ignore")
def test_tensorflow_data_sets(tmp_path: Path) -> None:
    import pipeline.sources.timm_sets  # noqa: F401  (triton aborts the process if tensorflow came first)

    pytest.importorskip("tensorflow")
    tfds = pytest.importorskip("tensorflow_datasets")
    images = [noise("JPEG"), encoded(3, "JPEG"), b""]

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=["ant", "bee"]),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number, data in enumerate(images[:2]):
                yield number, {"image": io.BytesIO(data), "label": number}

    Tiny(data_dir=tmp_path).download_and_prepare()
    source = open_source("tfds/tiny", data_dir=str(tmp_path))
    assert source.target("label").classes == ("ant", "bee")
    got = {label: source.sha256(index) for index, label in enumerate(numbers_of(source))}
    assert got == {n: hashlib.sha256(images[n]).digest() for n in (0, 1)}
    assert {source.open(0).size, source.open(1).size} == {(64, 64), (8, 8)}
    again = open_source("tfds/tiny", data_dir=str(tmp_path))
    assert triples(again) == triples(source)
    fails("tfds/none", "tfds/none, split train", data_dir=str(tmp_path))


def test_a_spool_outlives_its_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spool = Spool()
    path = put(spool.new_file(), "x")
    copy = pickle.loads(pickle.dumps(spool))
    del copy
    gc.collect()
    assert path.is_file()
    _remove(spool.folder, os.getpid() + 1)  # as in a forked worker
    assert path.is_file()
    del spool
    gc.collect()
    assert not list(tmp_path.iterdir())
