"""A cache as a Zarr v3 folder.

zarr makes the metadata of the arrays, in memory; everything is written by the store. A shard of a
stack is one object, written here exactly as the `sharding_indexed` codec would (slots one after
another, then the index of `(offset, nbytes)` pairs and its CRC32C), and a ledger record is one
object. Reading needs the JSON metadata and the indices alone, so it does not load zarr, which keeps
a thread of its own that would not survive a fork. Knows nothing about the order of publication.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any, Self

import numpy as np

from cache.containers.container import Container, Extent, ShardExtents
from cache.containers.document import arrays_of, below, in_part, manifest_of
from cache.encoding import bytes_of
from cache.errors import CacheDamaged
from cache.manifest import Manifest
from cache.stores.store import Bytes, Draft, Store

EMPTY = np.uint64(2**64 - 1)  # in an index: no such chunk, its values are the fill value
DIMENSIONS = ["row", "view", "tap", "token", "dim"]
METADATA = "zarr.json"

_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_NO_ENDIAN = {"name": "bytes"}  # the same codec where a number is one byte
_INDEX_CODECS = [_BYTES, {"name": "crc32c"}]


class ZarrContainer(Container):
    """A folder of plain objects behind Zarr metadata."""

    suffix = ".zarr"

    @classmethod
    def create(
        cls, store: Store, name: str, document: dict[str, Any], tables: Mapping[str, np.ndarray]
    ) -> None:
        """Lay out the folder; the metadata of its root come last."""
        contents = _contents(document, [name for name, _, _ in arrays_of(document)], tables)
        root = contents.pop(METADATA)
        store.write_new({below(name, each): data for each, data in contents.items()})
        if not store.publish_new(below(name, METADATA), root):
            raise FileExistsError(f"{store.where(name)} exists")

    @classmethod
    def open(cls, store: Store, name: str) -> Self:
        """Read and check the metadata; no shard is touched."""
        while True:
            document = _metadata(store, name).get("attributes", {}).get("sidecache")
            try:
                return cls._checked(store, name, document)
            except CacheDamaged:
                if _metadata(store, name).get("attributes", {}).get("sidecache") == document:
                    raise  # else it was replaced meanwhile, and what it spoke of deleted

    @classmethod
    def was_one(cls, store: Store, name: str) -> bool:
        """Whether its root speaks of a document."""
        root = below(name, METADATA)
        return store.exists(root) and b'"sidecache"' in store.read(root)

    @classmethod
    def _checked(cls, store: Store, name: str, document: Any) -> Self:
        try:
            container = cls(store, name, document)
        except CacheDamaged as error:
            where, root = store.where(name), store.where(below(name, METADATA))
            raise CacheDamaged(str(error).replace(where, root, 1)) from None
        manifest = container.manifest
        for part, slots in enumerate(manifest.parts):
            for stack in manifest.stacks:
                folder = container._at(in_part(part, f"stacks/{stack.name}"))
                _check_layout(store, folder, manifest, stack.name, slots)
        for table, entry in container.document["tables"].items():
            codecs = _metadata(store, container._at(table)).get("codecs")
            if codecs not in ([_BYTES], [_NO_ENDIAN]) or 0 in entry["shape"]:
                what = ("codecs", [_BYTES], codecs)
                raise CacheDamaged(_rewritten(store, container._at(table), *what))
        return container

    def amend(self, document: dict[str, Any], tables: Mapping[str, np.ndarray]) -> Self:
        """New arrays under names that nothing speaks of yet; then the document, in one step."""
        there = {name for name, _, _ in arrays_of(self.document)}
        new = [name for name, _, _ in arrays_of(document) if name not in there]
        for name in new:
            self.store.delete_below(self._at(name))  # what a killed change left there
        contents = {self._at(name): d for name, d in _contents(document, new, tables).items()}
        groups = {name for name in contents if name.endswith(METADATA)}
        for name in groups - {self._at(below(array, METADATA)) for array in new}:
            if self.store.exists(name):
                del contents[name]
        self.store.write_new(contents)
        metadata = _metadata(self.store, self.name)
        metadata["attributes"]["sidecache"] = document
        text = json.dumps(metadata, indent=2, allow_nan=False).encode()
        self.store.replace(self._at(METADATA), text, waiting=self._at("ledger"))
        amended = type(self).open(self.store, self.name)
        amended._delete_unknown(set(self.document["former"]) - set(document["former"]))
        return amended

    def _delete_unknown(self, gone: Collection[str]) -> None:
        """Delete arrays of former documents, and what killed changes have left."""
        for name in gone:
            self.store.delete_below(self._at(name))
            self._delete_empty_groups(name.rpartition("/")[0])
        known = [*(name for name, _, _ in arrays_of(self.document)), *self.document["former"]]
        for folder in ("labellings/", "updates/"):
            for inner in self.store.names(self._at(folder)):
                inside = f"{folder}{inner}"
                if inner.endswith("/") and not any(name.startswith(inside) for name in known):
                    self.store.delete_below(self._at(inside))

    def _delete_empty_groups(self, folder: str) -> None:
        if folder and self.store.names(self._at(folder)) in ([], [METADATA]):
            self.store.delete_below(self._at(folder))
            self._delete_empty_groups(folder.rpartition("/")[0])

    def table(self, name: str) -> Extent:
        """The one chunk of the table."""
        axes = len(self.document["tables"][name]["shape"])
        return Extent(self._at(_chunk(name, axes)), 0)

    def record_place(self, shard: int) -> Extent:
        """The record's chunk."""
        part, local = self.manifest.part_of(shard)
        return Extent(self._at(in_part(part, f"ledger/c/{local}/0")), 0)

    def write_record(self, shard: int, record: bytes) -> None:
        """Replace the record's chunk."""
        place = self.record_place(shard)
        self.store.replace(place.name, record, waiting=place.name.rsplit("/", 3)[0])

    def slots(self, stack: str, shard: int) -> ShardExtents:
        """Read and check the index of the shard's object."""
        name, length = self._shard(stack, shard), self._index_bytes()
        slots, views = len(self.manifest.shard_slots(shard)), self.manifest.views
        where = self.store.where(name)
        try:
            size = self.store.size(name)
            stored = self.store.read(name, max(0, size - length), length)
        except FileNotFoundError as error:
            raise CacheDamaged(
                f"{where} is missing, the ledger says it was written", where
            ) from error
        index, check = stored[:-4], stored[-4:]
        if len(stored) < length or check != _crc32c(index):
            raise CacheDamaged(
                f"{where}: the index at its end is damaged, or the file was cut", where
            )
        pairs = np.frombuffer(index, "<u8").reshape(-1, 2)[: slots * views]
        offsets, lengths = pairs[:, 0], pairs[:, 1]
        empty = (offsets == EMPTY) & (lengths == EMPTY)
        expected = self._chunk_bytes(stack)
        fits = (lengths == expected) & (offsets <= max(0, size - length - expected))
        if not (fits | empty).all():
            raise CacheDamaged(
                f"{where}: its index points to chunks that are not {expected} bytes inside the "
                "file",
                where,
            )
        places = np.where(empty, EMPTY, offsets).astype(np.int64)  # EMPTY becomes -1
        return ShardExtents(name, places.reshape(slots, views))

    def begin(self, stack: str, shard: int) -> Draft:
        """Begin an object of the shard's full length."""
        name = self._shard(stack, shard)
        size = self._data_bytes(stack, shard) + self._index_bytes()
        return self.store.begin(name, size, waiting=name.rsplit("/", 6)[0])

    def seal(self, stack: str, shard: int, draft: Draft) -> bool:
        """Append the index and publish.

        A whole object under that name is another writer's and stays: what has a name is never
        replaced, so that any record written since then speaks of it.
        """
        chunk, data = self._chunk_bytes(stack), self._data_bytes(stack, shard)
        chunks = self.manifest.slots_per_shard * self.manifest.views
        pairs = np.full((chunks, 2), EMPTY, "<u8")
        written = data // chunk
        pairs[:written, 0] = np.arange(written, dtype=np.uint64) * np.uint64(chunk)
        pairs[:written, 1] = chunk
        index = pairs.tobytes()
        draft.write(memoryview(index + _crc32c(index)), data)
        if draft.publish():
            return True
        try:
            self.slots(stack, shard)
        except CacheDamaged:  # no writer publishes that: it was cut, or half deleted
            draft.overwrite()
            return True
        return False

    def forget(self, shard: int) -> None:
        """Delete the shard's objects, then its record: killed in between, it is damaged as before,
        and an object that stayed would be taken for another writer's."""
        for stack in self.manifest.stacks:
            self.store.delete(self._shard(stack.name, shard))
        self.store.delete(self.record_place(shard).name)

    def sweep(self) -> None:
        """Delete the unfinished objects that nobody writes any more."""
        for part in range(len(self.manifest.parts)):
            for name in ("ledger", *(f"stacks/{stack.name}" for stack in self.manifest.stacks)):
                self.store.sweep(self._at(in_part(part, name)))

    def _at(self, name: str) -> str:
        """The store's name of what has a name in the cache."""
        return below(self.name, name)

    def _shard(self, stack: str, shard: int) -> str:
        part, local = self.manifest.part_of(shard)
        return self._at(in_part(part, f"stacks/{stack}/c/{local}/0/0/0/0"))

    def _chunk_bytes(self, stack: str) -> int:
        return self.manifest.stack_slot_nbytes(stack) // self.manifest.views

    def _data_bytes(self, stack: str, shard: int) -> int:
        return len(self.manifest.shard_slots(shard)) * self.manifest.stack_slot_nbytes(stack)

    def _index_bytes(self) -> int:
        return self.manifest.slots_per_shard * self.manifest.views * 16 + 4


