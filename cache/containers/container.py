"""The seam between the format's two containers and everything else.

A cache is not compressed, so every slot is a fixed run of bytes at a computable place in some file.
A container lays the files out and answers where the bytes lie; it moves none of the bulk itself.
Reading, writing, checksums and order of publication are shared code on plain file descriptors.

A container object holds plain data only (paths, offsets, the document): no open file, no lock, no
handle of zarr or h5py. It may be pickled, forked and used by threads.

A slot of a stack is `(view, tap, token, stored width)` in C order. All offsets and lengths are
bytes.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from cache import files
from cache.containers.document import manifest_of, read_document
from cache.labelling import Labelling


@dataclass(frozen=True)
class Extent:
    """Where bytes begin: a file and an offset in it."""

    path: Path
    offset: int


@dataclass(frozen=True)
class ShardExtents:
    """Where the slots of one shard lie in one stack.

    offsets: int64 (slots of the shard, views), the place of `(tap, token, stored width)` of each
    slot and view; -1 where nothing is stored and the values are zeros.
    """

    path: Path
    offsets: np.ndarray


class Container(ABC):
    """One cache on the disk. `document` is in the words of today's version, `format_version` that
    in which it was written."""

    suffix: ClassVar[str]

    def __init__(self, path: Path, document: dict[str, Any]) -> None:
        self.path = path
        self.document = read_document(path, document)
        self.format_version: int = document["format_version"]
        self.manifest = manifest_of(self.document)
        self.labelling = Labelling.from_dict(self.document["labelling"])
        self.labelling_at: str = self.document["labelling_at"]

    @classmethod
    @abstractmethod
    def create(cls, path: Path, document: dict[str, Any], tables: Mapping[str, np.ndarray]) -> None:
        """Lay out an empty cache at `path` and make it durable; nobody else looks there yet."""

    @classmethod
    @abstractmethod
    def open(cls, path: Path) -> Self:
        """Read the layout of the cache at `path`. Raises CacheDamaged, FormatVersionError."""

    @abstractmethod
    def amend(self, document: dict[str, Any], tables: Mapping[str, np.ndarray]) -> Self:
        """Add the arrays that `document` has and the cache has not, then replace its document, in
        one durable step: killed anywhere, the cache has the old document or the new one. `tables`
        are the new ones' values. Returns the cache opened anew.

        What the old document called `former` is deleted.
        """

    def record_bytes(self, shard: int) -> int:
        """Length of a shard's ledger record."""
        part, _ = self.manifest.part_of(shard)
        return int(self.document["record_bytes"][part])

    @abstractmethod
    def table(self, name: str) -> Extent:
        """Where a table that `document["tables"]` lists lies, in C order, little endian."""

    @abstractmethod
    def record_place(self, shard: int) -> Extent:
        """Where the `record_bytes` of a ledger record lie; its file may be absent until then."""

    def record(self, shard: int) -> bytes | None:
        """The bytes of a ledger record; None, or zeros, when the shard is not done."""
        place = self.record_place(shard)
        try:
            return files.read_at(place.path, place.offset, self.record_bytes(shard))
        except FileNotFoundError:
            return None

    @abstractmethod
    def write_record(self, shard: int, record: bytes) -> None:
        """Replace a ledger record durably."""

    @abstractmethod
    def slots(self, stack: str, shard: int) -> ShardExtents:
        """Where a finished shard lies. Raises CacheDamaged when its file is missing or short."""

    @abstractmethod
    def begin(self, stack: str, shard: int) -> Extent:
        """Make room for a shard; its slots then follow each other from the extent on."""

    @abstractmethod
    def seal(self, stack: str, shard: int, fd: int, extent: Extent) -> bool:
        """Make a shard durable and visible, all its slots being written to `fd`, which is open at
        the `extent` that `begin` gave. False if another writer's is there: that one stays."""

    @abstractmethod
    def discard(self, stack: str, shard: int, extent: Extent) -> None:
        """Give up a shard that was begun and not sealed."""

    @abstractmethod
    def forget(self, shard: int) -> None:
        """Make a shard count as not begun, durably: its record and what it vouched for go."""

    @abstractmethod
    def sweep(self) -> None:
        """Delete what killed writers left unfinished."""
