"""Inputs of a source, as an extraction sees them, and how a cache is brought to them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cache import (
    IGNORED,
    Labelling,
    Manifest,
    Matching,
    Reader,
    Stack,
    Target,
    Writer,
    encode_keys,
    match,
)

STACKS = (
    Stack(name="tokens", taps=("z0", "z1"), tokens=3, prefix_tokens=1, dim=4),
    Stack(name="late", taps=("z2",), tokens=2, prefix_tokens=0, dim=4),
)
TARGETS = (
    Target(name="kind", classes=("cat", "dog", "eel")),
    Target(name="marks", kind="multilabel", classes=("tail", "ears")),
    Target(name="age", kind="regression"),
    Target(name="mask", kind="segmentation", classes=("sky", "sea"), shape=(3, 5)),
)
UNREADABLE = "broken"


@dataclass(frozen=True)
class Inputs:
    """Inputs by key and contents. Everything else follows from these: digest, features, labels."""

    keys: tuple[str, ...]
    contents: tuple[str, ...]
    lean: bool = False  # asked for a class alone: fewer files

    @classmethod
    def of(cls, *texts: str, lean: bool = False) -> Inputs:
        """`a` is an input with the key and contents a, `a=b` one with other contents."""
        pairs = [text.split("=") for text in texts]
        return cls(tuple(p[0] for p in pairs), tuple(p[-1] for p in pairs), lean)

    def at(self, numbers: Sequence[int]) -> Inputs:
        return replace(
            self,
            keys=tuple(self.keys[n] for n in numbers),
            contents=tuple(self.contents[n] for n in numbers),
        )

    @property
    def digests(self) -> np.ndarray:
        """uint8 (inputs, 32)."""
        all_bytes = b"".join(hashlib.sha256(text.encode()).digest() for text in self.contents)
        return np.frombuffer(all_bytes, np.uint8).reshape(-1, 32)

    @property
    def lengths(self) -> np.ndarray:
        return 1 + self.digests[:, 0].astype(np.int32) % 3

    @property
    def features(self) -> dict[str, np.ndarray]:
        """Per stack, float16 (inputs, 1, taps, tokens, dim)."""
        made = {}
        for stack in STACKS:
            rows = [
                np.random.default_rng([*digest.tolist(), stack.tokens]).normal(size=stack.shape)
                for digest in self.digests
            ]
            made[stack.name] = np.array(rows, np.float16)[:, None]
        return made

    @property
    def skipped(self) -> dict[int, str]:
        return {n: "no" for n, text in enumerate(self.contents) if text.startswith(UNREADABLE)}

    @property
    def slot_tables(self) -> dict[str, np.ndarray]:
        return {
            "keys": encode_keys(self.keys),
            "source_sha256": self.digests,
            "lengths/tokens": self.lengths,
        }

    def labelling(self, *, seed: int = 0) -> tuple[Labelling, dict[str, np.ndarray]]:
        """Something of everything; another `seed` asks other things. By key, whatever the order."""
        rows = len(self.keys)
        if self.lean:
            kinds = np.array([(len(key) + ord(key[0]) + seed) % 3 for key in self.keys])
            return Labelling(rows=rows, targets=TARGETS[:1]), {"labels/kind": kinds}
        random = [np.random.default_rng([seed, *key.encode()]) for key in self.keys]
        labelling = Labelling(
            rows=rows, targets=TARGETS, splits=("train", "val"), groups=("site",), folds=3
        )
        masks = np.array([r.integers(0, 3, (3, 5)) for r in random], np.uint8)
        masks[masks == 2] = IGNORED
        tables = {
            "labels/kind": np.array([r.integers(-1, 3) for r in random]),
            "labels/marks": np.array([r.integers(0, 2, 2) for r in random], np.int8),
            "labels/age": np.array([r.normal() for r in random], np.float32),
            "labels/mask": masks,
            "split": np.array([r.integers(-1, 2) for r in random], np.int16),
            "groups/site": encode_keys([f"site {r.integers(0, 3)}" for r in random]),
            "fold": np.array([r.integers(-1, 3) for r in random], np.int16),
        }
        return labelling, tables

    def digest(self, *, seed: int = 0) -> str:
        labelling, tables = self.labelling(seed=seed)
        return labelling.digest(self.keys, self.digests, tables)


def manifest_of(inputs: Inputs, *, slots_per_shard: int = 2) -> Manifest:
    return Manifest(
        identity={"a": 1},
        storage="float16",
        parts=(len(inputs.keys),),
        slots_per_shard=slots_per_shard,
        stacks=STACKS,
    )


def fill(writer: Writer, inputs: Inputs, first: int = 0) -> None:
    """Write the pending slots; input n belongs to slot `first` + n."""
    features, skipped = inputs.features, inputs.skipped
    for slots in writer.pending:
        for slot in reversed(slots):
            n = slot - first
            arrays = {name: values[n : n + 1] for name, values in features.items()}
            writer.write(slot, arrays, {slot: skipped[n]} if n in skipped else {})


def extract(location: Path, inputs: Inputs, *, seed: int = 0, slots_per_shard: int = 2) -> Path:
    """A fresh cache of these inputs."""
    labelling, tables = inputs.labelling(seed=seed)
    manifest = manifest_of(inputs, slots_per_shard=slots_per_shard)
    with Writer(location, manifest, labelling, {**tables, **inputs.slot_tables}) as writer:
        fill(writer, inputs)
    return location


def label(location: Path, inputs: Inputs, *, seed: int) -> None:
    """Ask other things of the same rows."""
    with Reader(location) as reader:
        places = reader.place_tables
    labelling, tables = inputs.labelling(seed=seed)
    with Writer.resume(location) as writer:
        writer.label(labelling, {**tables, **places}, inputs.digest(seed=seed))


def update(location: Path, inputs: Inputs, *, seed: int = 0) -> Matching:
    """Bring a cache to these inputs, also one whose update was interrupted; what was found."""
    with Writer.resume(location) as writer:
        with Reader(location, allow_incomplete=True) as reader:
            found = match(reader, inputs.keys, inputs.digests)
            slot_keys = reader.slot_keys
        slots = found.slots.copy()
        if found.missing:
            new = inputs.at(found.missing)
            added = writer.extend(new.slot_tables)
            slots[found.missing] = added
            slot_keys = [*slot_keys, *new.keys]
        for pending in writer.pending:  # of an earlier update, perhaps
            for slot in pending:
                numbers = np.flatnonzero(slots == slot)
                one = inputs.at([int(numbers[0])]) if len(numbers) else Inputs.of("nobody's")
                writer.write(slot, one.features, {slot: "no"} if one.skipped else {})
        labelling, tables = inputs.labelling(seed=seed)
        tables["slots"] = slots
        if [slot_keys[slot] for slot in slots] != list(inputs.keys):
            tables["keys"] = encode_keys(inputs.keys)
        writer.label(labelling, tables, inputs.digest(seed=seed))
    return replace(found, slots=slots)
