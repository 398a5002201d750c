"""One shard in the making: which of its slots are claimed, what they hash to, and its publication.

Knows nothing of other shards, nor of locks: `Writer` sees to it that one thread at a time changes
what is noted here. Bytes are written by many.
"""

import math
from collections.abc import Mapping
from typing import Self

import numpy as np
import xxhash

from cache.containers.container import Container
from cache.encoding import bytes_of
from cache.ledger import Error, Record, add_errors
from cache.manifest import Manifest
from cache.stores.store import Draft


class OpenShard:
    """A shard that is being filled. `skipped` and `errors` collect what its record will say."""

    def __init__(self, container: Container, index: int, drafts: dict[str, Draft]) -> None:
        self._container, self._index, self._drafts = container, index, drafts
        self.slots = container.manifest.shard_slots(index)
        self._claimed = np.zeros(len(self.slots), bool)
        self._left = len(self.slots)
        self._digests = {stack: [""] * len(self.slots) for stack in drafts}
        self._skipped: dict[int, str] = {}
        self._errors: dict[str, list[Error]] = {}

    @classmethod
    def begin(cls, container: Container, index: int) -> Self:
        """Make room for it in every stack."""
        drafts: dict[str, Draft] = {}
        try:
            for stack in container.manifest.stacks:
                drafts[stack.name] = container.begin(stack.name, index)
        except BaseException:
            for draft in drafts.values():
                draft.discard()
            raise
        return cls(container, index, drafts)

    def claim(self, start: int, count: int) -> None:
        """Take slots. Raises ValueError if one has been taken."""
        claimed = self._claimed[self._part(start, count)]
        if claimed.any():
            raise ValueError(f"slot {start + int(claimed.argmax())} was already written")
        claimed[:] = True

    def give_back(self, start: int, count: int) -> None:
        """Let somebody else claim the slots."""
        self._claimed[self._part(start, count)] = False

    def write(self, start: int, arrays: Mapping[str, np.ndarray]) -> int:
        """Write claimed slots, from `start` on; how many bytes that were."""
        local, written = start - self.slots.start, 0
        for name, values in arrays.items():
            slots = np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)
            for position, slot in enumerate(slots, local):
                self._digests[name][position] = xxhash.xxh3_128_hexdigest(slot.data)
            self._drafts[name].write(bytes_of(slots), local * slots.shape[1])
            written += slots.nbytes
        return written

    def note(self, count: int, skipped: Mapping[int, str], errors: Mapping[str, Error]) -> bool:
        """Slots are written; whether all are."""
        self._skipped.update(skipped)
        for stack, error in errors.items():
            self._errors.setdefault(stack, []).append(error)
        self._left -= count
        return self._left == 0

    def publish(self, seconds: float) -> None:
        """Data to the disk first, then the record that vouches for them: for ours, or for those of
        a writer who was faster, whose last bits may differ."""
        for stack, draft in self._drafts.items():
            if not self._container.seal(stack, self._index, draft):
                self._vouch_for_theirs(stack)
        record = Record(
            shard=self._index,
            slots=(self.slots.start, self.slots.stop),
            digests=self._digests,
            skipped=self._skipped,
            error={stack: add_errors(parts) for stack, parts in self._errors.items()},
            seconds=seconds,
        )
        length = self._container.record_bytes(self._index)
        self._container.write_record(self._index, record.to_bytes(length))

    def close(self) -> None:
        """Give up what has not been published."""
        for draft in self._drafts.values():
            draft.discard()

    def _part(self, start: int, count: int) -> slice:
        return slice(start - self.slots.start, start - self.slots.start + count)

    def _vouch_for_theirs(self, stack: str) -> None:
        """Take over the checksums of a faster writer's slots; what he skipped is skipped."""
        nothing = xxhash.xxh3_128_hexdigest(
            bytes(self._container.manifest.stack_slot_nbytes(stack))
        )
        theirs = self._digests_there(stack)
        for slot, digest, ours in zip(self.slots, theirs, self._digests[stack], strict=True):
            if digest == nothing != ours:
                self._skipped.setdefault(slot, "skipped by another writer of this shard")
        self._digests[stack] = theirs

    def _digests_there(self, stack: str) -> list[str]:
        """The checksums of a published shard's slots, as they are in the store."""
        there, manifest = self._container.slots(stack, self._index), self._container.manifest
        length = manifest.stack_slot_nbytes(stack) // manifest.views
        digests = []
        for views in there.offsets.tolist():
            digest = xxhash.xxh3_128()
            for offset in views:
                stored = offset >= 0
                digest.update(
                    self._container.store.read(there.name, offset, length)
                    if stored
                    else bytes(length)
                )
            digests.append(digest.hexdigest())
        return digests


def check_arrays(manifest: Manifest, arrays: Mapping[str, np.ndarray]) -> int:
    """The number of slots, after checking names, shapes and dtypes. Raises ValueError."""
    names = [stack.name for stack in manifest.stacks]
    if sorted(arrays) != sorted(names):
        raise ValueError(f"expected arrays for stacks {names}, received {sorted(arrays)}")
    count = len(arrays[names[0]])
    for stack in manifest.stacks:
        expected = (count, manifest.views, *manifest.stored_shape(stack.name))
        received = arrays[stack.name]
        if received.shape != expected or received.dtype != manifest.dtype:
            raise ValueError(
                f"stack {stack.name!r}: expected {manifest.dtype} {expected} "
                f"(slot, view, tap, token, stored width), "
                f"received {received.dtype} {received.shape}"
            )
    return count


def check_errors(manifest: Manifest, errors: Mapping[str, Error]) -> dict[str, Error]:
    """The errors that are finite, after checking their names and lengths.

    Raises ValueError, NameMissing.
    """
    finite = {}
    for name, error in errors.items():
        manifest.stack(name)
        if len(error) != 3:
            raise ValueError(
                f"error of stack {name!r}: expected three numbers (sum of squared errors, sum "
                f"of squared values, worst relative error of a token), received {error}"
            )
        if all(map(math.isfinite, error)):
            finite[name] = float(error[0]), float(error[1]), float(error[2])
    return finite


def without_skipped(
    arrays: Mapping[str, np.ndarray], start: int, skipped: Mapping[int, str]
) -> Mapping[str, np.ndarray]:
    """The same arrays, whose first slot is `start`, with zeros for the slots that are skipped."""
    if not skipped:
        return arrays
    zeroed = {name: values.copy() for name, values in arrays.items()}
    for values in zeroed.values():
        values[[slot - start for slot in skipped]] = 0
    return zeroed
