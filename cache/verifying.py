"""Verify a cache: recompute every row's checksum from the disk and name what differs.

Damage is reported, not raised, and never repaired here: `Writer.replace` writes rows again that
somebody has computed, `Writer.forget` makes a shard pending that is lost as a whole. Slots that no
row has any more are not looked at.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from cache.errors import CacheDamaged
from cache.ledger import read_record
from cache.location import Location, Where
from cache.reader import Reader
from cache.tables import check_table


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is not as it was written.

    stack, row, key: None where the damage is not in one row, as in a table or the manifest.
    """

    file: str
    reason: str
    stack: str | None = None
    row: int | None = None
    key: str | None = None

    def __str__(self) -> str:
        where = f"row {self.row} ({self.key}) of stack {self.stack}: " if self.stack else ""
        return f"{self.file}: {where}{self.reason}"


@dataclass(frozen=True, kw_only=True)
class Verified:
    """How far `verify` has come, counted in rows of the cache."""

    rows_done: int
    rows: int
    bytes_done: int


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found. rows, bytes: how much was read and compared; lost_shards: those of which
    single rows cannot be written again in their places."""

    damaged: list[Damage]
    lost_shards: list[int]
    rows: int
    bytes: int
    complete: bool

    @property
    def ok(self) -> bool:
        """Whether everything that the ledger vouches for is as it was written."""
        return not self.damaged


def verify(location: Where, report: Callable[[Verified], None] | None = None) -> Verification:
    """Read the whole cache and compare it with its checksums; `report` is called once a shard.

    Raises: LocationError, CacheNotFound, FormatVersionError. Damage of any kind is in the result.
    """
    try:
        reader = Reader(location, allow_incomplete=True)
    except CacheDamaged as error:
        file = error.file or str(Location.of(location))
        whole = [Damage(file=file, reason=str(error))]
        return Verification(damaged=whole, lost_shards=[], rows=0, bytes=0, complete=False)
    damaged, keys = _check_tables(reader)
    lost: list[int] = []
    done = 0
    rows_of = _rows_by_shard(reader)
    with reader:
        for shard, rows in rows_of.items():
            found, is_lost = _damage(reader, shard, rows, keys)
            damaged += found
            lost += [shard] if is_lost else []
            done += len(rows)
            if report:
                bytes_done = done * reader.manifest.slot_nbytes
                report(Verified(rows_done=done, rows=reader.rows, bytes_done=bytes_done))
    return Verification(
        damaged=damaged,
        lost_shards=lost,
        rows=reader.rows_done,
        bytes=reader.rows_done * reader.manifest.slot_nbytes,
        complete=reader.complete,
    )


def _rows_by_shard(reader: Reader) -> dict[int, list[int]]:
    shards: dict[int, list[int]] = {}
    order = np.argsort(reader.slots, kind="stable")
    of = reader.manifest.shards_of(reader.slots[order]).tolist()
    for row, shard in zip(order.tolist(), of, strict=True):
        shards.setdefault(shard, []).append(row)
    return shards


def _check_tables(reader: Reader) -> tuple[list[Damage], list[str | None]]:
    """Damage of the tables, and the keys as far as they can be read."""
    damaged = []
    keys: list[str | None] = [None] * reader.rows
    for name in reader.container.document["tables"]:
        try:
            check_table(reader.container, name)
        except CacheDamaged as error:
            file = reader.container.store.where(reader.container.table(name).name)
            damaged.append(Damage(file=file, reason=str(error)))
    with contextlib.suppress(CacheDamaged):
        keys = list(reader.keys)
    return damaged, keys


def _damage(
    reader: Reader, shard: int, rows: list[int], keys: list[str | None]
) -> tuple[list[Damage], bool]:
    """What is damaged of these rows of a shard, and whether the shard is lost: no row of it can be
    told from the others, or its file cannot be read in place."""
    data = reader.container.record(shard)
    record = read_record(data, reader.manifest, shard)
    stacks = [stack.name for stack in reader.manifest.stacks]
    where = reader.container.store.where

    def all_rows(file: str, reason: str, stacks: Sequence[str]) -> list[Damage]:
        return [
            Damage(file=file, reason=reason, stack=stack, row=row, key=keys[row])
            for stack in stacks
            for row in rows
        ]

    if record is None:
        if not data or not any(data):  # zeros only mean: not done yet
            return [], False
        place = reader.container.record_place(shard).name
        return all_rows(where(place), "its ledger record is damaged", stacks), True
    found: list[Damage] = []
    lost = False
    for stack in stacks:
        try:
            file = where(reader.container.slots(stack, shard).name)
        except CacheDamaged as error:
            found += all_rows(error.file or reader.location, str(error), [stack])
            lost = True
            continue
        for row in rows:
            expected = record.digests[stack][int(reader.slots[row]) - record.slots[0]]
            try:
                same = row_digest(reader, stack, row) == expected
                reason = "" if same else "its bytes do not match its checksum"
            except CacheDamaged as error:
                reason, lost = str(error), True
            if reason:
                found.append(Damage(file=file, reason=reason, stack=stack, row=row, key=keys[row]))
    return found, lost


def row_digest(reader: Reader, stack: str, row: int) -> str:
    """The checksum of a row's bytes as they are now. Raises CacheDamaged."""
    digest = xxhash.xxh3_128()
    for view in range(reader.manifest.views):
        digest.update(reader.read([row], stack=stack, view=view).data)
    return digest.hexdigest()
