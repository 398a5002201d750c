"""Inputs of a source, as an extraction sees them, and how a cache is brought to them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr
from memory_store import BUCKETS

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
    inspect,
    match,
    verify,
)

Where = str | Path

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
    lean: bool = False  # one stack, asked for a class alone: fewer files

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
    def stacks(self) -> tuple[Stack, ...]:
        return STACKS[:1] if self.lean else STACKS

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
        for stack in self.stacks:
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
        stacks=inputs.stacks,
    )


def fill(writer: Writer, inputs: Inputs, first: int = 0) -> None:
    """Write the pending slots; input n belongs to slot `first` + n."""
    features, skipped = inputs.features, inputs.skipped
    for slots in writer.pending:
        for slot in reversed(slots):
            n = slot - first
            arrays = {name: values[n : n + 1] for name, values in features.items()}
            writer.write(slot, arrays, {slot: skipped[n]} if n in skipped else {})


def extract(location: Where, inputs: Inputs, *, seed: int = 0, slots_per_shard: int = 2) -> Where:
    """A fresh cache of these inputs."""
    labelling, tables = inputs.labelling(seed=seed)
    manifest = manifest_of(inputs, slots_per_shard=slots_per_shard)
    with Writer(location, manifest, labelling, {**tables, **inputs.slot_tables}) as writer:
        fill(writer, inputs)
    return location


def label(location: Where, inputs: Inputs, *, seed: int) -> None:
    """Ask other things of the same rows."""
    with Reader(location) as reader:
        places = reader.place_tables
    labelling, tables = inputs.labelling(seed=seed)
    with Writer.resume(location) as writer:
        writer.label(labelling, {**tables, **places}, inputs.digest(seed=seed))


def update(location: Where, inputs: Inputs, *, seed: int = 0) -> Matching:
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


def beside(location: Where, stem: str) -> Where:
    """Another place of the same kind."""
    return type(location)(str(location).replace("/sample.", f"/{stem}."))


def is_zarr(location: Where) -> bool:
    return str(location).endswith(".zarr")


def objects(location: Where) -> dict[str, bytes]:
    """All bytes around a cache, by name, without the code under test."""
    if "://" in str(location):
        return dict(BUCKETS.get(str(location).rpartition("/")[0], {}))
    folder = Path(location).parent
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def unfinished(location: Where) -> list[str]:
    """Names of files and folders of what has not been finished."""
    names = list(objects(location))
    if "://" not in str(location):
        names += map(str, Path(location).parent.rglob("*"))
    return [name for name in names if ".partial" in name or ".creating" in name]


def put(location: Where, name: str, data: bytes | None) -> None:
    """Change an object of a cache behind its back; None deletes it."""
    if "://" in str(location):
        bucket = BUCKETS[str(location).rpartition("/")[0]]
        bucket.pop(name) if data is None else bucket.update({name: data})
    else:
        path = Path(location).parent / name
        path.unlink() if data is None else path.write_bytes(data)


def flip(location: Where, name: str, offset: int) -> None:
    """Change one bit."""
    data = bytearray(objects(location)[name])
    data[offset] ^= 1
    put(location, name, bytes(data))


def plain_group(location: Where) -> Any:
    """The cache as plain zarr or h5py opens it."""
    if not is_zarr(location):
        return h5py.File(location, "r")
    if "://" not in str(location):
        return zarr.open_group(location, mode="r")
    name = str(location).rpartition("/")[2]
    buffers = {
        key.removeprefix(f"{name}/"): zarr.core.buffer.cpu.Buffer.from_bytes(data)
        for key, data in objects(location).items()
    }
    return zarr.open_group(zarr.storage.MemoryStore(buffers), mode="r")


def features_of(inputs: Inputs, stack: str) -> np.ndarray:
    values = inputs.features[stack][:, 0].copy()
    values[list(inputs.skipped)] = 0
    return values


def assert_alike(location: Where, fresh: Where) -> None:
    """Row for row the same, by every way to ask."""
    with Reader(location) as one, Reader(fresh) as other:
        assert one.keys == other.keys
        assert one.content == other.content
        assert one.labelling_digest == other.labelling_digest
        assert one.fingerprint == other.fingerprint
        assert one.skipped == other.skipped
        np.testing.assert_array_equal(one.source_sha256, other.source_sha256)
        for stack in STACKS:
            np.testing.assert_array_equal(one.lengths(stack.name), other.lengths(stack.name))
            rows = np.random.default_rng(0).permutation(one.rows)
            np.testing.assert_array_equal(
                one.read(rows, stack=stack.name), other.read(rows, stack=stack.name)
            )
        for target in TARGETS:
            np.testing.assert_array_equal(one.labels(target.name), other.labels(target.name))
        assert one.groups("site") == other.groups("site")
        np.testing.assert_array_equal(one.folds, other.folds)
        np.testing.assert_array_equal(one.split, other.split)
        for names in ((), ("train",), ("val", "train")):
            np.testing.assert_array_equal(one.split_rows(*names), other.split_rows(*names))
    said = [asdict(inspect(each)) for each in (location, fresh)]
    for name in ("targets", "kinds", "folds", "groups", "splits", "rows", "skipped", "complete"):
        assert said[0][name] == said[1][name], name
    assert verify(location).ok and verify(location).complete
