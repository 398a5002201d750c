"""Verify a cache: recompute every row's checksum from the disk and name what differs.

Damage is reported, not raised, and never repaired here: `Writer.forget` makes the damaged shards
pending, and whoever can compute the rows writes them again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from cache.encoding import decode_keys
from cache.errors import CacheDamaged
from cache.ledger import read_record
from cache.manifest import Stack
from cache.reader import Reader


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is not as it was written.

    stack, row, key: None where the damage is not in one row, as in a table or the manifest.
    """

    file: Path
    reason: str
    stack: str | None = None
    row: int | None = None
    key: str | None = None

    def __str__(self) -> str:
        where = f"row {self.row} ({self.key}) of stack {self.stack}: " if self.stack else ""
        return f"{self.file}: {where}{self.reason}"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far `verify` has come, counted in rows of the cache."""

    rows_done: int
    rows: int
    bytes_done: int


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found. rows, bytes: how much was read and compared."""

    damaged: list[Damage]
    damaged_shards: list[int]
    rows: int
    bytes: int
    complete: bool

    @property
    def ok(self) -> bool:
        """Whether everything that the ledger vouches for is as it was written."""
        return not self.damaged


def verify(location: str | Path, report: Callable[[Progress], None] | None = None) -> Verification:
    """Read the whole cache and compare it with its checksums; `report` is called once a shard.

    Raises: LocationError, CacheNotFound, FormatVersionError. Damage of any kind is in the result.
    """
    try:
        reader = Reader(location, allow_incomplete=True)
    except CacheDamaged as error:
        file = error.file or Path(location).absolute()
        whole = [Damage(file=file, reason=str(error))]
        return Verification(damaged=whole, damaged_shards=[], rows=0, bytes=0, complete=False)
    damaged, keys = _check_tables(reader)
    shards: list[int] = []
    rows = 0
    with reader:
        for shard in range(reader.manifest.shards):
            if found := list(_damaged_rows(reader, shard, keys)):
                damaged += found
                shards.append(shard)
            rows += len(reader.manifest.shard_rows(shard))
            done = rows * reader.manifest.row_nbytes
            if report:
                report(Progress(rows_done=rows, rows=reader.manifest.rows, bytes_done=done))
    return Verification(
        damaged=damaged,
        damaged_shards=shards,
        rows=reader.rows_done,
        bytes=reader.rows_done * reader.manifest.row_nbytes,
        complete=reader.complete,
    )


def _check_tables(reader: Reader) -> tuple[list[Damage], list[str | None]]:
    """Damage of the tables, and the keys as far as they can be read."""
    damaged = []
    keys: list[str | None] = [None] * reader.manifest.rows
    for name in reader.backend.document["tables"]:
        try:
            table = reader.table(name)
            if name == "keys":
                keys = list(decode_keys(table))
        except CacheDamaged as error:
            file = reader.backend.table(name).path
            damaged.append(Damage(file=file, reason=str(error)))
    return damaged, keys


def _damaged_rows(reader: Reader, shard: int, keys: list[str | None]) -> Iterator[Damage]:
    data = reader.backend.record(shard)
    record = read_record(data, reader.manifest, shard)
    rows = reader.manifest.shard_rows(shard)
    if record is None:
        if data and any(data):  # zeros only mean: not done yet
            file, reason = reader.backend.record_place(shard).path, "its ledger record is damaged"
            for stack in reader.manifest.stacks:
                for row in rows:
                    yield Damage(file=file, reason=reason, stack=stack.name, row=row, key=keys[row])
        return
    for stack in reader.manifest.stacks:
        for row, expected in zip(rows, record.digests[stack.name], strict=True):
            try:
                file, digest = _row_digest(reader, stack, row)
                reason = "its bytes do not match its checksum" if digest != expected else ""
            except CacheDamaged as error:
                file, reason = error.file or reader.location, str(error)
            if reason:
                yield Damage(file=file, reason=reason, stack=stack.name, row=row, key=keys[row])


def _row_digest(reader: Reader, stack: Stack, row: int) -> tuple[Path, str]:
    """The file that holds a row, and the checksum of what is there now."""
    digest = xxhash.xxh3_128()
    for view in range(reader.manifest.views):
        digest.update(reader.read([row], stack=stack.name, view=view).data)
    extents = reader.backend.rows(stack.name, row // reader.manifest.rows_per_shard)
    return extents.path, digest.hexdigest()
