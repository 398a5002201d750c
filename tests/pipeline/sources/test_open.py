"""What is there decides how it is read; what is no source."""

from __future__ import annotations

from pathlib import Path

import pytest
from image_files import fails, put, tar_of, tree

from pipeline.errors import ImageError
from pipeline.sources.open import open_source, opener


def test_what_is_no_source(tmp_path: Path) -> None:
    fails(tmp_path / "none", "none: nothing there", "folder per class", "hfds/…")
    fails(put(tmp_path / "x.zip", "x"), "x.zip: a file of another kind", ".tar")
    tree(tmp_path, "a/1.png")
    for option in ({"data_dir": "/data"}, {"input_key": "img"}, {"download": True}):
        fails(tmp_path, "--data-dir, --input-key", "timm dataset strings", "leave them", **option)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("hfds/x", "pip install datasets"),
        ("hfids/x", "pip install datasets"),
        ("wds/x", "pip install webdataset"),
        ("tfds/x", "pip install tensorflow tensorflow-datasets"),
    ],
)
def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    fails(name, name, command)


def test_who_cannot_skip_images_is_not_told_to(tmp_path: Path) -> None:
    """`evaluate`, `report` and `predict` have no --on-error."""
    tar = tar_of(tmp_path / "t.tar", {"a/1.png": b"bad"})
    put(tmp_path / "set/a/1.png", b"bad")
    for images in (tar, tmp_path / "set"):
        open_images = opener(str(images))
        assert open_images is not None
        with pytest.raises(ImageError, match=r"not an image.*Repair or remove the file$"):
            open_images(splits=("train",)).open(0)
        with pytest.raises(ImageError, match=r"not an image.*with --on-error skip$"):
            open_source(images).open(0)
