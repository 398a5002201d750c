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
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
import xxhash

from cache.containers.container import Container
from cache.containers.document import below, in_part, with_labelling, with_part
from cache.encoding import bytes_of, decode_keys
from cache.errors import CacheDamaged, LabellingMismatch
from cache.labelling import Labelling
from cache.ledger import Error, read_record
from cache.location import Location, Where
from cache.manifest import Manifest
from cache.planning import (
    Plan,
    checked_labels,
    create_or_lock,
    disk_explained,
    refuse_full_disk,
)
from cache.shards import OpenShard, check_arrays, check_errors, without_skipped
from cache.stores.store import Lock, Write
from cache.tables import check_tables, labelling_digest

MOST_HISTORY = 256  # digests of labellings that a cache remembers


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
        location: Where,
        manifest: Manifest,
        labelling: Labelling,
        tables: Mapping[str, np.ndarray],
        *,
        overwrite: bool = False,
        worker: int = 0,
        workers: int = 1,
    ) -> None:
        _check_worker(worker, workers)
        self.location = Location.of(location)
        plan = Plan(manifest, labelling, tables)
        with disk_explained(self.location):
            lock = create_or_lock(self.location, plan, overwrite=overwrite, shared=workers > 1)
        self._open_locked(lock, worker, workers, plan, overwrite)

    @classmethod
    def resume(cls, location: Where, *, worker: int = 0, workers: int = 1) -> Self:
        """Go on with the cache at a location, whatever it is: fill what is pending, extend it,
        replace its labelling. Raises CacheNotFound, and what a reader raises, beside the above."""
        _check_worker(worker, workers)
        writer = cls.__new__(cls)
        writer.location = Location.of(location)
        writer.location.open()
        with disk_explained(writer.location):
            lock = writer.location.lock(shared=workers > 1)
        writer._open_locked(lock, worker, workers)
        return writer

    def _open_locked(
        self,
        held: Lock,
        worker: int,
        workers: int,
        plan: Plan | None = None,
        overwrite: bool = False,
    ) -> None:
        self._held = held
        self._worker, self._workers = worker, workers
        self.bytes_written = 0
        self._lock = threading.Lock()
        self._open: dict[int, OpenShard] = {}
        self._closed = False
        self._published = time.perf_counter()  # the last record, or the beginning
        try:
            self._take(self.location.open())
            if plan is not None:
                plan.refuse_differences(self._container)
                self._settle_labelling(plan, overwrite)
            with disk_explained(self.location):
                self._container.sweep()
            refuse_full_disk(self.location, self._left_bytes())
        except BaseException:
            held.release()
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
        refuse_full_disk(self.location, self._left_bytes() + slots * manifest.slot_nbytes)
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
        count = check_arrays(self.manifest, arrays)
        measured = check_errors(self.manifest, errors or {})
        index, shard = self._claim(start, count, skipped)
        try:
            with disk_explained(self.location):
                written = shard.write(start, without_skipped(arrays, start, skipped))
        except BaseException:
            with self._lock:
                shard.give_back(start, count)
            raise
        with self._lock:
            self.bytes_written += written
            whole = shard.note(count, skipped, measured)
        if whole:
            with disk_explained(self.location):
                shard.publish(self._seconds_since_last())
            with self._lock:
                self._done.add(index)
                self._open.pop(index).close()

    def replace(self, slot: int, arrays: Mapping[str, np.ndarray]) -> bool:
        """Write one damaged slot of a finished shard again, in its place; whether its bytes are
        those that were there before the damage.

        arrays: per stack `(1, views, *manifest.stored_shape(stack))` in the storage dtype. Where
        they differ from the ledger's checksum (another machine's last bits), the record is replaced
        after them. Killed in between, the slot is as damaged as before.

        Raises ValueError for a slot that is not in a finished shard; CacheDamaged where the shard's
        file cannot be written in place (`forget` its shard then); NoSpace, NotWritable.
        """
        if (count := check_arrays(self.manifest, arrays)) != 1:
            raise ValueError(f"expected arrays of one slot, received {count}")
        shard = int(self.manifest.shards_of(np.array(slot)))
        if shard not in self._done:
            raise ValueError(f"slot {slot} is not in a finished shard")
        record = read_record(self._container.record(shard), self.manifest, shard)
        if record is None:
            raise CacheDamaged(f"{self.location}: the record of shard {shard} is gone")
        place = slot - record.slots[0]
        digests = {stack: list(record.digests[stack]) for stack in arrays}
        writes = {stack: self._writes(stack, shard, place, v[0]) for stack, v in arrays.items()}
        with disk_explained(self.location):
            for stack, (name, pieces) in writes.items():
                self._container.store.write_over(name, pieces)
                whole = b"".join(piece for _, piece in pieces)
                digests[stack][place] = xxhash.xxh3_128_hexdigest(whole)
            same = digests == {stack: list(record.digests[stack]) for stack in arrays}
            if not same or slot in record.skipped:
                skipped = {s: why for s, why in record.skipped.items() if s != slot}
                changed = dataclasses.replace(record, digests=digests, skipped=skipped)
                length = self._container.record_bytes(shard)
                self._container.write_record(shard, changed.to_bytes(length))
        return same

    def _writes(
        self, stack: str, shard: int, place: int, views: np.ndarray
    ) -> tuple[str, list[Write]]:
        """Where a slot's views lie: an object, and what is to be written there."""
        there = self._container.slots(stack, shard)
        writes = []
        for offset, view in zip(there.offsets[place].tolist(), views, strict=True):
            if offset < 0:
                where = self._container.store.where(there.name)
                raise CacheDamaged(f"{where} has no room for place {place} of its shard", where)
            writes.append((offset, bytes(bytes_of(view))))
        return there.name, writes

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
        for shard in self._open.values():
            shard.close()
        self._open.clear()
        with contextlib.suppress(OSError):  # what is left the next writer finds
            self._container.sweep()
        self._held.release()

    def _left_bytes(self) -> int:
        return sum(map(len, self.pending)) * self.manifest.slot_nbytes

    def _claim(self, start: int, count: int, skipped: Mapping[int, str]) -> tuple[int, OpenShard]:
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
                    shard = self._open[index] = OpenShard.begin(self._container, index)
            shard.claim(start, count)
            return index, shard

    def _seconds_since_last(self) -> float:
        """Threads publish at the same time; their records' seconds add up to the wall time."""
        with self._lock:
            before, self._published = self._published, time.perf_counter()
            return self._published - before


def _check_worker(worker: int, workers: int) -> None:
    if not 0 <= worker < workers:
        raise ValueError(f"expected 0 <= worker < workers, received {worker} of {workers}")
