"""A cache as one HDF5 file.

h5py lays the file out: every dataset contiguous and allocated before any data exist, so the place
of every byte is known and the bulk never passes through the library. The format is the oldest one
(superblock 0), which has no "open for writing" mark that a crash would leave behind.

The library writes again only when the document is replaced (`amend`), and HDF5 cannot do that in
one step. So what it may write over, all that is not some dataset's numbers, is first copied to a
file beside the cache, `.<name>.undo`. As long as that file is there the change is not done: the
next writer puts the bytes back, and readers wait. Numbers that were there are never moved.

The stacks come last in the file: a file that was cut short loses rows, not the manifest.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash

from cache import files
from cache.containers.container import Container, Extent, ShardExtents
from cache.containers.document import arrays_of, in_part
from cache.documents import canonical_json
from cache.errors import CacheDamaged, CacheError, CacheLocked

WAIT_SECONDS = 10.0  # for a change of the document, which takes milliseconds
_UNDO_MAGIC = b"sidecache undo 1\n"


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

        with h5py.File(path, "w", libver=_OLDEST, locking=False) as file:
            _write_document(file, document)
            _create_datasets(file, arrays_of(document), tables)
        files.sync(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the document and the place of every dataset, and close the file again.

        Waits for a change of the document that another process is making; puts back what a killed
        one left half changed.
        """
        end, damaged = time.monotonic() + WAIT_SECONDS, False
        while True:
            if _undo_path(path).exists():
                _undo_if_nobody_writes(path)
            try:
                container = cls._open(path)
            except CacheDamaged:
                if damaged and not _undo_path(path).exists():
                    raise
                damaged = True  # or it was changed just then: look again
            else:
                if not _undo_path(path).exists():
                    return container
            if time.monotonic() > end:
                raise CacheLocked(
                    f"{path} is being changed, or a change of it was interrupted "
                    f"({_undo_path(path).name} is there): open it once as a user who may write it, "
                    f"which puts the old state back"
                )
            time.sleep(0.01)

    @classmethod
    def _open(cls, path: Path) -> Self:
        import h5py

        try:
            # Without HDF5's own lock: it fails on some network file systems, and on ours
            with h5py.File(path, "r", locking=False) as file:
                document = json.loads(file["manifest"][()])
                container = cls(path, document, {})
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
        """New datasets at the end of the file and another `manifest`, undone if it is interrupted.

        Room of deleted tables is given back by `copy` alone; it is not used again, so that readers
        that have the file open go on.
        """
        import h5py

        there = {name for name, _, _ in arrays_of(self.document)}
        new = [array for array in arrays_of(document) if array[0] not in there]
        gone = set(self.document["former"]) - set(document["former"])
        kept = [
            (self._offsets[name], int(np.prod(shape)) * dtype.itemsize)
            for name, shape, dtype in arrays_of(self.document)
        ]
        _write_undo(self.path, kept)
        try:
            with h5py.File(self.path, "r+", libver=_OLDEST, locking=False) as file:
                _create_datasets(file, iter(new), tables)
                del file["manifest"]
                _write_document(file, document)
                for name in gone:  # last: what is made after it could take its room
                    del file[name]
            files.sync(self.path)
        except BaseException:
            _undo(self.path)
            raise
        _forget_undo(self.path)
        return type(self).open(self.path)

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
        """Nothing to do: there are no unfinished files."""


_OLDEST = ("earliest", "v110")


def _write_document(file: Any, document: dict[str, Any]) -> None:
    import h5py

    file.create_dataset("manifest", data=canonical_json(document), dtype=h5py.string_dtype())


def _create_datasets(
    file: Any,
    arrays: Iterator[tuple[str, tuple[int, ...], np.dtype]],
    tables: Mapping[str, np.ndarray],
) -> None:
    for name, shape, dtype in arrays:
        _allocate(file, name, shape, dtype)
        if name in tables:
            file[name][...] = tables[name]


def _allocate(file: Any, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Make a contiguous dataset whose room is taken at once and not filled."""
    import h5py

    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    layout.set_obj_track_times(False)
    link = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    link.set_create_intermediate_group(True)
    kind = h5py.h5t.py_create(dtype, logical=True)
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(file.id, name.encode(), kind, space, dcpl=layout, lcpl=link)


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


def _undo_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.undo")


def _write_undo(path: Path, kept: list[tuple[int, int]]) -> None:
    """Copy what the library may write over: all bytes but those of the datasets, which are `kept`
    as (offset, length). Durable when this returns."""
    size = path.stat().st_size
    ranges, at = [], 0
    for offset, length in sorted(kept):
        if offset > at:
            ranges.append((at, offset - at))
        at = max(at, offset + length)
    if size > at:
        ranges.append((at, size - at))
    data = b"".join(files.read_at(path, offset, length) for offset, length in ranges)
    head = {"size": size, "ranges": ranges, "file": path.stat().st_ino}
    text = canonical_json({**head, "check": xxhash.xxh3_128_hexdigest(data)}).encode()
    partial = _undo_path(path).with_suffix(".partial")  # there is one writer
    with partial.open("wb") as file:
        file.write(_UNDO_MAGIC + text + b"\n" + data)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(_undo_path(path))
    files.sync_folder(path.parent)


def _undo(path: Path) -> None:
    """Put back what `_write_undo` has copied, durably; the caller is the only writer."""
    undo = _undo_path(path)
    magic, text, data = undo.read_bytes().split(b"\n", 2)
    head = json.loads(text)
    if magic + b"\n" != _UNDO_MAGIC or head["check"] != xxhash.xxh3_128_hexdigest(data):
        raise CacheDamaged(f"{undo} is damaged", undo)
    if head["file"] != path.stat().st_ino:
        raise CacheDamaged(
            f"{undo} belongs to another file than {path}, which was replaced since: delete it if "
            "the cache is whole (`verify` tells), or bring back the file that was there",
            undo,
        )
    with files.opened(path, os.O_WRONLY) as fd:
        for offset, length in head["ranges"]:
            files.write_all(fd, memoryview(data[:length]), offset)
            data = data[length:]
        os.ftruncate(fd, head["size"])
        os.fsync(fd)
    _forget_undo(path)


def _forget_undo(path: Path) -> None:
    _undo_path(path).unlink()
    files.sync_folder(path.parent)


def _undo_if_nobody_writes(path: Path) -> None:
    """Undo a change whose process has died; leave it if one lives, or if this user may not."""
    gone = (PermissionError, FileNotFoundError)
    with contextlib.suppress(*gone), files.opened(path, os.O_RDWR) as fd:
        locked, undo = files.try_lock(fd), _undo_path(path)
        old = time.time() - undo.stat().st_mtime > files.YOUNG_SECONDS
        if (locked or (locked is None and old)) and undo.exists():
            _undo(path)
