"""Folders of class folders, split folders, photographs; every message that a faulty one earns."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from image_files import encoded, fails, numbers_of, put, tree, triples

from pipeline.errors import SourceError
from pipeline.sources.decode import decode
from pipeline.sources.folders import photos
from pipeline.sources.open import open_source
from pipeline.sources.source import REPAIR_OR_SKIP


def test_folder_of_class_folders_is_all_train(tmp_path: Path) -> None:
    tree(tmp_path, "dog/b.png", "dog/a.JPG", "cat/deep/er/z.png", "cat/c.png", "dog/.hidden.png")
    put(tmp_path / "dog/notes.txt", "no image")
    put(tmp_path / ".git/x.png", encoded())
    source = open_source(tmp_path)
    assert source.target("label").classes == ("cat", "dog")
    assert source.splits == ("train",)
    assert triples(source) == [
        ("cat/c.png", 0, "train"),
        ("cat/deep/er/z.png", 0, "train"),
        ("dog/a.JPG", 1, "train"),
        ("dog/b.png", 1, "train"),
    ]
    assert source.open(0).getpixel((0, 0)) == (3, 252, 7)
    assert str(tmp_path) in source.description


def test_split_folders_are_named_and_ordered(tmp_path: Path) -> None:
    tree(tmp_path, "Testing/b/1.png", "validation/a/1.png", "train/c/1.png", "train/a/1.png")
    (tmp_path / "documents").mkdir()
    source = open_source(tmp_path)
    assert source.splits == ("train", "val", "test")
    assert source.target("label").classes == ("a", "b", "c")
    assert [row.key for row in source.rows] == [
        "train/a/1.png",
        "train/c/1.png",
        "validation/a/1.png",
        "Testing/b/1.png",
    ]


def test_classes_do_not_depend_on_the_splits_asked_for(tmp_path: Path) -> None:
    tree(tmp_path, "train/a/1.png", "train/b/1.png", "test/b/1.png")
    source = open_source(tmp_path, splits=("test",))
    assert source.target("label").classes == ("a", "b")
    assert triples(source) == [("test/b/1.png", 1, "test")]
    assert open_source(tmp_path, splits=("validation", "train")[1:]).splits == ("train",)


def test_classes_of_another_cache_number_the_folders(tmp_path: Path) -> None:
    tree(tmp_path, "b/1.png", "a/1.png")
    known = ("z", "b", "a")
    source = open_source(tmp_path, classes={"label": known})
    assert source.target("label").classes == known
    assert numbers_of(source) == [2, 1]
    fails(
        tmp_path, str(tmp_path / "b"), "'b'", "2 known classes: a, c", classes={"label": ("a", "c")}
    )


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    tree(tmp_path, "car/1.png", "train/1.png")
    assert open_source(tmp_path).target("label").classes == ("car", "train")


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    tree(tmp_path / "store", "x/1.png")
    (tmp_path / "set/a").mkdir(parents=True)
    (tmp_path / "set/a/linked").symlink_to(tmp_path / "store/x")
    (tmp_path / "set/a/circle").symlink_to(tmp_path / "set")
    assert [row.key for row in open_source(tmp_path / "set").rows] == ["a/linked/1.png"]


def test_folder_errors(tmp_path: Path) -> None:
    empty = tree(tmp_path / "1", "a/1.png", "b/.keep.png")
    fails(empty, str(empty / "b"), "holds no image", "remove it", ".jpg")
    stray = tree(tmp_path / "2", "a/1.png", "s.png")
    fails(stray, "1 images lie outside any class folder: s.png", "CSV")
    flat = tree(tmp_path / "3", "train/1.png", "test/2.png")
    fails(flat, str(flat / "test"), "no class folder")
    mixed = tree(tmp_path / "4", "train/a/1.png", "b/2.png")
    fails(mixed, "train look like splits", "b beside them", "CSV")
    twice = tree(tmp_path / "5", "val/a/1.png", "valid/a/1.png")
    fails(twice, "val and valid", "both mean the split 'val'")
    bare = tmp_path / "6"
    put(bare / "readme.md", "")
    fails(bare, "no images", "folder per class", "there is readme.md")
    split = tree(tmp_path / "7", "train/a/1.png", "val/a/1.png")
    fails(split, "no split test", "there is train, val", splits=("test",))


def test_a_folder_that_may_not_be_listed_is_no_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path, "a/1.png", "a/locked/2.png")
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refusing)
    fails(tmp_path, str(tmp_path / "a/locked"), "cannot be listed: Permission denied")


def test_photos_of_files_and_folders(tmp_path: Path) -> None:
    tree(tmp_path, "f/b.png", "f/a.png", "f/sub/c.png", "single.dat")
    put(tmp_path / "f/list.txt", "")
    found = photos([tmp_path / "single.dat", str(tmp_path / "f")])
    assert found == [
        tmp_path / name for name in ("single.dat", "f/a.png", "f/b.png", "f/sub/c.png")
    ]
    assert decode(found[0].read_bytes(), "single.dat", REPAIR_OR_SKIP).mode == "RGB"
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"empty: no image in this folder; looked for \.jpg"):
        photos([tmp_path / "empty"])
    with pytest.raises(SourceError, match=r"no such file or folder: .*no1, .*no2"):
        photos([tmp_path / "no1", tmp_path / "f", tmp_path / "no2"])
