"""A cache as one HDF5 file.

h5py lays the file out: every dataset contiguous and allocated before any data exist, so the place
of every byte is known and the bulk never passes through the library. The format is the oldest one
(superblock 0), which has no "open for writing" mark that a crash would leave behind.

Nor does the library ever touch the file: it works on an `Overlay`, and what it would write is
written here. When the document is replaced (`amend`) these are many small places that belong
together, so they go through a `journal`. Numbers that were there are never moved.

The stacks come last in the file: a file that was cut short loses rows, not the manifest.
"""

import functools
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from cache import files
from cache.containers import journal
from cache.containers.container import Container, Extent, ShardExtents
from cache.containers.document import arrays_of, in_part
from cache.containers.overlay import Overlay
from cache.documents import canonical_json
from cache.errors import CacheDamaged, CacheError, CacheLocked

WAIT_SECONDS = 10.0  # for a change of the document, which takes milliseconds
_OLDEST = ("earliest", "v110")
_END_AT = 40  # where superblock 0 says, in 8 bytes, where the file ends


class Hdf5Container(Container):
    """One file of contiguous datasets."""

    suffix = ".h5"

    def __init__(self, path: Path, document: dict[str, Any], offsets: dict[str, int]) -> None:
        super().__init__(path, document)
        self._offsets = offsets  # dataset name: where its first byte lies

    @classmethod
    def create(cls, path: Path, document: dict[str, Any], tables: Mapping[str, np.ndarray]) -> None:
        """Lay out the file, replacing what `path` holds."""
        import h5py

        overlay = Overlay(lambda offset, length: b"", 0)
        with h5py.File(overlay, "w", libver=_OLDEST) as file:
            _write_document(file, document)
            places = _allocate(file, arrays_of(document))
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for offset, data in overlay.writes:
                files.write_all(fd, memoryview(data), offset)
            _write_tables(fd, tables, places)
            os.ftruncate(fd, overlay.size)
            os.fsync(fd)
        finally:
            os.close(fd)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the document and the place of every dataset.

        A change that is being made, or that was interrupted, is read as if it were finished.
        """
        end = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < end:
            change, failed = journal.pending(path), None
            with files.opened(path) as fd:
                read = functools.partial(files.read_from, fd)
                size = os.fstat(fd).st_size
                overlay = Overlay(read, change.size if change else size)
                overlay.writes += change.writes if change else ()
                try:
                    container = cls._read(path, overlay)
                except CacheDamaged as error:
                    failed = error
                # In this order: a change that began and ended meanwhile is found by its bytes
                same = journal.pending(path) == change
                if same and (change or (os.fstat(fd).st_size == size and overlay.unchanged())):
                    if failed:
                        raise failed
                    return container
            time.sleep(0.001)
        raise CacheLocked(f"{path} is changed again and again by another process: try later")

    @classmethod
    def _read(cls, path: Path, overlay: Overlay) -> Self:
        import h5py

        try:
            with h5py.File(overlay, "r") as file:
                container = cls(path, json.loads(file["manifest"][()]), {})
                container._offsets = {
                    name: _offset(path, file, name, shape, dtype)
                    for name, shape, dtype in arrays_of(container.document)
                }
        except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, CacheError):
                raise
            raise CacheDamaged(f"{path} cannot be read as an HDF5 cache: {error}") from error
        return container

    def amend(self, document: dict[str, Any], tables: Mapping[str, np.ndarray]) -> Self:
        """New datasets behind the end of the file; then, through a journal, all that refers to
        them.

        Room of deleted tables is given back by `copy` alone; it is not used again, so that readers
        that have the file open go on.
        """
        self.sweep()
        there = {name for name, _, _ in arrays_of(self.document)}
        new = [array for array in arrays_of(document) if array[0] not in there]
        with files.opened(self.path, os.O_RDWR) as fd:
            read = functools.partial(files.read_from, fd)
            end = int.from_bytes(read(_END_AT, 8), "little")
            overlay = Overlay(read, end)
            places = self._change(overlay, document, new)
            assert min(places.values(), default=end) >= end, (places, end)
            try:
                os.ftruncate(fd, end)  # what a killed change left behind it would show in ledgers
                os.ftruncate(fd, max(end, overlay.size))
                _write_tables(fd, tables, places)
                os.fsync(fd)
            except BaseException:
                os.ftruncate(fd, end)
                raise
            inode = os.fstat(fd).st_ino
        writes = tuple(overlay.writes)
        change = journal.Journal(file=inode, size=overlay.size, writes=writes)
        journal.publish(self.path, change)
        journal.finish(self.path, change)
        return type(self).open(self.path)

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
        return Extent(self.path, self._offsets[name])

    def record_place(self, shard: int) -> Extent:
        """One row of the ledger dataset; zeros while the shard is not done."""
        part, local = self.manifest.part_of(shard)
        offset = self._offsets[in_part(part, "ledger")] + local * self.record_bytes(shard)
        return Extent(self.path, offset)

    def write_record(self, shard: int, record: bytes) -> None:
        """Overwrite the row in place: it may be torn, its own checksum then says so."""
        place = self.record_place(shard)
        with files.opened(place.path, os.O_WRONLY) as fd:
            files.write_all(fd, memoryview(record), place.offset)
            os.fsync(fd)

    def slots(self, stack: str, shard: int) -> ShardExtents:
        """Computed from the place of the stack's dataset."""
        extent, count = self.begin(stack, shard), len(self.manifest.shard_slots(shard))
        views = self.manifest.views
        view_bytes = self.manifest.stack_slot_nbytes(stack) // views
        places = extent.offset + np.arange(count * views, dtype=np.int64) * view_bytes
        return ShardExtents(self.path, places.reshape(count, views))

    def begin(self, stack: str, shard: int) -> Extent:
        """The room is there since the creation."""
        part, local = self.manifest.part_of(shard)
        first = local * self.manifest.slots_per_shard
        offset = first * self.manifest.stack_slot_nbytes(stack)
        return Extent(self.path, self._offsets[in_part(part, f"stacks/{stack}")] + offset)

    def seal(self, stack: str, shard: int, fd: int, extent: Extent) -> bool:
        """Make the data durable. Two writers without locks write over each other: the same bytes
        do no harm, others are found by `verify`."""
        os.fsync(fd)
        return True

    def discard(self, stack: str, shard: int, extent: Extent) -> None:
        """Nothing to do: without a ledger record the bytes mean nothing."""

    def forget(self, shard: int) -> None:
        """Zeros for a record."""
        self.write_record(shard, bytes(self.record_bytes(shard)))

    def sweep(self) -> None:
        """Finish the change that a killed writer has begun."""
        if change := journal.pending(self.path):
            journal.finish(self.path, change)


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


def _write_tables(fd: int, tables: Mapping[str, np.ndarray], places: Mapping[str, int]) -> None:
    for name, table in tables.items():
        files.write_all(fd, files.bytes_of(table), places[name])


def _offset(path: Path, file: Any, name: str, shape: tuple[int, ...], dtype: np.dtype) -> int:
    if name not in file:
        raise CacheDamaged(f"{path}: dataset {name!r} is missing")
    dataset = file[name]
    offset = dataset.id.get_offset()  # None for chunked and compressed datasets
    if offset is None or (dataset.shape, dataset.dtype) != (shape, dtype):
        raise CacheDamaged(
            f"{path}: dataset {name!r} is {dataset.dtype} {dataset.shape}, expected contiguous "
            f"{dtype} {shape}: damaged, or rewritten by another tool"
        )
    return offset
