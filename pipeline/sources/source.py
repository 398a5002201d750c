"""A source: rows in a fixed order, what is to be predicted of them, and the bytes of each.

`pipeline.sources.open` opens the kinds that there are; one kind is one file beside this one. A
source holds no open files: it can be pickled, and used from threads and forks.

What this file does not know: how bytes become an image, tensors, transforms, backbones.
"""

from __future__ import annotations

import errno
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import ImageError, SettingError, SourceError, some
from pipeline.sources.splits import MOST_SPLITS, in_order

if TYPE_CHECKING:
    from PIL import Image

OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # not the image's fault
REPAIR = "Repair or remove the file"
REPAIR_OR_SKIP = f"{REPAIR}, or leave such rows out with --on-error skip"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One image: `key` is its path relative to the root (posix, unique)."""

    key: str
    split: str


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetColumn:
    """One target and its value for every row: what a cache keeps as a Target and its table.

    values, in order of rows: kind "class": class index, int64 (N,), -1 if unknown; "multilabel":
    1 where a class applies, else 0, int8 (N, C), -1 throughout if unknown; "regression": float32
    (N,), NaN if unknown, and no classes.
    """

    name: str
    kind: str
    classes: tuple[str, ...]
    values: np.ndarray

    def take(self, rows: Sequence[int]) -> TargetColumn:
        """That of some rows, in the order given."""
        return replace(self, values=self.values[np.asarray(rows, np.int64)])


@dataclass(frozen=True, kw_only=True, eq=False)
class Source(ABC):
    """Images in a fixed order; a subclass says how the encoded bytes of one are read.

    `advice` is what an ImageError of one image ends in. Raises SourceError without any row, with
    more splits than a cache tells apart, and for keys that occur twice or are not UTF-8.
    """

    rows: Sequence[Row]
    targets: tuple[TargetColumn, ...] = ()
    description: str
    advice: str = REPAIR_OR_SKIP

    def __post_init__(self) -> None:
        if not self.rows:
            raise SourceError(f"{self.description}: no images")
        if len(self.splits) > MOST_SPLITS:
            raise SourceError(
                f"{self.description}: {len(self.splits)} splits ({some(self.splits)}); expected at "
                f"most {MOST_SPLITS}, such as train, val and test. Is the column another one?"
            )
        assert all(len(target.values) == len(self.rows) for target in self.targets)
        seen: set[str] = set()
        for row in self.rows:
            if row.key in seen:
                raise SourceError(f"{self.description}: {row.key} occurs twice; keep one of them")
            if not row.key.isprintable() and not _is_utf8(row.key):
                raise SourceError(f"{self.description}: the name {row.key!r} is not UTF-8")
            seen.add(row.key)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """In order of appearance, but train, val and test first."""
        return in_order(row.split for row in self.rows)

    def target(self, name: str) -> TargetColumn:
        """The target of that name. Raises SourceError listing those there are."""
        for target in self.targets:
            if target.name == name:
                return target
        names = some([target.name for target in self.targets], 10)
        raise SourceError(f"{self.description}: no target {name!r}; there is {names}")

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded bytes of one image; ImageError if they cannot be had."""

    def where(self, index: int) -> str:
        """How messages name one image."""
        return self.rows[index].key

    def open(self, index: int) -> Image.Image:
        """One image, decoded, RGB; ImageError names the file, the reason and what to do."""
        from pipeline.sources.decode import decode  # labels alone need no Pillow

        return decode(self.read(index), self.where(index), self.advice)

    def sha256(self, index: int) -> bytes:
        """32 bytes, of the file as it is stored (of size and pixels where there is no file)."""
        return hashlib.sha256(self.read(index)).digest()


@dataclass(frozen=True, kw_only=True, eq=False)
class FileSource(Source):
    """One file per image; `paths` in order of rows."""

    paths: Sequence[str]

    def where(self, index: int) -> str:
        """The file."""
        return self.paths[index]

    def read(self, index: int) -> bytes:
        """The file's bytes. Raises ImageError, but OSError where the process is out of files."""
        try:
            return Path(self.paths[index]).read_bytes()
        except FileNotFoundError:
            reason = "no such file"
        except OSError as error:
            if error.errno in OUT_OF_RESOURCES:
                raise
            reason = f"cannot be read: {error.strerror}"
        raise ImageError(f"{self.where(index)}: {reason}. {self.advice}")


def source_digests(
    source: Source,
    *,
    threads: int = 8,
    on_error: str = "raise",
    report: Callable[[int, int], object] | None = None,
    see: Callable[[bytes], object] | None = None,
) -> np.ndarray:
    """SHA-256 of every row, (N, 32) uint8, in order of rows; `report(done, total)` now and then.

    `see` gets the bytes of each, in any thread. An unreadable file raises ImageError; with
    `on_error="skip"` its row is 32 zero bytes. A file that can be read but not decoded has a digest
    like any other.
    """
    if on_error not in ("raise", "skip"):
        raise SettingError(f"on_error is {on_error!r}; expected 'raise' or 'skip'")
    total = len(source.rows)
    digests = np.zeros((total, 32), np.uint8)
    step = 64  # rows per task: a future for each of a million rows would cost a gigabyte

    def fill(start: int) -> int:
        stop = min(start + step, total)
        for index in range(start, stop):
            try:
                data = source.read(index)
            except ImageError:
                if on_error == "raise":
                    raise
                continue
            digests[index] = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
            if see is not None:
                see(data)
        return stop

    with ThreadPoolExecutor(threads) as pool:
        for done in pool.map(fill, range(0, total, step)):
            if report is not None:
                report(done, total)
    return digests


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
