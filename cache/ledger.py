"""The ledger: one record per finished shard, with a checksum of every slot.

A record is published after the shard's data are on disk, so its presence is the proof that the
shard is whole. It is a zero-padded run of bytes of fixed length, which each container keeps in its
own way. It ends in a checksum of itself: a record torn by a power cut counts as not there.

A record may also say what rounding to the storage type lost, where the caller measured it, and how
long its shard took to write.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import xxhash

from cache.documents import canonical_json
from cache.manifest import Manifest

REASON_BYTES = 160  # of the reason's JSON text: longer ones are cut

# Sum of squared errors, sum of squared exact values, worst relative error of one token
Error = tuple[float, float, float]

_NUMBER_BYTES = 24  # the longest that JSON makes of a float: -1.2345678901234567e-308
_CHECK = b',"check":"'
_TAIL_BYTES = len(_CHECK) + 32 + len(b'"}')


@dataclass(frozen=True, kw_only=True)
class Record:
    """What the ledger says of one finished shard.

    slots: (first, one past the last), counted through all parts.
    digests: per stack, one xxh3_128 hex digest per slot, over its bytes in all views.
    skipped: reason per slot that has no features; its bytes are zeros.
    error: per stack that was measured, what rounding lost; sums and maximum over the shard.
    seconds: wall time since the record before it, in the process that wrote both.
    """

    shard: int
    slots: tuple[int, int]
    digests: Mapping[str, Sequence[str]]
    skipped: Mapping[int, str]
    error: Mapping[str, Error] = field(default_factory=dict)
    seconds: float | None = None

    def to_bytes(self, record_bytes: int) -> bytes:
        """The record, padded with zeros to `record_bytes`.

        Where a cache was laid out before records had an `error` or `seconds`, and there is no
        room, they are left out.
        """
        without = replace(self, error={})
        for record in (self, replace(self, seconds=None), without, replace(without, seconds=None)):
            text = record._text()
            if len(text) <= record_bytes:
                return text.ljust(record_bytes, b"\0")
        raise AssertionError((len(text), record_bytes))

    def _text(self) -> bytes:
        document: dict[str, Any] = {
            "shard": self.shard,
            "rows": list(self.slots),
            "digests": {stack: list(digests) for stack, digests in self.digests.items()},
            "skipped": {str(slot): _cut(reason) for slot, reason in self.skipped.items()},
        }
        if self.error:
            document["error"] = {stack: list(error) for stack, error in self.error.items()}
        if self.seconds is not None:
            document["seconds"] = round(self.seconds, 3)
        head = canonical_json(document).encode()[:-1]
        return head + _CHECK + xxhash.xxh3_128_hexdigest(head).encode() + b'"}'

    @classmethod
    def from_bytes(cls, data: bytes) -> Self | None:
        """Read a record; None when the shard is not done or the record is torn."""
        record = data.rstrip(b"\0")
        head, tail = record[:-_TAIL_BYTES], record[-_TAIL_BYTES:]
        if tail != _CHECK + xxhash.xxh3_128_hexdigest(head).encode() + b'"}':
            return None
        document = json.loads(record)
        first, end = document["rows"]
        return cls(
            shard=document["shard"],
            slots=(first, end),
            digests=document["digests"],
            skipped={int(slot): reason for slot, reason in document["skipped"].items()},
            error={stack: tuple(error) for stack, error in document.get("error", {}).items()},
            seconds=document.get("seconds"),
        )

    def belongs_to(self, manifest: Manifest, shard: int) -> bool:
        """Whether it describes that shard of that cache."""
        slots = manifest.shard_slots(shard)
        return (
            (self.shard, self.slots) == (shard, (slots.start, slots.stop))
            and set(self.digests) == {stack.name for stack in manifest.stacks}
            and all(len(digests) == len(slots) for digests in self.digests.values())
        )


def record_bytes(manifest: Manifest, part: int) -> int:
    """Length of a part's records: room for digests, a reason on every slot, errors and seconds."""
    slots = min(manifest.slots_per_shard, manifest.parts[part])
    digests = sum(len(stack.name) + 8 + slots * 35 for stack in manifest.stacks)
    skipped = slots * (REASON_BYTES + len(str(manifest.slots)) + 4)
    error = sum(len(stack.name) + 8 + 3 * _NUMBER_BYTES for stack in manifest.stacks)
    seconds = len('"seconds":,') + _NUMBER_BYTES
    return 256 + digests + skipped + len('"error":{},') + error + seconds


def read_record(data: bytes | None, manifest: Manifest, shard: int) -> Record | None:
    """The record of a shard out of its bytes; None when absent, torn or of another shard."""
    record = Record.from_bytes(data) if data else None
    return record if record and record.belongs_to(manifest, shard) else None


def add_errors(errors: Iterable[Error]) -> Error:
    """The error of all rows together; the same whatever the order, to the last bit."""
    squares, exact, worst = zip(*errors, strict=True)
    return math.fsum(squares), math.fsum(exact), max(worst)


def _cut(reason: str) -> str:
    while len(canonical_json(reason)) - 2 > REASON_BYTES:
        reason = reason[:-1]
    return reason
