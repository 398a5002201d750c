"""What is there decides how it is read; what is no source."""

from __future__ import annotations

from pathlib import Path

import pytest
from image_files import fails, put, tree


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
