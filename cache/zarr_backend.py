"""A cache as a Zarr v3 folder.

zarr lays the folder out; from then on the files are plain: a shard of a stack is one file, written
here exactly as the `sharding_indexed` codec would (rows one after another, then the index of
`(offset, nbytes)` pairs and its CRC32C), and a ledger record is one file. Reading needs the JSON
metadata and the indices alone, so it does not load zarr, which keeps a thread of its own that
would not survive a fork. Knows nothing about the order of publication.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from cache import files
from cache.backend import Backend, Extent, ShardExtents, check_document, manifest_of
from cache.errors import CacheDamaged
from cache.manifest import Manifest

EMPTY = np.uint64(2**64 - 1)  # in an index: no such chunk, its values are the fill value
DIMENSIONS = ["row", "view", "tap", "token", "dim"]
PARTIAL = ".partial"  # a folder in the array's, of unfinished files

_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_NO_ENDIAN = {"name": "bytes"}  # the same codec where a number is one byte
_INDEX_CODECS = [_BYTES, {"name": "crc32c"}]


class ZarrBackend(Backend):
    """A folder of plain files behind Zarr metadata."""

    suffix = ".zarr"

    @classmethod
    def create(cls, path: Path, document: dict[str, Any], tables: Mapping[str, np.ndarray]) -> None:
        """Lay out the folder. `path` must be absent or empty."""
        import zarr

        manifest = manifest_of(document)
        root = zarr.create_group(
            _local_store(path), zarr_format=3, attributes={"sidecache": document}
        )
        plain: dict[str, Any] = {"compressors": None, "filters": None, "fill_value": 0}
        for name, table in tables.items():
            array = root.create_array(
                name,
                shape=table.shape,
                dtype=table.dtype,
                chunks=tuple(max(1, length) for length in table.shape),  # one file a table
                config={"write_empty_chunks": True},
                **plain,
            )
            array[...] = table
        shape = (manifest.shards, int(document["record_bytes"]))
        root.create_array("ledger", shape=shape, dtype="uint8", chunks=(1, shape[1]), **plain)
        for stack in manifest.stacks:
            stored = manifest.stored_shape(stack.name)
            root.create_array(
                f"stacks/{stack.name}",
                shape=(manifest.rows, manifest.views, *stored),
                dtype=manifest.dtype,
                shards=(manifest.rows_per_shard, manifest.views, *stored),
                chunks=(1, 1, *stored),
                dimension_names=DIMENSIONS,
                **plain,
            )
        files.sync_tree(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read and check the metadata; no stack file is touched."""
        attributes = _metadata(path).get("attributes", {})
        backend = cls(path, check_document(path / "zarr.json", attributes.get("sidecache")))
        for stack in backend.manifest.stacks:
            _check_layout(path / "stacks" / stack.name, backend.manifest, stack.name)
        for name, table in backend.document["tables"].items():
            codecs = _metadata(path / name).get("codecs")
            if codecs not in ([_BYTES], [_NO_ENDIAN]) or 0 in table["shape"]:
                raise CacheDamaged(_rewritten(path / name, "codecs", [_BYTES], codecs))
        return backend

    def table(self, name: str) -> Extent:
        """The one chunk file of the table."""
        axes = len(self.document["tables"][name]["shape"])
        return Extent(self.path.joinpath(name, "c", *["0"] * axes), 0)

    def record_place(self, shard: int) -> Extent:
        """The record's chunk file."""
        return Extent(self.path.joinpath("ledger", "c", str(shard), "0"), 0)

    def write_record(self, shard: int, record: bytes) -> None:
        """Replace the record's chunk file by a rename."""
        path = self.record_place(shard).path
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, record, self.path / "ledger" / PARTIAL)
        files.sync_folders(path.parent, self.path)

    def rows(self, stack: str, shard: int) -> ShardExtents:
        """Read and check the index of the shard's file."""
        path = self._shard_path(stack, shard)
        rows, views = len(self.manifest.shard_rows(shard)), self.manifest.views
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
        pairs = np.frombuffer(index, "<u8").reshape(-1, 2)[: rows * views]
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
        return ShardExtents(path, places.reshape(rows, views))

    def begin(self, stack: str, shard: int) -> Extent:
        """Make an unfinished file of the shard's full length, under a name of its own."""
        fd, path = files.new_file(self.path / "stacks" / stack / PARTIAL, str(shard))
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
        chunks = self.manifest.rows_per_shard * self.manifest.views
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
                self.rows(stack, shard)
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
        for folder in ("ledger", *(f"stacks/{stack.name}" for stack in self.manifest.stacks)):
            files.sweep(self.path / folder / PARTIAL)

    def _shard_path(self, stack: str, shard: int) -> Path:
        return self.path.joinpath("stacks", stack, "c", str(shard), "0", "0", "0", "0")

    def _chunk_bytes(self, stack: str) -> int:
        return self.manifest.stack_row_nbytes(stack) // self.manifest.views

    def _data_bytes(self, stack: str, shard: int) -> int:
        return len(self.manifest.shard_rows(shard)) * self.manifest.stack_row_nbytes(stack)

    def _index_bytes(self) -> int:
        return self.manifest.rows_per_shard * self.manifest.views * 16 + 4


def _local_store(path: Path) -> Any:
    """zarr's store of plain files, for a folder where nobody else writes.

    Its own way to set what is absent makes hard links, which some file systems lack.
    """
    from zarr.storage import LocalStore

    class Store(LocalStore):
        async def set_if_not_exists(self, key: str, value: Any) -> None:
            if not await self.exists(key):
                await self.set(key, value)

    return Store(path)


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


def _check_layout(folder: Path, manifest: Manifest, stack: str) -> None:
    """Refuse an array that another tool has rewritten with other chunks or codecs."""
    metadata, shape = _metadata(folder), manifest.stored_shape(stack)
    codecs = metadata.get("codecs") or [{}]
    sharding = codecs[0].get("configuration", {})
    inner = sharding.get("codecs")
    if manifest.dtype.itemsize == 1 and inner == [_NO_ENDIAN]:
        inner = [_BYTES]
    expected: dict[str, Any] = {
        "shape": [manifest.rows, manifest.views, *shape],
        "shard": [manifest.rows_per_shard, manifest.views, *shape],
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
