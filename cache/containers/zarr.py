"""A cache as a Zarr v3 folder.

zarr lays the arrays out; from then on the files are plain: a shard of a stack is one file, written
here exactly as the `sharding_indexed` codec would (slots one after another, then the index of
`(offset, nbytes)` pairs and its CRC32C), and a ledger record is one file. Reading needs the JSON
metadata and the indices alone, so it does not load zarr, which keeps a thread of its own that
would not survive a fork. Knows nothing about the order of publication.
"""

import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Self

import numpy as np

from cache import files
from cache.containers.container import Container, Extent, ShardExtents
from cache.containers.document import arrays_of, in_part, manifest_of
from cache.errors import CacheDamaged
from cache.manifest import Manifest

EMPTY = np.uint64(2**64 - 1)  # in an index: no such chunk, its values are the fill value
DIMENSIONS = ["row", "view", "tap", "token", "dim"]
PARTIAL = ".partial"  # a folder in the array's, of unfinished files

_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_NO_ENDIAN = {"name": "bytes"}  # the same codec where a number is one byte
_INDEX_CODECS = [_BYTES, {"name": "crc32c"}]


class ZarrContainer(Container):
    """A folder of plain files behind Zarr metadata."""

    suffix = ".zarr"

    @classmethod
    def create(cls, path: Path, document: dict[str, Any], tables: Mapping[str, np.ndarray]) -> None:
        """Lay out the folder. `path` must be absent or empty."""
        _write_new(path, _layout(document, [name for name, _, _ in arrays_of(document)]), tables)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read and check the metadata; no stack file is touched."""
        while True:
            document = _metadata(path).get("attributes", {}).get("sidecache")
            try:
                return cls._checked(path, document)
            except CacheDamaged:
                if _metadata(path).get("attributes", {}).get("sidecache") == document:
                    raise  # else it was replaced meanwhile, and what it spoke of deleted

    @classmethod
    def _checked(cls, path: Path, document: Any) -> Self:
        try:
            container = cls(path, document)
        except CacheDamaged as error:
            raise CacheDamaged(str(error).replace(str(path), str(path / "zarr.json"), 1)) from None
        manifest = container.manifest
        for part, slots in enumerate(manifest.parts):
            for stack in manifest.stacks:
                folder = path / in_part(part, f"stacks/{stack.name}")
                _check_layout(folder, manifest, stack.name, slots)
        for name, table in container.document["tables"].items():
            codecs = _metadata(path / name).get("codecs")
            if codecs not in ([_BYTES], [_NO_ENDIAN]) or 0 in table["shape"]:
                raise CacheDamaged(_rewritten(path / name, "codecs", [_BYTES], codecs))
        return container

    def amend(self, document: dict[str, Any], tables: Mapping[str, np.ndarray]) -> Self:
        """New arrays under names that nothing speaks of yet; then the document, by a rename."""
        there = {name for name, _, _ in arrays_of(self.document)}
        new = [name for name, _, _ in arrays_of(document) if name not in there]
        for name in new:
            _delete(self.path / name)  # what a killed change left there
        layout = _layout(document, new)
        of_arrays = {f"{name}/zarr.json" for name in new}
        groups = {key for key in layout if (self.path / key).exists()} - of_arrays
        _write_new(self.path, {k: v for k, v in layout.items() if k not in groups}, tables)
        metadata = _metadata(self.path)
        metadata["attributes"]["sidecache"] = document
        text = json.dumps(metadata, indent=2, allow_nan=False).encode()
        files.write_atomic(self.path / "zarr.json", text, self.path / PARTIAL)
        files.sync_folder(self.path)
        files.sweep(self.path / PARTIAL)
        amended = type(self).open(self.path)
        amended._delete_unknown(set(self.document["former"]) - set(document["former"]))
        return amended

    def _delete_unknown(self, gone: Collection[str]) -> None:
        """Delete arrays of former documents, and what killed changes have left."""
        for name in gone:
            _delete(self.path / name)
            self._delete_empty_groups(self.path.joinpath(name).parent)
        known = [*(name for name, _, _ in arrays_of(self.document)), *self.document["former"]]
        for folder in (*self.path.glob("labellings/*/"), *self.path.glob("updates/*/")):
            inside = f"{folder.relative_to(self.path).as_posix()}/"
            if not any(name.startswith(inside) for name in known):
                _delete(folder)

    def _delete_empty_groups(self, folder: Path) -> None:
        if folder != self.path and [path.name for path in folder.iterdir()] in ([], ["zarr.json"]):
            _delete(folder)
            self._delete_empty_groups(folder.parent)

    def table(self, name: str) -> Extent:
        """The one chunk file of the table."""
        axes = len(self.document["tables"][name]["shape"])
        return Extent(self.path / _chunk(name, axes), 0)

    def record_place(self, shard: int) -> Extent:
        """The record's chunk file."""
        part, local = self.manifest.part_of(shard)
        return Extent(self.path.joinpath(in_part(part, "ledger"), "c", str(local), "0"), 0)

    def write_record(self, shard: int, record: bytes) -> None:
        """Replace the record's chunk file by a rename."""
        path = self.record_place(shard).path
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, record, path.parents[2] / PARTIAL)
        files.sync_folders(path.parent, self.path)

    def slots(self, stack: str, shard: int) -> ShardExtents:
        """Read and check the index of the shard's file."""
        path = self._shard_path(stack, shard)
        slots, views = len(self.manifest.shard_slots(shard)), self.manifest.views
        length = self._index_bytes()
        try:
            size = path.stat().st_size
            stored = files.read_at(path, max(0, size - length), length)
        except FileNotFoundError as error:
            raise CacheDamaged(
                f"{path} is missing, the ledger says it was written", path
            ) from error
        index, check = stored[:-4], stored[-4:]
        if len(stored) < length or check != _crc32c(index):
            raise CacheDamaged(
                f"{path}: the index at its end is damaged, or the file was cut", path
            )
        pairs = np.frombuffer(index, "<u8").reshape(-1, 2)[: slots * views]
        offsets, lengths = pairs[:, 0], pairs[:, 1]
        empty = (offsets == EMPTY) & (lengths == EMPTY)
        expected = self._chunk_bytes(stack)
        fits = (lengths == expected) & (offsets <= max(0, size - length - expected))
        if not (fits | empty).all():
            raise CacheDamaged(
                f"{path}: its index points to chunks that are not {expected} bytes inside the file",
                path,
            )
        places = np.where(empty, EMPTY, offsets).astype(np.int64)  # EMPTY becomes -1
        return ShardExtents(path, places.reshape(slots, views))

    def begin(self, stack: str, shard: int) -> Extent:
        """Make an unfinished file of the shard's full length, under a name of its own."""
        folder = self._shard_path(stack, shard).parents[5] / PARTIAL
        fd, path = files.new_file(folder, str(shard))
        try:
            os.ftruncate(fd, self._data_bytes(stack, shard) + self._index_bytes())
        finally:
            os.close(fd)
        return Extent(path, 0)

    def seal(self, stack: str, shard: int, fd: int, extent: Extent) -> bool:
        """Append the index, make the file durable, give it its name.

        A whole file under that name is another writer's and stays: what has a name is never
        replaced, so that any record written since then speaks of it.
        """
        chunk, data = self._chunk_bytes(stack), self._data_bytes(stack, shard)
        chunks = self.manifest.slots_per_shard * self.manifest.views
        pairs = np.full((chunks, 2), EMPTY, "<u8")
        written = data // chunk
        pairs[:written, 0] = np.arange(written, dtype=np.uint64) * np.uint64(chunk)
        pairs[:written, 1] = chunk
        index = pairs.tobytes()
        files.write_all(fd, memoryview(index + _crc32c(index)), data)
        os.fsync(fd)
        path = self._shard_path(stack, shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        ours = files.publish(extent.path, path)
        if not ours:
            try:
                self.slots(stack, shard)
            except CacheDamaged:  # no writer publishes that: it was cut, or half deleted
                extent.path.replace(path)
                ours = True
            else:
                extent.path.unlink()
        files.sync_folders(path.parent, self.path)
        return ours

    def discard(self, stack: str, shard: int, extent: Extent) -> None:
        """Delete the unfinished file."""
        extent.path.unlink(missing_ok=True)

    def forget(self, shard: int) -> None:
        """Delete the shard's files, then its record: killed in between, it is damaged as before,
        and a file that stayed would be taken for another writer's."""
        for path in (
            *(self._shard_path(stack.name, shard) for stack in self.manifest.stacks),
            self.record_place(shard).path,
        ):
            if path.exists():
                path.unlink()
                files.sync_folder(path.parent)

    def sweep(self) -> None:
        """Delete the unfinished files that nobody has locked."""
        files.sweep(self.path / PARTIAL)
        for part in range(len(self.manifest.parts)):
            for name in ("ledger", *(f"stacks/{stack.name}" for stack in self.manifest.stacks)):
                files.sweep(self.path / in_part(part, name) / PARTIAL)

    def _shard_path(self, stack: str, shard: int) -> Path:
        part, local = self.manifest.part_of(shard)
        array = self.path / in_part(part, f"stacks/{stack}")
        return array.joinpath("c", str(local), "0", "0", "0", "0")

    def _chunk_bytes(self, stack: str) -> int:
        return self.manifest.stack_slot_nbytes(stack) // self.manifest.views

    def _data_bytes(self, stack: str, shard: int) -> int:
        return len(self.manifest.shard_slots(shard)) * self.manifest.stack_slot_nbytes(stack)

    def _index_bytes(self) -> int:
        return self.manifest.slots_per_shard * self.manifest.views * 16 + 4


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


def _write_new(path: Path, layout: Mapping[str, bytes], tables: Mapping[str, np.ndarray]) -> None:
    """Write metadata files and tables where none are, durably with their names."""
    contents = {key: memoryview(metadata) for key, metadata in layout.items()}
    contents |= {_chunk(name, table.ndim): files.bytes_of(table) for name, table in tables.items()}
    folders = {path}
    for key, data in contents.items():
        files.write_new(path / key, data)
        folders |= {path / above for above in PurePosixPath(key).parents}
    for folder in sorted(folders, reverse=True):  # the lowest first
        files.sync_folder(folder)


def _chunk(name: str, axes: int) -> str:
    """The one chunk file of a table."""
    return "/".join([name, "c", *["0"] * axes])


def _delete(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _metadata(folder: Path) -> dict[str, Any]:
    path = folder / "zarr.json"
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CacheDamaged(f"{path} is missing: not a sidecache cache, or damaged") from error
    except ValueError as error:
        raise CacheDamaged(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise CacheDamaged(f"{path} is not a JSON object")
    return document


def _check_layout(folder: Path, manifest: Manifest, stack: str, slots: int) -> None:
    """Refuse an array that another tool has rewritten with other chunks or codecs."""
    metadata, shape = _metadata(folder), manifest.stored_shape(stack)
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
            raise CacheDamaged(_rewritten(folder, name, expected[name], found[name]))


def _rewritten(folder: Path, what: str, expected: object, found: object) -> str:
    return (
        f"{folder / 'zarr.json'}: {what} {found}, expected {expected}: "
        "damaged, or rewritten by another tool"
    )


def _crc32c(data: bytes) -> bytes:
    import google_crc32c

    return google_crc32c.value(data).to_bytes(4, "little")
