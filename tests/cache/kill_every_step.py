"""Run by test_kill.py in a process of its own: it forks, and pytest may have threads.

Every call that changes the disk is a step. For k = 1, 2, ... a child does a job on a cache and
kills itself at step k (half way through it, if it is a write). What is left is looked at; another
child does the same job to its end; the result is compared. Stops when a child survives.
"""

import itertools
import shutil
import sys
from functools import partial
from pathlib import Path

import h5py  # noqa: F401  (once here, not in every child)
import numpy as np
import zarr
from cache_inputs import STACKS, Inputs, extract, fill, label, update
from kill_steps import in_child, kill_at

from cache import Labelling, Manifest, Reader, Writer, encode_keys, inspect, verify
from cache.containers.container import Container
from cache.containers.zarr import ZarrContainer
from cache.ledger import Record
from cache.shards import OpenShard
from cache.stores import journal


def same(step: int, what: str, one: object, other: object) -> None:
    if not (np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other):
        raise AssertionError(f"killed at step {step}: {what} differs: {one} {other}")


class Job:
    """What is done to a cache, again and again. `step` is that at which it was killed."""

    def prepare(self, location: Path) -> None:
        """Make what is there before."""

    def run(self, location: Path) -> None:
        """Do the job, or what is left of it."""

    def left(self, location: Path, step: int) -> None:
        """Check what a reader finds after the kill."""

    def check(self, location: Path, step: int) -> None:
        """Check what is there after all."""


class Write(Job):
    """A new cache, one row of which is skipped."""

    rows = 3
    values = Inputs.of("a", "b", "c").features

    def run(self, location: Path) -> None:
        manifest = Manifest(
            identity={"a": 1},
            storage="float16",
            parts=(self.rows,),
            slots_per_shard=2,
            stacks=STACKS,
        )
        tables = {"keys": encode_keys([str(row) for row in range(self.rows)])}
        with Writer(location, manifest, Labelling(rows=self.rows), tables) as writer:
            for rows in writer.pending:
                for row in reversed(rows):
                    arrays = {name: values[row : row + 1] for name, values in self.values.items()}
                    errors = {"tokens": (float(row), 4.0, row / 2)}
                    writer.write(row, arrays, {row: "bad"} if row == 1 else {}, errors)

    def left(self, location: Path, step: int) -> None:
        if location.exists():  # and if it is, it is whole
            same(step, "damage", verify(location).damaged, [])

    def check(self, location: Path, step: int) -> None:
        reader = Reader(location)
        for name, values in self.values.items():
            expected = values[:, 0].copy()
            expected[1] = 0
            same(step, name, reader.read(range(self.rows), stack=name), expected)
        errors = {"tokens": [(1.0, 8.0, 0.5), (2.0, 4.0, 1.0)]}  # of the two shards
        same(step, "the ledger", (reader.skipped, reader.errors), ({1: "bad"}, errors))
        same(step, "damage", verify(location).damaged, [])


OLD = Inputs.of("a", "b", "broken1", lean=True)
NEW = Inputs.of("c", "b", "a=A", lean=True)


def holds(location: Path, step: int, *states: tuple[Inputs, int]) -> None:
    """The cache is one of (inputs, labels of that seed), to the last bit."""
    digest = inspect(location).labelling
    for inputs, seed in states:
        if inputs.digest(seed=seed) == digest:
            break
    else:
        raise AssertionError(f"killed at step {step}: the labelling differs")
    with Reader(location) as reader:
        for name, table in inputs.labelling(seed=seed)[1].items():
            same(step, name, reader.labelling_table(name), table)
        same(step, "keys", reader.keys, list(inputs.keys))
        for stack, values in inputs.features.items():
            expected = values[:, 0].copy()
            expected[list(inputs.skipped)] = 0
            same(step, stack, reader.read(range(reader.rows), stack=stack), expected)
    same(step, "damage", verify(location).damaged, [])


