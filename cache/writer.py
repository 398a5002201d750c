"""Writing a cache: create or resume, fill shard after shard, publish each when it is whole.

The order is the whole safety: the plan (manifest and tables) appears complete or not at all; a
shard's bytes are forced to the disk before its ledger record is written. A process killed anywhere
leaves finished shards, and others that count as not begun. Whoever runs the same job again writes
the rest, and the result is the same as without the interruption.

This module does not know what the numbers mean, nor which backend holds them.
"""

import errno
import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import xxhash

from cache import files
from cache.backend import Backend, Extent, make_document
from cache.errors import CacheError, CacheLocked, IdentityMismatch, NoSpace, NotWritable
from cache.ledger import Error, Record, add_errors, read_record, record_bytes
from cache.location import backend_of, create, is_there, lock, open_backend, remove
from cache.manifest import Manifest, differences
from cache.tables import check_tables, read_table


@dataclass
class _OpenShard:
    """A shard that is being filled: where it goes, which rows are claimed, what they hash to."""

    rows: range
    places: dict[str, tuple[int, Extent]]  # stack: (fd, where the shard's first row goes)
    claimed: np.ndarray  # bool (rows,)
    left: int
    digests: dict[str, list[str]]
    skipped: dict[int, str] = field(default_factory=dict)
    errors: dict[str, list[Error]] = field(default_factory=dict)


