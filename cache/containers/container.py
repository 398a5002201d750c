"""The seam between the format's two containers and everything else.

A cache is not compressed, so every slot is a fixed run of bytes at a computable place in some
object of the store. A container lays the objects out and answers where the bytes lie; it moves none
of the bulk itself. Reading, writing, checksums and order of publication are shared code.

A container holds plain data only (names, offsets, the document): no lock, no handle of zarr or
h5py. It may be pickled, forked and used by threads.

A slot of a stack is `(view, tap, token, stored width)` in C order. All offsets and lengths are
bytes.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from cache.containers.document import manifest_of, read_document
from cache.labelling import Labelling
from cache.stores.store import Draft, Store


@dataclass(frozen=True)
class Extent:
    """Where bytes begin: an object's name and an offset in it."""

    name: str
    offset: int


@dataclass(frozen=True)
class ShardExtents:
    """Where the slots of one shard lie in one stack.

    offsets: int64 (slots of the shard, views), the place of `(tap, token, stored width)` of each
    slot and view; -1 where nothing is stored and the values are zeros.
    """

    name: str
    offsets: np.ndarray


class Container(ABC):
    """One cache in a store, `name` there. `document` is in the words of today's version,
    `format_version` that in which it was written; `where` is what people call the place."""

    suffix: ClassVar[str]

    def __init__(self, store: Store, name: str, document: dict[str, Any]) -> None:
        self.store, self.name, self.where = store, name, store.where(name)
        self.document = read_document(self.where, document)
        self.format_version: int = document["format_version"]
        self.manifest = manifest_of(self.document)
        self.labelling = Labelling.from_dict(self.document["labelling"])
        self.labelling_at: str = self.document["labelling_at"]

    @classmethod
    @abstractmethod
    def create(
        cls, store: Store, name: str, document: dict[str, Any], tables: Mapping[str, np.ndarray]
    ) -> None:
        """Lay out an empty cache; what makes it one comes last. Raises FileExistsError."""

    @classmethod
    @abstractmethod
    def open(cls, store: Store, name: str) -> Self:
        """Read the layout of the cache. Raises CacheDamaged, FormatVersionError."""

    @classmethod
    @abstractmethod
    def was_one(cls, store: Store, name: str) -> bool:
        """Whether what cannot be opened looks like a cache that was damaged."""

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
        """Where the `record_bytes` of a ledger record lie; the object may be absent until then."""

    def record(self, shard: int) -> bytes | None:
        """The bytes of a ledger record; None, or zeros, when the shard is not done."""
        place = self.record_place(shard)
        try:
            return self.store.read(place.name, place.offset, self.record_bytes(shard))
        except FileNotFoundError:
            return None

    @abstractmethod
    def write_record(self, shard: int, record: bytes) -> None:
        """Replace a ledger record durably."""

    @abstractmethod
    def slots(self, stack: str, shard: int) -> ShardExtents:
        """Where a finished shard lies. Raises CacheDamaged when its object is missing or short."""

    @abstractmethod
    def begin(self, stack: str, shard: int) -> Draft:
        """Make room for a shard; its slots follow each other from the draft's beginning."""

    @abstractmethod
    def seal(self, stack: str, shard: int, draft: Draft) -> bool:
        """Make a shard durable and visible, all its slots being written to the draft. False if
        another writer's is there: that one stays."""

    @abstractmethod
    def forget(self, shard: int) -> None:
        """Make a shard count as not begun, durably: its record and what it vouched for go."""

    @abstractmethod
    def sweep(self) -> None:
        """Delete what killed writers left unfinished."""
