"""A cache as one HDF5 file.

h5py lays the file out once: every dataset contiguous and allocated before any data exist, so the
place of every byte is known and the library never writes again. A file that HDF5 does not have
open cannot be left inconsistent by a killed process. The format is the oldest one (superblock 0),
which has no "open for writing" mark that a crash would leave behind.

The stacks come last in the file: a file that was cut short loses rows, not the manifest.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from cache import files
from cache.backend import Backend, Extent, ShardExtents, check_document, manifest_of
from cache.errors import CacheDamaged, CacheError
from cache.manifest import canonical_json


class Hdf5Backend(Backend):
    """One file of contiguous datasets."""

    suffix = ".h5"

    def __init__(self, path: Path, document: dict[str, Any], offsets: dict[str, int]) -> None:
        super().__init__(path, document)
        self._offsets = offsets  # dataset name: where its first byte lies

    @classmethod
    def create(cls, path: Path, document: dict[str, Any], tables: Mapping[str, np.ndarray]) -> None:
        """Lay out the file, replacing what `path` holds."""
        import h5py

        with h5py.File(path, "w", libver=("earliest", "v110"), locking=False) as file:
            file.create_dataset(
                "manifest", data=canonical_json(document), dtype=h5py.string_dtype()
            )
            for name, (shape, dtype) in _datasets(document).items():
                _allocate(file, name, shape, dtype)
            for name, table in tables.items():
                file[name][...] = table
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the document and the place of every dataset, and close the file again."""
        import h5py

        try:
            # Without HDF5's own lock: it fails on some network file systems, and on ours
            with h5py.File(path, "r", locking=False) as file:
                document = json.loads(file["manifest"][()])
                check_document(path, document)
                offsets = {
                    name: _offset(path, file, name, shape, dtype)
                    for name, (shape, dtype) in _datasets(document).items()
                }
        except (OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, CacheError):
                raise
            raise CacheDamaged(f"{path} cannot be read as an HDF5 cache: {error}") from error
        return cls(path, document, offsets)

    def table(self, name: str) -> Extent:
        """The place of the table's dataset."""
        return Extent(self.path, self._offsets[name])

    def record_place(self, shard: int) -> Extent:
        """One row of the ledger dataset; zeros while the shard is not done."""
        return Extent(self.path, self._offsets["ledger"] + shard * self.record_bytes)

    def write_record(self, shard: int, record: bytes) -> None:
        """Overwrite the row in place: it may be torn, its own checksum then says so."""
        place = self.record_place(shard)
        fd = os.open(place.path, os.O_WRONLY)
        try:
            files.write_all(fd, memoryview(record), place.offset)
            os.fsync(fd)
        finally:
            os.close(fd)

    def rows(self, stack: str, shard: int) -> ShardExtents:
        """Computed from the place of the stack's dataset."""
        rows, views = self.manifest.shard_rows(shard), self.manifest.views
        view_bytes = self.manifest.stack_row_nbytes(stack) // views
        places = np.arange(rows.start * views, rows.stop * views, dtype=np.int64) * view_bytes
        places += self._offsets[f"stacks/{stack}"]
        return ShardExtents(self.path, places.reshape(len(rows), views))

    def begin(self, stack: str, shard: int) -> Extent:
        """The room is there since the creation."""
        first = self.manifest.shard_rows(shard).start
        offset = first * self.manifest.stack_row_nbytes(stack)
        return Extent(self.path, self._offsets[f"stacks/{stack}"] + offset)

    def seal(self, stack: str, shard: int, fd: int, extent: Extent) -> bool:
        """Make the data durable. Two writers without locks write over each other: the same bytes
        do no harm, others are found by `verify`."""
        os.fsync(fd)
        return True

    def discard(self, stack: str, shard: int, extent: Extent) -> None:
        """Nothing to do: without a ledger record the bytes mean nothing."""

    def forget(self, shard: int) -> None:
        """Zeros for a record."""
        self.write_record(shard, bytes(self.record_bytes))

    def sweep(self) -> None:
        """Nothing to do: there are no unfinished files."""


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


def _datasets(document: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of every dataset, in the order in which they lie in the file."""
    manifest = manifest_of(document)
    datasets = {
        name: (tuple(table["shape"]), np.dtype(table["dtype"]))
        for name, table in document["tables"].items()
    }
    datasets["ledger"] = (manifest.shards, int(document["record_bytes"])), np.dtype(np.uint8)
    for stack in manifest.stacks:
        shape = (manifest.rows, manifest.views, *manifest.stored_shape(stack.name))
        datasets[f"stacks/{stack.name}"] = shape, manifest.dtype
    return datasets


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