def _contents(
    document: dict[str, Any], names: Collection[str], tables: Mapping[str, np.ndarray]
) -> dict[str, Bytes]:
    """The objects of those arrays that `names` lists: metadata, also of the groups above, and the
    one chunk of each table."""
    contents: dict[str, Bytes] = {**_layout(document, names)}
    return contents | {_chunk(n, table.ndim): bytes_of(table) for n, table in tables.items()}


def _layout(document: dict[str, Any], names: Collection[str]) -> dict[str, bytes]:
    """The metadata files of those arrays that `names` lists, and of the groups above them."""
    import zarr
    from zarr.storage import MemoryStore

    made: dict[str, Any] = {}
    attributes = {"sidecache": document}
    root = zarr.create_group(MemoryStore(made), zarr_format=3, attributes=attributes)
    manifest = manifest_of(document)
    plain: dict[str, Any] = {"compressors": None, "filters": None, "fill_value": 0}
    for name, shape, dtype in arrays_of(document):
        if name not in names:
            continue
        if name in document["tables"]:  # one file a table
            root.create_array(name, shape=shape, dtype=dtype, chunks=shape, **plain)
        elif len(shape) == 2:  # a ledger: one file a record
            root.create_array(name, shape=shape, dtype=dtype, chunks=(1, shape[1]), **plain)
        else:
            root.create_array(
                name,
                shape=shape,
                dtype=dtype,
                shards=(manifest.slots_per_shard, *shape[1:]),
                chunks=(1, 1, *shape[2:]),
                dimension_names=DIMENSIONS,
                **plain,
            )
    return {key: metadata.to_bytes() for key, metadata in made.items()}


