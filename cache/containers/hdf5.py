"""A cache as one HDF5 file.

h5py lays the file out: every dataset contiguous and allocated before any data exist, so the place
of every byte is known and the bulk never passes through the library. The format is the oldest one
(superblock 0), which has no "open for writing" mark that a crash would leave behind.

Nor does the library ever touch the file: it works on an `Overlay`, and what it would write is
written by the store. When the document is replaced (`amend`) these are many small places that
belong together: one `Change`. Numbers that were there are never moved.

The stacks come last in the file: a file that was cut short loses rows, not the manifest.
"""

import functools
import json
import time
from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np

from cache.containers.container import Container, Extent, ShardExtents
from cache.containers.document import arrays_of, in_part
from cache.containers.overlay import Overlay
from cache.documents import canonical_json
from cache.encoding import bytes_of
from cache.errors import CacheDamaged, CacheError, CacheLocked, LocationError
from cache.stores.store import Change, Draft, InPlace, Room, Store

WAIT_SECONDS = 10.0  # for a change of the document, which takes milliseconds
_OLDEST = ("earliest", "v110")
_END_AT = 40  # where superblock 0 says, in 8 bytes, where the file ends


class Hdf5Container(Container):
    """One file of contiguous datasets, in a store that writes in place."""

    suffix = ".h5"

    def __init__(
        self, store: Store, name: str, document: dict[str, Any], offsets: dict[str, int]
    ) -> None:
        super().__init__(store, name, document)
        self._offsets = offsets  # dataset name: where its first byte lies

    @classmethod
    def create(
        cls, store: Store, name: str, document: dict[str, Any], tables: Mapping[str, np.ndarray]
    ) -> None:
        """Lay out the file."""
        import h5py

        overlay = Overlay(lambda offset, length: b"", 0)
        with h5py.File(overlay, "w", libver=_OLDEST) as file:
            _write_document(file, document)
            places = _allocate(file, arrays_of(document))
        room = _in_place(store, name).room(name, new=True)
        try:
            for offset, data in overlay.writes:
                room.write(memoryview(data), offset)
            _write_tables(room, tables, places)
            room.resize(overlay.size)
            room.publish()
        finally:
            room.discard()

    @classmethod
    def open(cls, store: Store, name: str) -> Self:
        """Read the document and the place of every dataset.

        A change that is being made, or that was interrupted, is read as if it were finished.
        """
        in_place, end = _in_place(store, name), time.monotonic() + WAIT_SECONDS
        while time.monotonic() < end:
            change, failed = in_place.pending(name), None
            size = store.size(name)
            overlay = Overlay(functools.partial(store.read, name), change.size if change else size)
            overlay.writes += change.writes if change else ()
            try:
                container = cls._read(store, name, overlay)
            except CacheDamaged as error:
                failed = error
            # In this order: a change that began and ended meanwhile is found by its bytes
            same = in_place.pending(name) == change
            if same and (change or (store.size(name) == size and overlay.unchanged())):
                if failed:
                    raise failed
                return container
            time.sleep(0.001)
        where = store.where(name)
        raise CacheLocked(f"{where} is changed again and again by another process: try later")

    @classmethod
    def was_one(cls, store: Store, name: str) -> bool:
        """Whether its head is of HDF5 and speaks of a fingerprint."""
        head = store.read(name, 0, 2**20)
        return head.startswith(b"\x89HDF") and b'"fingerprint"' in head

    @classmethod
    def _read(cls, store: Store, name: str, overlay: Overlay) -> Self:
        import h5py

        where = store.where(name)
        try:
            with h5py.File(overlay, "r") as file:
                container = cls(store, name, json.loads(file["manifest"][()]), {})
                container._offsets = {
                    array: _offset(where, file, array, shape, dtype)
                    for array, shape, dtype in arrays_of(container.document)
                }
        except (KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
            if isinstance(error, (CacheError, IsADirectoryError)):
                raise
            raise CacheDamaged(f"{where} cannot be read as an HDF5 cache: {error}") from error
        return container

    def amend(self, document: dict[str, Any], tables: Mapping[str, np.ndarray]) -> Self:
        """New datasets behind the end of the file; then, in one step, all that refers to them.

        Room of deleted tables is given back by `copy` alone; it is not used again, so that readers
        that have the file open go on.
        """
        self.sweep()
        there = {name for name, _, _ in arrays_of(self.document)}
        new = [array for array in arrays_of(document) if array[0] not in there]
        read = functools.partial(self.store.read, self.name)
        end = int.from_bytes(read(_END_AT, 8), "little")
        overlay = Overlay(read, end)
        places = self._change(overlay, document, new)
        assert min(places.values(), default=end) >= end, (places, end)
        room = self._in_place.room(self.name)
        try:
            room.resize(end)  # what a killed change left behind it would show in ledgers
            room.resize(max(end, overlay.size))
            _write_tables(room, tables, places)
            room.publish()
        except BaseException:
            room.resize(end)
            raise
        finally:
            room.discard()
        change = Change(size=overlay.size, writes=tuple(overlay.writes))
        self._in_place.change(self.name, change)
        return type(self).open(self.store, self.name)

    def _change(
        self,
        overlay: Overlay,
        document: dict[str, Any],
        new: Iterable[tuple[str, tuple[int, ...], np.dtype]],
    ) -> dict[str, int]:
        """Have the library change what it sees; where the new datasets lie."""
        import h5py

        with h5py.File(overlay, "r+", libver=_OLDEST) as file:
            places = _allocate(file, new)
            del file["manifest"]
            _write_document(file, document)
            for name in set(self.document["former"]) - set(document["former"]):
                del file[name]  # last: what is made after it could take its room
        return places

    def table(self, name: str) -> Extent:
        """The place of the table's dataset."""
        return Extent(self.name, self._offsets[name])

    def record_place(self, shard: int) -> Extent:
        """One row of the ledger dataset; zeros while the shard is not done."""
        part, local = self.manifest.part_of(shard)
        offset = self._offsets[in_part(part, "ledger")] + local * self.record_bytes(shard)
        return Extent(self.name, offset)

    def write_record(self, shard: int, record: bytes) -> None:
        """Overwrite the row in place: it may be torn, its own checksum then says so."""
        self.store.write_over(self.name, [(self.record_place(shard).offset, record)])

    def slots(self, stack: str, shard: int) -> ShardExtents:
        """Computed from the place of the stack's dataset."""
        count, views = len(self.manifest.shard_slots(shard)), self.manifest.views
        view_bytes = self.manifest.stack_slot_nbytes(stack) // views
        places = np.arange(count * views, dtype=np.int64) * view_bytes
        return ShardExtents(self.name, (self._first(stack, shard) + places).reshape(count, views))

    def begin(self, stack: str, shard: int) -> Draft:
        """The room is there since the creation."""
        return self._in_place.room(self.name, self._first(stack, shard))

    def seal(self, stack: str, shard: int, draft: Draft) -> bool:
        """Make the data durable. Two writers without locks write over each other: the same bytes
        do no harm, others are found by `verify`."""
        return draft.publish()

    def forget(self, shard: int) -> None:
        """Zeros for a record."""
        self.write_record(shard, bytes(self.record_bytes(shard)))

    def sweep(self) -> None:
        """Finish the change that a killed writer has begun."""
        self._in_place.settle(self.name)

    @property
    def _in_place(self) -> InPlace:
        return _in_place(self.store, self.name)

    def _first(self, stack: str, shard: int) -> int:
        """Where the first slot of a shard lies."""
        part, local = self.manifest.part_of(shard)
        first = local * self.manifest.slots_per_shard * self.manifest.stack_slot_nbytes(stack)
        return self._offsets[in_part(part, f"stacks/{stack}")] + first


def _in_place(store: Store, name: str) -> InPlace:
    if not isinstance(store, InPlace):
        raise LocationError(
            f"{store.where(name)}: HDF5 writes in the middle of a file, which cannot be done here: "
            "choose a name ending in .zarr"
        )
    return store


def _write_document(file: Any, document: dict[str, Any]) -> None:
    import h5py

    file.create_dataset("manifest", data=canonical_json(document), dtype=h5py.string_dtype())


def _allocate(file: Any, arrays: Iterable[tuple[str, tuple[int, ...], np.dtype]]) -> dict[str, int]:
    """Make contiguous datasets whose room is taken at once and not filled; where it lies."""
    import h5py

    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    layout.set_obj_track_times(False)
    link = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    link.set_create_intermediate_group(True)
    places = {}
    for name, shape, dtype in arrays:
        kind = h5py.h5t.py_create(dtype, logical=True)
        space = h5py.h5s.create_simple(shape)
        dataset = h5py.h5d.create(file.id, name.encode(), kind, space, dcpl=layout, lcpl=link)
        places[name] = dataset.get_offset()
    return places


def _write_tables(room: Room, tables: Mapping[str, np.ndarray], places: Mapping[str, int]) -> None:
    for name, table in tables.items():
        room.write(bytes_of(table), places[name])


def _offset(where: str, file: Any, name: str, shape: tuple[int, ...], dtype: np.dtype) -> int:
    if name not in file:
        raise CacheDamaged(f"{where}: dataset {name!r} is missing")
    dataset = file[name]
    offset = dataset.id.get_offset()  # None for chunked and compressed datasets
    if offset is None or (dataset.shape, dataset.dtype) != (shape, dtype):
        raise CacheDamaged(
            f"{where}: dataset {name!r} is {dataset.dtype} {dataset.shape}, expected contiguous "
            f"{dtype} {shape}: damaged, or rewritten by another tool"
        )
    return offset
