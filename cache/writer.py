"""Writing a cache: create or resume, fill shard after shard, publish each when it is whole.

The order is the whole safety: the plan (manifest and tables) appears complete or not at all; a
shard's bytes are forced to the disk before its ledger record is written. A process killed anywhere
leaves finished shards, and others that count as not begun. Whoever runs the same job again writes
the rest, and the result is the same as without the interruption. An update goes the same way: a new
part appears as a plan, its shards are filled, and then the labelling that speaks of its slots
replaces the one before.

This module does not know what the numbers mean, nor which container holds them.
"""

import contextlib
import dataclasses
import math
import os
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import xxhash

from cache import files
from cache.containers.container import Container, Extent
from cache.containers.document import below, in_part, with_labelling, with_part
from cache.encoding import decode_keys
from cache.errors import CacheDamaged, LabellingMismatch
from cache.labelling import Labelling
from cache.ledger import Error, Record, add_errors, read_record
from cache.location import container_of, lock, open_container
from cache.manifest import Manifest
from cache.planning import (
    Plan,
    checked_labels,
    create_or_lock,
    disk_explained,
    refuse_full_disk,
)
from cache.tables import check_tables, labelling_digest

MOST_HISTORY = 256  # digests of labellings that a cache remembers


@dataclass
class _OpenShard:
    """A shard that is being filled: where it goes, which slots are claimed, what they hash to."""

    slots: range
    places: dict[str, tuple[int, Extent]]  # stack: (fd, where the shard's first slot goes)
    claimed: np.ndarray  # bool (slots,)
    left: int
    digests: dict[str, list[str]]
    skipped: dict[int, str] = field(default_factory=dict)
    errors: dict[str, list[Error]] = field(default_factory=dict)


