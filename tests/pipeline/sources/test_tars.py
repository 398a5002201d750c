"""Tars of images, of tars of images."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import pytest
from image_files import encoded, fails, noise, put, says, tar_of, triples
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from pipeline.errors import ImageError
from pipeline.sources.decode import decode
from pipeline.sources.open import open_source
from pipeline.sources.source import REPAIR_OR_SKIP
from pipeline.sources.tars import open_tar


def test_tar_of_class_folders(tmp_path: Path) -> None:
    members = {
        "./set/b10/2.png": encoded(2),
        "./set/b9/1.jpg": encoded(1, "JPEG"),
        "./set/b9/._1.jpg": b"mac",
        "./set/readme.txt": b"text",
    }
    path = tar_of(tmp_path / "set.tar", members)
    source = open_source(path)
    assert source.target("label").classes == ("b9", "b10")  # timm's natural order
    assert sorted(triples(source)) == [("set/b10/2.png", 1, "train"), ("set/b9/1.jpg", 0, "train")]
    for index, row in enumerate(source.rows):
        data = members[f"./{row.key}"]
        assert source.sha256(index) == hashlib.sha256(data).digest()
        assert source.open(index).tobytes() == decode(data, "", REPAIR_OR_SKIP).tobytes()
    assert triples(pickle.loads(pickle.dumps(source))) == triples(source)
    assert not list(tmp_path.glob("*.pickle"))
    assert open_source(path, classes={"label": ("b10", "c", "b9")}).target("label").classes == (
        "b10",
        "c",
        "b9",
    )
    fails(path, "set/b10/2.png", "'b10'", "known classes: b9", classes={"label": ("b9",)})


def test_tar_with_split_folders_does_not_mix_them(tmp_path: Path) -> None:
    names = ("s/train/a/1.png", "s/train/b/2.png", "s/validation/a/3.png", "s/test/b/4.png")
    path = tar_of(tmp_path / "s.tar", {name: encoded(i) for i, name in enumerate(names)})
    source = open_source(path)
    assert source.splits == ("train", "val", "test")
    assert {row.key: row.split for row in source.rows}["s/validation/a/3.png"] == "val"
    assert [row.key for row in open_source(path, splits=("test",)).rows] == [names[3]]
    fails(path, "no split fold", "train, val, test", splits=("fold",))


def test_tar_of_tars(tmp_path: Path) -> None:
    for name, value in (("ant", 3), ("bee", 4)):
        tar_of(tmp_path / f"{name}.tar", {"1.png": encoded(value)})
    inner = {f"{name}.tar": (tmp_path / f"{name}.tar").read_bytes() for name in ("ant", "bee")}
    source = open_source(tar_of(tmp_path / "all.tar", inner))
    assert triples(source) == [("ant.tar/1.png", 0, "train"), ("bee.tar/1.png", 1, "train")]
    assert source.target("label").classes == ("ant", "bee")
    assert [source.open(i).getpixel((0, 0))[0] for i in (0, 1)] == [3, 4]


def test_tar_errors(tmp_path: Path) -> None:
    fails(put(tmp_path / "x.tar", "no tar at all"), "x.tar", "ReadError")
    fails(tar_of(tmp_path / "n.tar", {"a/x.gif": encoded()}), "n.tar", "looking for .jpg")
    two = {"train/a/1.png": encoded(), "b/2.png": encoded()}
    fails(tar_of(tmp_path / "m.tar", two), "m.tar", "1 do not", "b/2.png", "CSV")
    flat = {"train/1.png": encoded(), "test/2.png": encoded()}
    fails(tar_of(tmp_path / "f.tar", flat), "f.tar", "right in test, train", "per class")
    path = tar_of(tmp_path / "ok.tar", {"a/1.png": noise("PNG"), "a/2.png": b"bad"})
    source = open_source(path)
    with pytest.raises(ImageError) as caught:
        source.open(1)
    says(caught.value, str(path), "member a/2.png", "not an image", "--on-error skip")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ImageError) as caught:
        source.open(0)
    says(caught.value, "member a/1.png", "too early", "--on-error skip")
    path.unlink()
    with pytest.raises(ImageError, match=r"member a/1\.png: .*No such file"):
        source.sha256(0)


def test_a_tar_is_listed_as_timm_does(tmp_path: Path) -> None:
    deep = tar_of(tmp_path / "deep.tar", {"d/1.png": b"1"}).read_bytes()
    inner = {"b/x10.png": b"in 10", "b/X2.PNG": b"in 2", "1.jpg": b"in 1", "d.tar": deep}
    tar_of(tmp_path / "in.tar", inner)
    members = {
        "./s/b10/2.png": b"2",
        "s/b9/10.jpeg": b"10",
        "top.png": b"top",
        "s/in/ant.tar": (tmp_path / "in.tar").read_bytes(),
        "s/b9/9.jpg": b"9",
        "s/empty/.9.jpg": b"hidden",
        "s/b9/no.gif": b"",
    }
    path = tar_of(tmp_path / "all.tar", members)
    source = open_tar(path, None, None)
    reader = ReaderImageInTar(str(path), cache_tarfiles=False, cache_tarinfo=False)
    assert source.target("label").classes == tuple(reader.class_name_to_idx)
    listed = [
        (info.name, number)
        for (info, _, _), number in zip(reader.samples, reader.targets, strict=True)
        if not Path(info.name).name.startswith(".")
    ]
    assert len(listed) == 7
    for row, (name, number) in enumerate(listed):
        assert source.rows[row].key.endswith(name.removeprefix("./"))
        assert source.target("label").values[row] == number
        assert source.read(row) == {**members, **inner}[name]