class Extend(Job):
    """Slots for new inputs; rows and labels stay."""

    def prepare(self, location: Path) -> None:
        extract(location, OLD)

    def run(self, location: Path) -> None:
        new = NEW.at([0, 2])
        with Writer.resume(location) as writer:
            if len(writer.manifest.parts) == 1:
                writer.extend(new.slot_tables)
            fill(writer, new, len(OLD.keys))

    def left(self, location: Path, step: int) -> None:
        holds(location, step, (OLD, 0))

    def check(self, location: Path, step: int) -> None:
        holds(location, step, (OLD, 0))
        found = inspect(location)
        same(step, "the slots", (found.slots, found.slots_pending), (5, 0))
        update(location, NEW)
        holds(location, step, (NEW, 0))
        same(step, "the slots", Reader(location).manifest.slots, 5)


class Label(Job):
    """Other labels."""

    def prepare(self, location: Path) -> None:
        extract(location, OLD)

    def run(self, location: Path) -> None:
        label(location, OLD, seed=1)

    def left(self, location: Path, step: int) -> None:
        holds(location, step, (OLD, 0), (OLD, 1))

    def check(self, location: Path, step: int) -> None:
        holds(location, step, (OLD, 1))
        label(location, OLD, seed=2)
        holds(location, step, (OLD, 2))
        label(location, OLD, seed=3)
        kept = list(location.glob("labellings/*/zarr.json"))
        same(step, "what is kept", len(kept), 2 if location.is_dir() else 0)


class Update(Job):
    """New and changed inputs are added, rows change their order, one vanishes."""

    def prepare(self, location: Path) -> None:
        extract(location, OLD)

    def run(self, location: Path) -> None:
        update(location, NEW)

    def left(self, location: Path, step: int) -> None:
        holds(location, step, (OLD, 0), (NEW, 0))

    def check(self, location: Path, step: int) -> None:
        holds(location, step, (NEW, 0))


JOBS = {"write": Write, "extend": Extend, "label": Label, "update": Update}


def publish_records_first() -> None:
    """A bug that this test exists for: the shard counts as done before its data are there."""
    begin = OpenShard.begin

    def hasty(container: Container, index: int) -> OpenShard:
        slots = container.manifest.shard_slots(index)
        digests = {stack.name: ["0" * 32] * len(slots) for stack in container.manifest.stacks}
        record = Record(shard=index, slots=(slots.start, slots.stop), digests=digests, skipped={})
        container.write_record(index, record.to_bytes(container.record_bytes(index)))
        return begin(container, index)

    OpenShard.begin = hasty


def publish_documents_first() -> None:
    """Another: the document speaks of arrays that are not there, or half of it is written."""
    amend = ZarrContainer.amend

    def hasty(self: ZarrContainer, document: dict, tables: dict) -> ZarrContainer:
        root = zarr.open_group(self.where, mode="r+")
        root.attrs["sidecache"] = document
        return amend(self, document, tables)

    ZarrContainer.amend = hasty
    journal.publish = lambda path, change: None


def run_killed(job: Job, location: Path, step: int) -> None:
    kill_at(step)
    job.run(location)


def run_again(job: Job, location: Path, step: int) -> None:
    kill_at(0)
    job.left(location, step)
    job.run(location)
    job.check(location, step)


def main() -> None:
    folder, job = Path(sys.argv[2]), JOBS[sys.argv[3]]()
    before = folder / "before" / f"sample.{sys.argv[1]}"
    before.parent.mkdir()
    in_child(partial(job.prepare, before))
    if "record-first" in sys.argv:
        publish_records_first()
    if "document-first" in sys.argv:
        publish_documents_first()

    for step in itertools.count(1):
        location = folder / str(step) / before.name
        shutil.copytree(before.parent, location.parent)
        killed = in_child(partial(run_killed, job, location, step))
        in_child(partial(run_again, job, location, step))
        shutil.rmtree(location.parent)
        if not killed:
            break
    sys.stdout.write(f"{step - 1}\n")


main()
