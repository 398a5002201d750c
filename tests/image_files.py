"""Small image files, folders and tars of them, and what tests of sources ask again and again."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import SourceError
from pipeline.sources.open import open_source
from pipeline.sources.source import Source


def encoded(value: int = 0, kind: str = "PNG", mode: str = "RGB", size: int = 8) -> bytes:
    stream = io.BytesIO()
    colour = (value, 255 - value, 7) if mode == "RGB" else value
    Image.new(mode, (size, size), colour).save(stream, kind)
    return stream.getvalue()


def noise(kind: str) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def tree(root: Path, *names: str) -> Path:
    """A small image under every name, each of another colour."""
    for number, name in enumerate(names):
        put(root / name, encoded(number))
    return root


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def fails(images: object, *fragments: str, error: type[Exception] = SourceError, **options) -> None:
    """Opening `images` raises `error`, and its message holds every fragment."""
    with pytest.raises(error) as caught:
        open_source(images, **options)  # type: ignore[arg-type]
    says(caught.value, *fragments)


def says(error: BaseException, *fragments: str) -> None:
    for fragment in fragments:
        assert fragment in str(error), f"{fragment!r} is not in: {error}"


def triples(source: Source) -> list[tuple[str, int, str]]:
    numbers = numbers_of(source)
    return [(row.key, n, row.split) for row, n in zip(source.rows, numbers, strict=True)]


def numbers_of(source: Source) -> list[int]:
    return source.target("label").values.tolist()