def _chunk(name: str, axes: int) -> str:
    """The one chunk file of a table."""
    return "/".join([name, "c", *["0"] * axes])


def _metadata(store: Store, folder: str) -> dict[str, Any]:
    name = below(folder, METADATA)
    try:
        document = json.loads(store.read(name))
    except FileNotFoundError as error:
        raise CacheDamaged(
            f"{store.where(name)} is missing: not a sidecache cache, or damaged"
        ) from error
    except ValueError as error:
        raise CacheDamaged(f"{store.where(name)} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise CacheDamaged(f"{store.where(name)} is not a JSON object")
    return document


def _check_layout(store: Store, folder: str, manifest: Manifest, stack: str, slots: int) -> None:
    """Refuse an array that another tool has rewritten with other chunks or codecs."""
    metadata, shape = _metadata(store, folder), manifest.stored_shape(stack)
    codecs = metadata.get("codecs") or [{}]
    sharding = codecs[0].get("configuration", {})
    inner = sharding.get("codecs")
    if manifest.dtype.itemsize == 1 and inner == [_NO_ENDIAN]:
        inner = [_BYTES]
    expected: dict[str, Any] = {
        "shape": [slots, manifest.views, *shape],
        "shard": [manifest.slots_per_shard, manifest.views, *shape],
        "chunk": [1, 1, *shape],
        "codecs": ["sharding_indexed", [_BYTES], _INDEX_CODECS, "end"],
    }
    found = {
        "shape": metadata.get("shape"),
        "shard": metadata.get("chunk_grid", {}).get("configuration", {}).get("chunk_shape"),
        "chunk": sharding.get("chunk_shape"),
        "codecs": [
            codecs[0].get("name"),
            inner,
            sharding.get("index_codecs"),
            sharding.get("index_location", "end"),
        ],
    }
    for name in expected:
        if found[name] != expected[name]:
            raise CacheDamaged(_rewritten(store, folder, name, expected[name], found[name]))


def _rewritten(store: Store, folder: str, what: str, expected: object, found: object) -> str:
    return (
        f"{store.where(below(folder, METADATA))}: {what} {found}, expected {expected}: "
        "damaged, or rewritten by another tool"
    )


def _crc32c(data: bytes) -> bytes:
    import google_crc32c

    return google_crc32c.value(data).to_bytes(4, "little")