class Writer:
    """Fill the cache at a location; a context manager, safe to call from many threads.

    Creates the cache, or resumes it if it was made from the same identity; `overwrite` replaces a
    cache of another identity, and resumes one of the same all the same. `tables` are the small
    arrays of docs/format.md: `keys` always, `labels/<target>`, `split`, `source_sha256`,
    `final_norm/weight` and `final_norm/bias` as the manifest says.

    worker, workers: of several processes that fill one cache together, each owns the shards
    `worker, worker + workers, ...`; every number should be given to one process only. Where one is
    given twice, or where the file system has no locks, in Zarr the first whole shard stays, and
    whoever comes later vouches for its bytes. In HDF5 they write over each other.

    Raises:
        LocationError: the suffix is neither .zarr nor .h5.
        IdentityMismatch: a cache made from something else is there; names every field.
        CacheLocked: another process is writing it.
        NoSpace: what is still to be written is more than the file system has free.
        NotWritable: the cache must be made or changed, and this user may not.
        ValueError: a table does not fit the manifest.
    """

    def __init__(
        self,
        location: str | Path,
        manifest: Manifest,
        tables: Mapping[str, np.ndarray],
        *,
        overwrite: bool = False,
        worker: int = 0,
        workers: int = 1,
    ) -> None:
        if not 0 <= worker < workers:
            raise ValueError(f"expected 0 <= worker < workers, received {worker} of {workers}")
        backend_of(location)
        path = Path(location).absolute()
        tables = check_tables(manifest, tables)
        with _disk_explained(path):
            self._lock_fd = _create_or_lock(path, manifest, tables, overwrite, workers > 1)
        try:
            self._backend: Backend = open_backend(path)
            _refuse_differences(path, self._backend, manifest, tables)
            self.manifest = self._backend.manifest
            done = (
                shard
                for shard in range(self.manifest.shards)
                if read_record(self._backend.record(shard), self.manifest, shard)
            )
            self._done = set(done)
            self._backend.sweep()
            self._owned = range(worker, self.manifest.shards, workers)
            _refuse_full_disk(path, self._left_bytes(), 0)
        except BaseException:
            os.close(self._lock_fd)
            raise
        self.location = path
        self.bytes_written = 0
        self._lock = threading.Lock()
        self._open: dict[int, _OpenShard] = {}
        self._closed = False
        self._published = time.perf_counter()  # the last record, or the beginning

    @classmethod
    def open(
        cls,
        location: str | Path,
        manifest: Manifest,
        tables: Mapping[str, np.ndarray],
        **options: Any,
    ) -> Self:
        """The same as `Writer(...)`."""
        return cls(location, manifest, tables, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pending(self) -> list[range]:
        """Row ranges of this worker's shards that are not done, in order."""
        return [self.manifest.shard_rows(s) for s in self._owned if s not in self._done]

    @property
    def rows_done(self) -> int:
        """Rows of this worker's finished shards, those of earlier runs included."""
        return sum(len(self.manifest.shard_rows(s)) for s in self._owned if s in self._done)

    def write(
        self,
        start: int,
        arrays: Mapping[str, np.ndarray],
        skipped: Mapping[int, str] | None = None,
        errors: Mapping[str, Error] | None = None,
    ) -> None:
        """Write consecutive rows of one pending shard; with its last row, publish the shard.

        arrays: per stack `(n, views, *manifest.stored_shape(stack))` in the storage dtype, row
            `start` first.
        skipped: reason per absolute row that has no features; its values are written as zeros.
        errors: what rounding to the storage type lost, as far as the caller measured it on some of
            these rows: per stack, sum of squared errors, sum of squared exact values, worst
            relative error of one token. The ledger keeps sums and maximum of the shard. Numbers
            that are not finite (sums that overflowed) count as not measured.
        Threads may write different rows at the same time, in any order.

        Raises:
            ValueError: a stack, shape, dtype or error is not as expected, or the rows are not
                pending.
            NameMissing: `errors` names a stack that the cache does not hold.
            NoSpace: the disk is full; what is published stays.
            NotWritable: this user may not write there.
        """
        start = int(start)
        skipped = {int(row): reason for row, reason in (skipped or {}).items()}
        count = self._check_arrays(arrays)
        measured = self._check_errors(errors or {})
        index, shard = self._claim(start, count, skipped)
        local = start - shard.rows.start
        try:
            with _disk_explained(self.location):
                for name, values in arrays.items():
                    self._write_stack(shard, name, local, _without(values, start, skipped))
        except BaseException:
            with self._lock:
                shard.claimed[local : local + count] = False
            raise
        with self._lock:
            shard.skipped.update(skipped)
            for stack, error in measured.items():
                shard.errors.setdefault(stack, []).append(error)
            shard.left -= count
            whole = shard.left == 0
        if whole:
            self._publish(index, shard)

    def forget(self, shards: Iterable[int]) -> None:
        """Drop the ledger records of shards, so that they are pending again."""
        for shard in shards:
            self._backend.forget(shard)
            self._done.discard(shard)

    def close(self) -> None:
        """Give up what is not whole and release the lock; the published shards stay."""
        if self._closed:
            return
        self._closed = True
        for index, shard in list(self._open.items()):
            self._release(index)
            for stack, (_, extent) in shard.places.items():
                self._backend.discard(stack, index, extent)
        self._backend.sweep()
        os.close(self._lock_fd)

    def _left_bytes(self) -> int:
        return sum(map(len, self.pending)) * self.manifest.row_nbytes

    def _check_arrays(self, arrays: Mapping[str, np.ndarray]) -> int:
        """The number of rows, after checking names, shapes and dtypes."""
        names = [stack.name for stack in self.manifest.stacks]
        if sorted(arrays) != sorted(names):
            raise ValueError(f"expected arrays for stacks {names}, received {sorted(arrays)}")
        count = len(arrays[names[0]])
        for stack in self.manifest.stacks:
            expected = (count, self.manifest.views, *self.manifest.stored_shape(stack.name))
            received = arrays[stack.name]
            if received.shape != expected or received.dtype != self.manifest.dtype:
                raise ValueError(
                    f"stack {stack.name!r}: expected {self.manifest.dtype} {expected} "
                    f"(row, view, tap, token, stored width), "
                    f"received {received.dtype} {received.shape}"
                )
        return count

    def _check_errors(self, errors: Mapping[str, Error]) -> dict[str, Error]:
        """The errors that are finite, after checking their names and lengths."""
        finite = {}
        for name, error in errors.items():
            self.manifest.stack(name)
            if len(error) != 3:
                raise ValueError(
                    f"error of stack {name!r}: expected three numbers (sum of squared errors, sum "
                    f"of squared values, worst relative error of a token), received {error}"
                )
            if all(map(math.isfinite, error)):
                finite[name] = float(error[0]), float(error[1]), float(error[2])
        return finite

    def _claim(self, start: int, count: int, skipped: Mapping[int, str]) -> tuple[int, _OpenShard]:
        """Take rows for the calling thread; begins their shard with its first rows."""
        index = start // self.manifest.rows_per_shard
        with self._lock:
            if self._closed:
                raise ValueError("the writer is closed")
            if count < 1 or index not in self._owned or index in self._done:
                raise ValueError(f"rows {start} to {start + count - 1} are not in a pending shard")
            rows = self.manifest.shard_rows(index)
            if start + count > rows.stop:
                raise ValueError(
                    f"rows {start} to {start + count - 1} reach past their shard, "
                    f"which is rows {rows.start} to {rows.stop - 1}"
                )
            if any(not start <= row < start + count for row in skipped):
                raise ValueError(f"skipped {list(skipped)}: expected rows among those written")
            shard = self._open.get(index)
            if shard is None:
                with _disk_explained(self.location):
                    shard = self._open[index] = self._begin(index, rows)
            claimed = shard.claimed[start - rows.start : start - rows.start + count]
            if claimed.any():
                raise ValueError(f"row {start + int(claimed.argmax())} was already written")
            claimed[:] = True
            return index, shard

    def _begin(self, index: int, rows: range) -> _OpenShard:
        places: dict[str, tuple[int, Extent]] = {}
        try:
            for stack in self.manifest.stacks:
                extent = self._backend.begin(stack.name, index)
                fd = os.open(extent.path, os.O_WRONLY)
                places[stack.name] = fd, extent
                files.try_lock(fd, shared=True)  # says that somebody lives who writes this file
        except BaseException:
            for fd, _ in places.values():
                os.close(fd)
            raise
        digests = {stack.name: [""] * len(rows) for stack in self.manifest.stacks}
        claimed = np.zeros(len(rows), bool)
        return _OpenShard(rows, places, claimed, len(rows), digests)

    def _write_stack(self, shard: _OpenShard, name: str, local: int, values: np.ndarray) -> None:
        rows = np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)
        for position, row in enumerate(rows, local):
            shard.digests[name][position] = xxhash.xxh3_128_hexdigest(row.data)
        fd, extent = shard.places[name]
        files.write_all(fd, rows.reshape(-1).data, extent.offset + local * rows.shape[1])
        with self._lock:
            self.bytes_written += rows.nbytes

    def _publish(self, index: int, shard: _OpenShard) -> None:
        """Data to the disk first, then the record that vouches for them: for ours, or for those of
        a writer who was faster, whose last bits may differ."""
        with _disk_explained(self.location):
            for stack, (fd, extent) in shard.places.items():
                if not self._backend.seal(stack, index, fd, extent):
                    self._vouch_for_theirs(stack, index, shard)
            record = Record(
                shard=index,
                rows=(shard.rows.start, shard.rows.stop),
                digests=shard.digests,
                skipped=shard.skipped,
                error={stack: add_errors(parts) for stack, parts in shard.errors.items()},
                seconds=self._seconds_since_last(),
            )
            self._backend.write_record(index, record.to_bytes(self._backend.record_bytes))
        with self._lock:
            self._done.add(index)
            self._release(index)

    def _vouch_for_theirs(self, stack: str, index: int, shard: _OpenShard) -> None:
        """Take over the checksums of a faster writer's rows; what he skipped is skipped."""
        nothing = xxhash.xxh3_128_hexdigest(bytes(self.manifest.stack_row_nbytes(stack)))
        theirs = self._digests_there(stack, index)
        for row, digest, ours in zip(shard.rows, theirs, shard.digests[stack], strict=True):
            if digest == nothing != ours:
                shard.skipped.setdefault(row, "skipped by another writer of this shard")
        shard.digests[stack] = theirs

    def _digests_there(self, stack: str, index: int) -> list[str]:
        """The checksums of a published shard's rows, as they are on the disk."""
        there = self._backend.rows(stack, index)
        length = self.manifest.stack_row_nbytes(stack) // self.manifest.views
        digests = []
        for views in there.offsets.tolist():
            digest = xxhash.xxh3_128()
            for offset in views:
                stored = offset >= 0
                digest.update(
                    files.read_at(there.path, offset, length) if stored else bytes(length)
                )
            digests.append(digest.hexdigest())
        return digests

    def _seconds_since_last(self) -> float:
        """Threads publish at the same time; their records' seconds add up to the wall time."""
        with self._lock:
            before, self._published = self._published, time.perf_counter()
            return self._published - before

    def _release(self, index: int) -> None:
        for fd, _ in self._open.pop(index).places.values():
            os.close(fd)


