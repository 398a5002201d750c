"""The manifest: what the features of a cache are, before any of them exist.

A manifest has two kinds of content. The **identity** says what decides the numbers of a row beside
its input (the caller chooses the fields: backbone, weights, preprocessing, ...); its hash, with the
format version, is the **fingerprint**. The rest says how the numbers are laid out. Neither knows
which inputs there are, what is asked of them (see `labelling.py`), where the cache lies, when it
was made, or which container holds it.

A **slot** is the place of one input's features. Slots come in **parts**: those that the cache was
made with, and those that each later update added. A part begins with a new shard and is never
changed by another.
"""

import bisect
import functools
import hashlib
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from cache.documents import canonical_json, plain_json
from cache.encoding import STORAGE
from cache.errors import CacheDamaged, NameMissing

FORMAT_VERSION = 2
READABLE = (1, 2)
SHARD_BYTES = 64 * 2**20  # large enough for full disk speed, small enough to lose in a crash
MOST_SLOTS_PER_SHARD = 4096

_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class Stack:
    """All taps that share a token count and a width: one array `(slot, view, tap, token, dim)`.

    `tokens` counts every token kept; the first `prefix_tokens` of them are class or register
    tokens.
    """

    name: str
    taps: tuple[str, ...]
    tokens: int
    prefix_tokens: int
    dim: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "taps", tuple(self.taps))
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"stack name {self.name!r}: expected lower-case letters, digits and _")
        if not self.taps or len(set(self.taps)) != len(self.taps):
            raise ValueError(f"stack {self.name!r}: taps must be one or more, no two alike")
        if self.tokens < 1 or self.dim < 1 or not 0 <= self.prefix_tokens <= self.tokens:
            raise ValueError(
                f"stack {self.name!r}: expected tokens >= prefix_tokens >= 0 and positive sizes, "
                f"received tokens={self.tokens}, prefix_tokens={self.prefix_tokens}, dim={self.dim}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(taps, tokens, dim): the values that one view of one slot holds."""
        return len(self.taps), self.tokens, self.dim


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The plan of a cache's features.

    identity: nested JSON; everything that decides the numbers beside the inputs, nothing else.
    storage: name of the storage type, a key of `cache.STORAGE`.
    parts: number of slots in each part, what the cache was made with first.
    views: length of the second axis of every stack.
    slots_per_shard: layout only; 0 picks about 64 MiB of slot bytes.
    final_norm: the backbone's last norm, e.g. `{"kind": "layer", "eps": 1e-6}`; its weights are
        the tables `final_norm/weight` and `final_norm/bias`.
    blocks: per block of the backbone, nested JSON that says what kind of block it is; the caller
        decides its fields.
    notes: informational JSON (created by, source path, recipe); compared with nothing.
    formerly: the fingerprint that format version 1 gave to this cache, which runs trained on it may
        have written down.
    """

    identity: Mapping[str, Any]
    storage: str
    parts: tuple[int, ...]
    stacks: tuple[Stack, ...]
    views: int = 1
    slots_per_shard: int = 0
    final_norm: Mapping[str, Any] = field(default_factory=dict)
    blocks: tuple[Mapping[str, Any], ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)
    formerly: str = ""

    def __post_init__(self) -> None:
        for name in ("stacks", "parts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("identity", "final_norm", "notes"):
            object.__setattr__(self, name, plain_json(name, getattr(self, name)))
        blocks = tuple(plain_json(f"blocks[{i}]", block) for i, block in enumerate(self.blocks))
        object.__setattr__(self, "blocks", blocks)
        self._validate()
        if self.slots_per_shard == 0:
            object.__setattr__(self, "slots_per_shard", default_slots_per_shard(self.slot_nbytes))

    def _validate(self) -> None:
        if self.storage not in STORAGE:
            raise ValueError(f"storage {self.storage!r}: expected one of {', '.join(STORAGE)}")
        if not self.parts or min(self.parts) < 1 or self.views < 1 or self.slots_per_shard < 0:
            raise ValueError(
                "a cache has at least one slot in each part and one view, received "
                f"parts={self.parts}, views={self.views}, slots_per_shard={self.slots_per_shard}"
            )
        if not self.stacks:
            raise ValueError("a cache has at least one stack, received none")
        names = [stack.name for stack in self.stacks]
        if len(set(names)) != len(names):
            raise ValueError(f"two stacks have the same name: {', '.join(names)}")

    @property
    def dtype(self) -> np.dtype:
        """The numpy dtype of every stack (bfloat16 is held as '<u2')."""
        return STORAGE[self.storage].dtype

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the canonical JSON of the format version and the identity."""
        return fingerprint(FORMAT_VERSION, self.identity)

    @property
    def slots(self) -> int:
        """Number of slots, of all parts."""
        return sum(self.parts)

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one slot: all stacks, all views."""
        return sum(self.stack_slot_nbytes(stack.name) for stack in self.stacks)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots of all stacks; tables, ledger and metadata are not counted."""
        return self.slots * self.slot_nbytes

    @functools.cached_property
    def part_starts(self) -> tuple[int, ...]:
        """First slot of each part, and one past the last of all."""
        return tuple(itertools.accumulate(self.parts, initial=0))

    @functools.cached_property
    def _shard_starts(self) -> np.ndarray:
        """First slot of each shard, int64, and one past the last of all."""
        starts = [
            np.arange(first, end, self.slots_per_shard)
            for first, end in itertools.pairwise(self.part_starts)
        ]
        return np.concatenate([*starts, [self.slots]]).astype(np.int64)

    @property
    def shards(self) -> int:
        """Number of shards; the last of each part may have fewer slots."""
        return len(self._shard_starts) - 1

    def shard_slots(self, shard: int) -> range:
        """Slots of one shard, 0 <= shard < shards."""
        return range(int(self._shard_starts[shard]), int(self._shard_starts[shard + 1]))

    def shards_of(self, slots: np.ndarray) -> np.ndarray:
        """The shard of each slot, int64."""
        return np.searchsorted(self._shard_starts, slots, side="right") - 1

    def part_of(self, shard: int) -> tuple[int, int]:
        """The part that a shard belongs to, and its number within that part."""
        first = self.shard_slots(shard).start
        part = bisect.bisect_right(self.part_starts, first) - 1
        return part, (first - self.part_starts[part]) // self.slots_per_shard

    def part_shards(self, part: int) -> int:
        """Number of shards in a part."""
        return -(-self.parts[part] // self.slots_per_shard)

    def stack(self, name: str) -> Stack:
        """The stack of that name. Raises NameMissing listing those there are."""
        for stack in self.stacks:
            if stack.name == name:
                return stack
        names = ", ".join(stack.name for stack in self.stacks)
        raise NameMissing(f"no stack {name!r} in this cache: it holds {names}")

    def stored_shape(self, stack_name: str) -> tuple[int, int, int]:
        """(taps, tokens, stored width) of one view of one slot, in elements of `dtype`.

        The width is the stack's dim; of int8 it is dim + 4, for each token's scale.
        """
        taps, tokens, dim = self.stack(stack_name).shape
        return taps, tokens, STORAGE[self.storage].width(dim)

    def stack_slot_nbytes(self, name: str) -> int:
        """Bytes of one slot of one stack, all views."""
        return self.views * math.prod(self.stored_shape(name)) * self.dtype.itemsize

    def to_dict(self) -> dict[str, Any]:
        """The manifest as plain JSON values; `from_dict` gives an equal manifest back."""
        return {
            "identity": dict(self.identity),
            "storage": self.storage,
            "parts": list(self.parts),
            "views": self.views,
            "slots_per_shard": self.slots_per_shard,
            "stacks": [{**vars(stack), "taps": list(stack.taps)} for stack in self.stacks],
            "final_norm": dict(self.final_norm),
            "blocks": [dict(block) for block in self.blocks],
            "notes": dict(self.notes),
            "formerly": self.formerly,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """Rebuild a manifest. Raises CacheDamaged for a field that is missing, unknown or has a
        value that makes no sense."""
        try:
            fields = dict(document)
            fields["stacks"] = tuple(Stack(**stack) for stack in fields["stacks"])
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise CacheDamaged(f"the manifest cannot be read: {error}") from error


def fingerprint(format_version: int, identity: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of the canonical JSON of a format version and an identity."""
    document = {"format_version": format_version, "identity": identity}
    return hashlib.sha256(canonical_json(document).encode()).hexdigest()


def default_slots_per_shard(slot_nbytes: int) -> int:
    """Slots that make about 64 MiB, between 1 and 4096."""
    return max(1, min(MOST_SLOTS_PER_SHARD, SHARD_BYTES // slot_nbytes))
