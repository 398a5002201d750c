"""Images inside uncompressed tars, each read at its offset: nothing is unpacked or stays open.

A tar of images in class folders, or of tars of those, is listed as timm's ReaderImageInTar does it,
in the same order and with the same classes; webdataset's shards are tars too (`shards`).
"""

from __future__ import annotations

import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tarfile import TarInfo
from typing import NamedTuple

from pipeline.errors import ImageError, SourceError
from pipeline.sources.samples import Sample, as_source_error, rows_and_target
from pipeline.sources.source import Source
from pipeline.sources.splits import SPLIT_NAMES, select_splits
from pipeline.sources.spool import Spool

SUFFIXES = {".jpg", ".jpeg", ".png"}  # what timm takes for images


class Span(NamedTuple):
    """`size` bytes at `offset` of `file`."""

    file: str
    offset: int
    size: int


@dataclass(frozen=True, kw_only=True, eq=False)
class SpanSource(Source):
    """Images that are spans of files, read without tarfile: forks are safe."""

    spans: Sequence[Span]
    spool: Spool | None = None

    def where(self, index: int) -> str:
        """The tar and its member."""
        return f"{self.description}, member {self.rows[index].key}"

    def read(self, index: int) -> bytes:
        """The member's bytes. Raises ImageError if the file is not there, or ends before them."""
        span = self.spans[index]
        try:
            with Path(span.file).open("rb") as file:
                file.seek(span.offset)
                data = file.read(span.size)
        except (FileNotFoundError, PermissionError) as error:
            raise ImageError(f"{self.where(index)}: {error}. {self.advice}") from error
        if len(data) < span.size:
            raise ImageError(
                f"{self.where(index)}: {span.file} ends {span.size - len(data)} bytes too early. "
                f"{self.advice}"
            )
        return data


def open_tar(
    path: Path, splits: tuple[str, ...] | None, classes: tuple[str, ...] | None
) -> SpanSource:
    """A tar of images (or of tars of images): class = innermost folder, as timm has it.

    timm lists .jpg, .jpeg and .png alone and knows no splits in a tar; here a folder train/, val/
    or test/ right above every class folder is the split. Hidden files are left out. Raises
    SourceError for what is no such tar, or has images outside of its split folders.
    """
    what = f"tar {path}"
    with as_source_error(f"{what}, looking for .jpg, .jpeg and .png"):
        found = sorted(_images_in(path), key=lambda image: _natural(image[0].name))
        if not found:
            raise LookupError("there is none")
    labels = [_label(*image) for image in found]
    names = tuple(sorted(sorted(set(labels)), key=_natural))
    samples = [
        _sample(path, info, inner, label)
        for (info, inner), label in zip(found, labels, strict=True)
        if not PurePosixPath(info.name).name.startswith(".")
    ]
    samples = _one_layout(samples, path)
    kept = select_splits((sample.split for sample in samples), splits, what)
    samples = [sample for sample in samples if sample.split in kept]
    rows, targets = rows_and_target(samples, names, classes, what)
    spans = [sample.place for sample in samples]
    return SpanSource(rows=rows, targets=targets, description=what, spans=spans)


def _images_in(path: Path) -> Iterator[tuple[TarInfo, TarInfo | None]]:
    """Images and the inner tar that each lies in; those first, and tars inside of them not."""
    with tarfile.open(path, "r:") as tar:
        infos = [info for info in tar if info.isfile()]
        for inner in infos:
            if PurePosixPath(inner.name).suffix.lower() == ".tar":
                with tarfile.open(fileobj=tar.extractfile(inner), mode="r:") as members:
                    yield from ((info, inner) for info in members if _is_image(info))
        yield from ((info, None) for info in infos if _is_image(info))


def _is_image(info: TarInfo) -> bool:
    return info.isfile() and PurePosixPath(info.name).suffix.lower() in SUFFIXES


def _label(info: TarInfo, inner: TarInfo | None) -> str:
    """The innermost folder; the inner tar counts as the outermost."""
    tar = "" if inner is None else PurePosixPath(inner.name).stem
    return posixpath.join(tar, posixpath.dirname(info.name)).strip("/").rpartition("/")[2]


def _natural(name: str) -> list[int | str]:
    """To sort 2 before 10, as timm does."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def _sample(path: Path, info: TarInfo, inner: TarInfo | None, label: str) -> Sample:
    name, key, offset = PurePosixPath(info.name), PurePosixPath(info.name), info.offset_data
    if inner is not None:
        key = PurePosixPath(inner.name) / name
        name = PurePosixPath(inner.name).with_suffix("") / name
        offset += inner.offset_data
    folder = name.parts[-3].casefold() if len(name.parts) > 2 else ""  # above the class folder
    return Sample(
        key=key.as_posix(),
        label=label,
        split=SPLIT_NAMES.get(folder, ""),
        place=Span(str(path), offset, info.size),
    )


def _one_layout(samples: list[Sample], path: Path) -> list[Sample]:
    """All in split folders, or all "train"."""
    outside = [sample for sample in samples if not sample.split]
    if 0 < len(outside) < len(samples):
        raise SourceError(
            f"tar {path}: some images lie in split folders, but {len(outside)} do not, such as "
            f"{outside[0].key}; unpack it and list the images in a CSV with path,label,split"
        )
    labels = {sample.label.casefold() for sample in samples}
    if outside and labels <= SPLIT_NAMES.keys():
        raise SourceError(
            f"tar {path}: the images lie right in {', '.join(sorted(labels))}; expected a folder "
            "per class there"
        )
    return [sample._replace(split=sample.split or "train") for sample in samples]
