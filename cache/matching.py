"""Which of a source's inputs a cache knows: by key and digest, whatever their order."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cache.reader import Reader


@dataclass(frozen=True, kw_only=True)
class Matching:
    """The inputs of a source beside the rows and slots of a cache.

    slots: int64 (inputs,), where each input's features lie or will lie, -1 where nowhere yet.
    new, changed: numbers of inputs that have no slot; of a `changed` one, the key is a row's whose
        input was another. vanished: rows whose key no input has any more.
    same: whether the inputs are the cache's rows, with their keys, in their order.
    """

    slots: np.ndarray
    new: list[int]
    changed: list[int]
    vanished: list[int]
    same: bool

    @property
    def missing(self) -> list[int]:
        """Numbers of the inputs that have no slot, in order."""
        return sorted([*self.new, *self.changed])


def match(reader: Reader, keys: Sequence[str], digests: np.ndarray) -> Matching:
    """Find inputs, (N,) keys and (N, 32) SHA-256 digests, among the slots of a cache.

    The same bytes give the same features, whatever the file is called: an input that has no slot of
    its own shares that of one alike. A slot whose input was given up (see `Writer.write`,
    `skipped`) counts: reading it failed, and the same bytes would fail again. Of several slots of
    one input the last counts. Raises NameMissing if the cache keeps no digests.
    """
    told = list(map(bytes, reader.slot_sha256))
    own = {each: slot for slot, each in enumerate(zip(reader.slot_keys, told, strict=True))}
    alike = {digest: slot for slot, digest in enumerate(told)}
    wanted = [(key, bytes(digest)) for key, digest in zip(keys, digests, strict=True)]
    found = [own.get(each, alike.get(each[1], -1)) for each in wanted]
    slots, rows = np.array(found, np.int64), reader.keys
    known, asked = set(rows), set(keys)
    missing = np.flatnonzero(slots < 0).tolist()
    return Matching(
        slots=slots,
        new=[number for number in missing if keys[number] not in known],
        changed=[number for number in missing if keys[number] in known],
        vanished=[row for row, key in enumerate(rows) if key not in asked],
        same=list(keys) == rows and slots.tolist() == reader.slots.tolist(),
    )
