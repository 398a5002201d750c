"""The seam between the format's two containers and everything else.

A cache is not compressed, so every row is a fixed run of bytes at a computable place in some file.
A backend lays the files out and answers where the bytes lie; it moves none of the bulk itself.
Reading, writing, checksums and order of publication are shared code on plain file descriptors.

A backend object holds plain data only (paths, offsets, the document): no open file, no lock, no
handle of zarr or h5py. It may be pickled, forked and used by threads.

A row of a stack is `(view, tap, token, stored width)` in C order. All offsets and lengths are
bytes.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import xxhash

from cache import files
from cache.errors import CacheDamaged
from cache.manifest import FORMAT_VERSION, Manifest, canonical_json


@dataclass(frozen=True)
class Extent:
    """Where bytes begin: a file and an offset in it."""

    path: Path
    offset: int


@dataclass(frozen=True)
class ShardExtents:
    """Where the rows of one shard lie in one stack.

    offsets: int64 (rows of the shard, views), the place of `(tap, token, stored width)` of each
    row and view; -1 where nothing is stored and the values are zeros.
    """

    path: Path
    offsets: np.ndarray


class Backend(ABC):
    """One container of one cache."""

    suffix: ClassVar[str]

    def __init__(self, path: Path, document: dict[str, Any]) -> None:
        self.path = path
        self.document = check_document(path, document)
        self.manifest = manifest_of(document)
        self.record_bytes = int(document["record_bytes"])

    @classmethod
    @abstractmethod
    def create(cls, path: Path, document: dict[str, Any], tables: Mapping[str, np.ndarray]) -> None:
        """Lay out an empty cache at `path` and make it durable; nobody else looks there yet."""

    @classmethod
    @abstractmethod
    def open(cls, path: Path) -> Self:
        """Read the layout of the cache at `path`. Raises CacheDamaged, FormatVersionError."""

    @abstractmethod
    def table(self, name: str) -> Extent:
        """Where a table that `document["tables"]` lists lies, in C order, little endian."""

    @abstractmethod
    def record_place(self, shard: int) -> Extent:
        """Where `record_bytes` of a ledger record lie; the file may be absent until it is done."""

    def record(self, shard: int) -> bytes | None:
        """The bytes of a ledger record; None, or zeros, when the shard is not done."""
        place = self.record_place(shard)
        try:
            return files.read_at(place.path, place.offset, self.record_bytes)
        except FileNotFoundError:
            return None

    @abstractmethod
    def write_record(self, shard: int, record: bytes) -> None:
        """Replace a ledger record durably."""

    @abstractmethod
    def rows(self, stack: str, shard: int) -> ShardExtents:
        """Where a finished shard lies. Raises CacheDamaged when its file is missing or short."""

    @abstractmethod
    def begin(self, stack: str, shard: int) -> Extent:
        """Make room for a shard; its rows then follow each other from the extent on."""

    @abstractmethod
    def seal(self, stack: str, shard: int, fd: int, extent: Extent) -> bool:
        """Make a shard durable and visible, all its rows being written to `fd`, which is open at
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


_BESIDE_MANIFEST = ("fingerprint", "record_bytes", "tables", "check")


def make_document(
    manifest: Manifest, tables: Mapping[str, np.ndarray], record_bytes: int
) -> dict[str, Any]:
    """The JSON document that both containers keep: manifest, table list, checksum of itself."""
    document = {
        **manifest.to_dict(),
        "fingerprint": manifest.fingerprint,
        "record_bytes": record_bytes,
        "tables": {
            name: {
                "dtype": table.dtype.str,
                "shape": list(table.shape),
                "xxh3_128": xxhash.xxh3_128_hexdigest(table.tobytes()),
            }
            for name, table in tables.items()
        },
    }
    return document | {"check": _check(document)}


def manifest_of(document: dict[str, Any]) -> Manifest:
    """The manifest inside the document. Raises CacheDamaged, FormatVersionError."""
    return Manifest.from_dict(
        {key: value for key, value in document.items() if key not in _BESIDE_MANIFEST}
    )


def check_document(path: Path, document: Any) -> dict[str, Any]:
    """Return the document if it is one. Raises CacheDamaged naming the file."""
    if not isinstance(document, dict) or "format_version" not in document:
        raise CacheDamaged(f"{path} holds no sidecache manifest: not a cache, or damaged")
    if document["format_version"] == FORMAT_VERSION and document.get("check") != _check(document):
        raise CacheDamaged(f"{path}: the manifest does not match its own checksum")
    return document


def _check(document: dict[str, Any]) -> str:
    text = canonical_json({key: document[key] for key in document if key != "check"})
    return xxhash.xxh3_128_hexdigest(text.encode())