def _create_or_lock(
    path: Path,
    manifest: Manifest,
    tables: dict[str, np.ndarray],
    overwrite: bool,
    shared: bool,
) -> int:
    """The descriptor that holds the lock of the cache, which exists afterwards.

    What is there is replaced only if `overwrite` says so and it was made from something else: of
    several workers that were all told to overwrite, one does, and the others use its cache.
    """

    def same() -> bool:
        try:
            return not _differences(open_backend(path), manifest, tables)
        except CacheError:
            return False

    while is_there(path):
        if not overwrite or same():
            return lock(path, shared=shared)
        reclaimed = files.allocated_bytes(path)
        _refuse_full_disk(path, _bytes_of(manifest, tables), reclaimed)
        try:
            remove(path, unless=same)
        except CacheLocked:
            if not same():  # else another worker has just replaced it
                raise
        except FileNotFoundError:
            continue  # another worker has just removed it
    _refuse_full_disk(path, _bytes_of(manifest, tables), 0)
    document = make_document(manifest, tables, record_bytes(manifest))
    try:
        return create(path, document, tables, shared=shared)
    except FileExistsError:  # another worker was faster: use its plan
        return lock(path, shared=shared)


def _bytes_of(manifest: Manifest, tables: Mapping[str, np.ndarray]) -> int:
    ledger = manifest.shards * record_bytes(manifest)
    return manifest.nbytes + ledger + sum(table.nbytes for table in tables.values())


