"""One small cache with everything in it, written to either container."""

import dataclasses
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from disk_recorder import Disk, recorded
from memory_store import MemoryStore

from cache import Labelling, Manifest, Stack, Target, Writer, encode, encode_keys
from cache.containers.document import below
from cache.labelling import FIRST
from cache.location import STORES

CONTAINERS = ("zarr", "h5")


@dataclass
class Sample:
    """A manifest, a labelling, their tables, and the values of the stacks in the storage dtype."""

    manifest: Manifest
    labelling: Labelling
    tables: dict[str, np.ndarray]
    values: dict[str, np.ndarray]

    def with_manifest(self, **changes: object) -> "Sample":
        return dataclasses.replace(self, manifest=dataclasses.replace(self.manifest, **changes))

    def with_labelling(self, **changes: object) -> "Sample":
        return dataclasses.replace(self, labelling=dataclasses.replace(self.labelling, **changes))

    def rows(self, start: int, stop: int) -> dict[str, np.ndarray]:
        return {name: values[start:stop] for name, values in self.values.items()}

    def fill(self, writer: Writer, shards: Iterable[range] | None = None) -> None:
        for rows in writer.pending if shards is None else shards:
            writer.write(rows.start, self.rows(rows.start, rows.stop))

    @property
    def stored(self) -> dict[str, np.ndarray]:
        """The tables by the names under which a new cache keeps them."""
        of_labelling = {*self.labelling.tables, *(f"groups/{g}" for g in self.labelling.groups)}
        return {
            below(FIRST, name) if name in of_labelling else name: table
            for name, table in self.tables.items()
        }

    def write(self, location: Path, **options: object) -> Path:
        with Writer(location, self.manifest, self.labelling, self.tables, **options) as writer:
            self.fill(writer)
        return location


def make_sample(storage: str = "float16", rows: int = 10, slots_per_shard: int = 4) -> Sample:
    stacks = (
        Stack(name="tokens", taps=("z0", "z1", "z2"), tokens=5, prefix_tokens=1, dim=4),
        Stack(name="late", taps=("z3",), tokens=2, prefix_tokens=0, dim=6),
    )
    manifest = Manifest(
        identity={"backbone": {"name": "vit_tiny", "weights": "ab"}, "seed": 0},
        storage=storage,
        parts=(rows,),
        views=2,
        slots_per_shard=slots_per_shard,
        stacks=stacks,
        final_norm={"kind": "layer", "eps": 1e-6},
        blocks=({"kind": "vit", "heads": 3}, {"kind": "conv"}),
        notes={"created_by": "test"},
    )
    labelling = Labelling(
        rows=rows,
        targets=(Target(name="label", classes=("cat", "dog", "eel")),),
        splits=("train", "val"),
    )
    random = np.random.default_rng(0)
    tables = {
        "keys": encode_keys([f"images/é{row}.png" for row in range(rows)]),
        "labels/label": np.arange(rows) % 3,
        "split": (np.arange(rows) % 4 == 3).astype(np.uint8),
        "source_sha256": random.integers(0, 256, (rows, 32), dtype=np.uint8),
        "final_norm/weight": random.normal(size=4).astype(np.float32),
        "final_norm/bias": np.zeros(4, np.float32),
        "ladder/block0/qkv_weight": random.normal(size=(6, 2)).astype(np.float32),
        "ladder/block11/qkv_weight": random.normal(size=(6, 2)).astype(np.float32),
    }
    values = {
        stack.name: encode(random.normal(size=(rows, 2, *stack.shape)).astype(np.float32), storage)
        for stack in stacks
    }
    return Sample(manifest, labelling, tables, values)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a power cut could tell; on a slow disk each fsync costs 10 ms."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """What a power cut could take from below `tmp_path`."""
    return recorded(tmp_path, monkeypatch)


@pytest.fixture
def sample() -> Sample:
    return make_sample()


@pytest.fixture
def samples() -> Callable[..., Sample]:
    return make_sample


@pytest.fixture(params=[*CONTAINERS, "memory"])
def anywhere(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str | Path:
    """Where a cache may be made, once per container, and in an object store."""
    if request.param != "memory":
        return tmp_path / f"sample.{request.param}"
    monkeypatch.setitem(STORES, "memory", MemoryStore)
    return f"memory://{tmp_path.name}/sample.zarr"


@pytest.fixture(params=CONTAINERS)
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where a cache may be made, once per container."""
    return tmp_path / f"sample.{request.param}"