class Writer:
    """Fill the cache at a location; a context manager, safe to call from many threads.

    Creates the cache, or resumes it if it holds the same features of the same inputs; `overwrite`
    replaces one of others. `tables` are the small arrays of docs/format.md: `keys` always,
    `source_sha256`, `final_norm/weight` and `final_norm/bias` if there are, and those that the
    labelling asks for. A cache that is there keeps its labelling, whatever it has become; if the
    source says something else than when the cache was made, that is an error, or, with `overwrite`,
    the new labelling.

    worker, workers: of several processes that fill one cache together, each owns the shards
    `worker, worker + workers, ...`; every number should be given to one process only. Where one is
    given twice, or where the file system has no locks, in Zarr the first whole shard stays, and
    whoever comes later vouches for its bytes. In HDF5 they write over each other.

    Raises:
        LocationError: the suffix is neither .zarr nor .h5.
        IdentityMismatch: a cache of other features is there; names every field.
        LabellingMismatch: these features are there, and the source asks other things of them now.
        CacheLocked: another process is writing it.
        NoSpace: what is still to be written is more than the file system has free.
        NotWritable: the cache must be made or changed, and this user may not.
        ValueError: a table does not fit the manifest or the labelling.
    """

    def __init__(
        self,
        location: str | Path,
        manifest: Manifest,
        labelling: Labelling,
        tables: Mapping[str, np.ndarray],
        *,
        overwrite: bool = False,
        worker: int = 0,
        workers: int = 1,
    ) -> None:
        _check_worker(worker, workers)
        container_of(location)
        path = Path(location).absolute()
        plan = Plan(manifest, labelling, tables)
        with disk_explained(path):
            lock_fd = create_or_lock(path, plan, overwrite=overwrite, shared=workers > 1)
        self._open_locked(path, lock_fd, worker, workers, plan, overwrite)

    @classmethod
    def resume(cls, location: str | Path, *, worker: int = 0, workers: int = 1) -> Self:
        """Go on with the cache at a location, whatever it is: fill what is pending, extend it,
        replace its labelling. Raises CacheNotFound, and what a reader raises, beside the above."""
        _check_worker(worker, workers)
        path = open_container(location).path
        writer = cls.__new__(cls)
        with disk_explained(path):
            lock_fd = lock(path, shared=workers > 1)
        writer._open_locked(path, lock_fd, worker, workers)
        return writer

    def _open_locked(
        self,
        path: Path,
        lock_fd: int,
        worker: int,
        workers: int,
        plan: Plan | None = None,
        overwrite: bool = False,
    ) -> None:
        self.location, self._lock_fd = path, lock_fd
        self._worker, self._workers = worker, workers
        self.bytes_written = 0
        self._lock = threading.Lock()
        self._open: dict[int, _OpenShard] = {}
        self._closed = False
        self._published = time.perf_counter()  # the last record, or the beginning
        try:
            self._take(open_container(path))
            if plan is not None:
                plan.refuse_differences(path, self._container)
                self._settle_labelling(plan, overwrite)
            with disk_explained(path):
                self._container.sweep()
            refuse_full_disk(path, self._left_bytes(), 0)
        except BaseException:
            os.close(lock_fd)
            raise

    def _take(self, container: Container) -> None:
        """Use the cache as it is now."""
        self._container, self.manifest = container, container.manifest
        self._done = {
            shard
            for shard in range(self.manifest.shards)
            if read_record(container.record(shard), self.manifest, shard)
        }
        self._owned = range(self._worker, self.manifest.shards, self._workers)

    def _settle_labelling(self, plan: Plan, overwrite: bool) -> None:
        before = labelling_digest(self._container)
        if plan.digest in (before, *self._container.labelling.history):
            return
        if not overwrite:
            raise LabellingMismatch(
                f"{self.location} holds these features already, and its inputs are asked other "
                f"things now (labels, splits or groups): `sidecache label {self.location} SOURCE` "
                "takes that over, and computes no feature",
                [("labelling", before, plan.digest)],
            )
        self.label(plan.labelling, plan.labels, plan.digest)

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
        """Slot ranges of this worker's shards that are not done, in order."""
        return [self.manifest.shard_slots(s) for s in self._owned if s not in self._done]

    @property
    def slots_done(self) -> int:
        """Slots of this worker's finished shards, those of earlier runs included."""
        return sum(len(self.manifest.shard_slots(s)) for s in self._owned if s in self._done)

    def extend(self, tables: Mapping[str, np.ndarray]) -> range:
        """Add a part with a slot for each of `tables["keys"]`; its slots, all pending.

        `tables` have a value a slot: `keys`, and of `source_sha256` and `lengths/<stack>` those
        that the cache has. No row has these slots until a labelling speaks of them.

        Raises ValueError for a table that does not fit; NoSpace, NotWritable.
        """
        part = len(self.manifest.parts)
        slots = len(decode_keys(tables["keys"]))
        manifest = dataclasses.replace(self.manifest, parts=(*self.manifest.parts, slots))
        stored = {in_part(part, n): t for n, t in check_tables(manifest, tables, part).items()}
        for name in ("source_sha256", *(f"lengths/{stack.name}" for stack in manifest.stacks)):
            if (name in self._container.document["tables"]) != (in_part(part, name) in stored):
                raise ValueError(f"table {name!r}: expected it for all parts of the cache or none")
        refuse_full_disk(self.location, self._left_bytes() + slots * manifest.slot_nbytes, 0)
        document = with_part(self._container.document, slots, stored)
        self._amend(document, stored)
        return range(self.manifest.part_starts[part], self.manifest.slots)

    def label(
        self,
        labelling: Labelling,
        tables: Mapping[str, np.ndarray],
        digest: str,
        *,
        heard: str | None = None,
    ) -> None:
        """Replace the labelling, in one step; readers that have the cache open keep the old one.

        `tables` are those that it asks for, with `slots` unless row r lies in slot r; `digest` is
        its `Labelling.digest`. `heard` is the digest of what a source said, if not all of it was
        taken over: it is no news from now on. Raises ValueError for a table that does not fit;
        NotWritable.
        """
        stored = checked_labels(self.manifest, labelling, tables, tables.keys())
        old = self._container.labelling.history or (labelling_digest(self._container),)
        news = [heard, digest] if heard else [digest]
        history = (*(each for each in old if each not in news), *news)[-MOST_HISTORY:]
        labelling = dataclasses.replace(labelling, history=history)
        at = f"labellings/{uuid.uuid4().hex[:12]}"
        placed = {below(at, name): table for name, table in stored.items()}
        document = with_labelling(self._container.document, labelling, digest, placed, at=at)
        self._amend(document, placed)

    def _amend(self, document: dict[str, Any], tables: Mapping[str, np.ndarray]) -> None:
        if self._open or self._workers > 1:
            raise ValueError("only a writer that is alone, and between shards, changes the cache")
        with disk_explained(self.location):
            self._take(self._container.amend(document, tables))

    def write(
        self,
        start: int,
        arrays: Mapping[str, np.ndarray],
        skipped: Mapping[int, str] | None = None,
        errors: Mapping[str, Error] | None = None,
    ) -> None:
        """Write consecutive slots of one pending shard; with its last slot, publish the shard.

        arrays: per stack `(n, views, *manifest.stored_shape(stack))` in the storage dtype, slot
            `start` first.
        skipped: reason per absolute slot that has no features; its values are written as zeros.
        errors: what rounding to the storage type lost, as far as the caller measured it on some of
            these slots: per stack, sum of squared errors, sum of squared exact values, worst
            relative error of one token. The ledger keeps sums and maximum of the shard. Numbers
            that are not finite (sums that overflowed) count as not measured.
        Threads may write different slots at the same time, in any order.

        Raises:
            ValueError: a stack, shape, dtype or error is not as expected, or the slots are not
                pending.
            NameMissing: `errors` names a stack that the cache does not hold.
            NoSpace: the disk is full; what is published stays.
            NotWritable: this user may not write there.
        """
        start = int(start)
        skipped = {int(slot): reason for slot, reason in (skipped or {}).items()}
        count = self._check_arrays(arrays)
        measured = self._check_errors(errors or {})
        index, shard = self._claim(start, count, skipped)
        local = start - shard.slots.start
        try:
            with disk_explained(self.location):
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

    def replace(self, slot: int, arrays: Mapping[str, np.ndarray]) -> bool:
        """Write one damaged slot of a finished shard again, in its place; whether its bytes are
        those that were there before the damage.

        arrays: per stack `(1, views, *manifest.stored_shape(stack))` in the storage dtype. Where
        they differ from the ledger's checksum (another machine's last bits), the record is replaced
        after them. Killed in between, the slot is as damaged as before.

        Raises ValueError for a slot that is not in a finished shard; CacheDamaged where the shard's
        file cannot be written in place (`forget` its shard then); NoSpace, NotWritable.
        """
        if (count := self._check_arrays(arrays)) != 1:
            raise ValueError(f"expected arrays of one slot, received {count}")
        shard = int(self.manifest.shards_of(np.array(slot)))
        if shard not in self._done:
            raise ValueError(f"slot {slot} is not in a finished shard")
        record = read_record(self._container.record(shard), self.manifest, shard)
        if record is None:
            raise CacheDamaged(f"{self.location}: the record of shard {shard} is gone")
        place = slot - record.slots[0]
        digests = {stack: list(record.digests[stack]) for stack in arrays}
        with disk_explained(self.location):
            for stack, values in arrays.items():
                there = self._container.slots(stack, shard)
                with files.opened(there.path, os.O_WRONLY) as fd:
                    for view, offset in enumerate(there.offsets[place].tolist()):
                        if offset < 0:
                            raise CacheDamaged(f"{there.path}: no room for slot {slot}", there.path)
                        data = np.ascontiguousarray(values[0, view])
                        files.write_all(fd, data.reshape(-1).view(np.uint8).data, offset)
                    os.fsync(fd)
                digests[stack][place] = _digest(np.ascontiguousarray(values[0]))
            same = digests == {stack: list(record.digests[stack]) for stack in arrays}
            if not same or slot in record.skipped:
                skipped = {s: why for s, why in record.skipped.items() if s != slot}
                changed = dataclasses.replace(record, digests=digests, skipped=skipped)
                length = self._container.record_bytes(shard)
                self._container.write_record(shard, changed.to_bytes(length))
        return same

    def forget(self, shards: Iterable[int]) -> None:
        """Drop the ledger records of shards, so that they are pending again."""
        for shard in shards:
            self._container.forget(shard)
            self._done.discard(shard)

    def close(self) -> None:
        """Give up what is not whole and release the lock; the published shards stay."""
        if self._closed:
            return
        self._closed = True
        for index, shard in list(self._open.items()):
            self._release(index)
            for stack, (_, extent) in shard.places.items():
                self._container.discard(stack, index, extent)
        with contextlib.suppress(OSError):  # what is left the next writer finds
            self._container.sweep()
        os.close(self._lock_fd)

    def _left_bytes(self) -> int:
        return sum(map(len, self.pending)) * self.manifest.slot_nbytes

    def _check_arrays(self, arrays: Mapping[str, np.ndarray]) -> int:
        """The number of slots, after checking names, shapes and dtypes."""
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
                    f"(slot, view, tap, token, stored width), "
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
        """Take slots for the calling thread; begins their shard with its first ones."""
        index = int(self.manifest.shards_of(np.array(start)))
        with self._lock:
            if self._closed:
                raise ValueError("the writer is closed")
            if count < 1 or index not in self._owned or index in self._done:
                raise ValueError(f"slots {start} to {start + count - 1} are not in a pending shard")
            slots = self.manifest.shard_slots(index)
            if start + count > slots.stop:
                raise ValueError(
                    f"slots {start} to {start + count - 1} reach past their shard, "
                    f"which is slots {slots.start} to {slots.stop - 1}"
                )
            if any(not start <= slot < start + count for slot in skipped):
                raise ValueError(f"skipped {list(skipped)}: expected slots among those written")
            shard = self._open.get(index)
            if shard is None:
                with disk_explained(self.location):
                    shard = self._open[index] = self._begin(index, slots)
            claimed = shard.claimed[start - slots.start : start - slots.start + count]
            if claimed.any():
                raise ValueError(f"slot {start + int(claimed.argmax())} was already written")
            claimed[:] = True
            return index, shard

    def _begin(self, index: int, slots: range) -> _OpenShard:
        places: dict[str, tuple[int, Extent]] = {}
        try:
            for stack in self.manifest.stacks:
                extent = self._container.begin(stack.name, index)
                fd = os.open(extent.path, os.O_WRONLY)
                places[stack.name] = fd, extent
                files.try_lock(fd, shared=True)  # says that somebody lives who writes this file
        except BaseException:
            for fd, _ in places.values():
                os.close(fd)
            raise
        digests = {stack.name: [""] * len(slots) for stack in self.manifest.stacks}
        claimed = np.zeros(len(slots), bool)
        return _OpenShard(slots, places, claimed, len(slots), digests)

    def _write_stack(self, shard: _OpenShard, name: str, local: int, values: np.ndarray) -> None:
        slots = np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)
        for position, slot in enumerate(slots, local):
            shard.digests[name][position] = xxhash.xxh3_128_hexdigest(slot.data)
        fd, extent = shard.places[name]
        files.write_all(fd, slots.reshape(-1).data, extent.offset + local * slots.shape[1])
        with self._lock:
            self.bytes_written += slots.nbytes

    def _publish(self, index: int, shard: _OpenShard) -> None:
        """Data to the disk first, then the record that vouches for them: for ours, or for those of
        a writer who was faster, whose last bits may differ."""
        with disk_explained(self.location):
            for stack, (fd, extent) in shard.places.items():
                if not self._container.seal(stack, index, fd, extent):
                    self._vouch_for_theirs(stack, index, shard)
            record = Record(
                shard=index,
                slots=(shard.slots.start, shard.slots.stop),
                digests=shard.digests,
                skipped=shard.skipped,
                error={stack: add_errors(parts) for stack, parts in shard.errors.items()},
                seconds=self._seconds_since_last(),
            )
            self._container.write_record(
                index, record.to_bytes(self._container.record_bytes(index))
            )
        with self._lock:
            self._done.add(index)
            self._release(index)

    def _vouch_for_theirs(self, stack: str, index: int, shard: _OpenShard) -> None:
        """Take over the checksums of a faster writer's slots; what he skipped is skipped."""
        nothing = xxhash.xxh3_128_hexdigest(bytes(self.manifest.stack_slot_nbytes(stack)))
        theirs = self._digests_there(stack, index)
        for slot, digest, ours in zip(shard.slots, theirs, shard.digests[stack], strict=True):
            if digest == nothing != ours:
                shard.skipped.setdefault(slot, "skipped by another writer of this shard")
        shard.digests[stack] = theirs

    def _digests_there(self, stack: str, index: int) -> list[str]:
        """The checksums of a published shard's slots, as they are on the disk."""
        there = self._container.slots(stack, index)
        length = self.manifest.stack_slot_nbytes(stack) // self.manifest.views
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


def _without(values: np.ndarray, start: int, skipped: Mapping[int, str]) -> np.ndarray:
    if not skipped:
        return values
    values = values.copy()
    values[[slot - start for slot in skipped]] = 0
    return values


def _digest(slot: np.ndarray) -> str:
    """The ledger's checksum of one slot of a stack, (views, taps, tokens, stored width)."""
    return xxhash.xxh3_128_hexdigest(slot.reshape(-1).view(np.uint8).data)


def _check_worker(worker: int, workers: int) -> None:
    if not 0 <= worker < workers:
        raise ValueError(f"expected 0 <= worker < workers, received {worker} of {workers}")