def _refuse_full_disk(path: Path, needed: int, reclaimed: int) -> None:
    free = files.free_bytes(path) + reclaimed
    if needed > free:
        raise NoSpace(
            f"{path}: {needed:,} bytes are still to be written and {free:,} are free: "
            "make room, choose another disk, or keep fewer taps, tokens or a smaller storage type"
        )


def _differences(
    backend: Backend, manifest: Manifest, tables: Mapping[str, np.ndarray]
) -> list[tuple[str, Any, Any]]:
    """Where a cache is not that of this job: identity, layout of the stacks, tables."""
    there, wanted = backend.manifest.to_dict(), manifest.to_dict()
    found = differences(there["identity"], wanted["identity"])
    if not found:  # the rest follows from the identity, and would only repeat it
        plan = ("storage", "rows", "views", "stacks", "targets", "splits", "final_norm", "blocks")
        for name in plan:
            found += differences(there[name], wanted[name], name)
    if not found:
        same = backend.document["tables"].keys() == tables.keys() and all(
            read_table(backend, name).tobytes() == table.tobytes() for name, table in tables.items()
        )
        found = [] if same else [("tables", "other contents", "these contents")]
    return found


def _refuse_differences(
    path: Path, backend: Backend, manifest: Manifest, tables: Mapping[str, np.ndarray]
) -> None:
    """Resuming is for the same job."""
    found = _differences(backend, manifest, tables)
    if found:
        lines = "".join(
            f"\n  {field}: {_short(a)} in the cache, {_short(b)} now" for field, a, b in found
        )
        raise IdentityMismatch(
            f"{path} was made from something else:{lines}\n"
            "choose another --out, or replace it with --overwrite",
            found,
        )


def _short(value: object) -> str:
    """A value for a message; of a digest its first twelve digits."""
    is_digest = isinstance(value, str) and len(value) == 64
    return f"{value[:12]}…" if is_digest else repr(value)  # type: ignore[index]


def _without(values: np.ndarray, start: int, skipped: Mapping[int, str]) -> np.ndarray:
    if not skipped:
        return values
    values = values.copy()
    values[[row - start for row in skipped]] = 0
    return values


@contextmanager
def _disk_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except CacheError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(
                f"{path}: the disk is full. Finished shards are kept: make room and run the same "
                "command again, it continues from there"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise NotWritable(
                f"{path} cannot be written ({error}): expected a place where this user may write; "
                "choose another --out, or change the rights"
            ) from error
        raise
