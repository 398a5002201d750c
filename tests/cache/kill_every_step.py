"""Run by test_kill.py in a process of its own: it forks, and pytest may have threads.

Every call that changes the disk is a step. For k = 1, 2, ... a child writes a cache and kills
itself at step k (half way through it, if it is a write); another child runs the same job to its
end; the result is compared with the reference, byte for byte. Stops when a child survives.
"""

import itertools
import shutil
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path.cwd() / "tests"))
sys.path.insert(0, str(Path.cwd()))

import h5py  # noqa: F401  (once here, not in every child)
import numpy as np
import zarr  # noqa: F401
from kill_steps import in_child, kill_at

from cache import Labelling, Manifest, Reader, Stack, Writer, encode_keys, verify
from cache.ledger import Record

ROWS = 3
STACKS = (
    Stack(name="tokens", taps=("z0", "z1"), tokens=3, prefix_tokens=1, dim=4),
    Stack(name="late", taps=("z2",), tokens=2, prefix_tokens=0, dim=4),
)
MANIFEST = Manifest(
    identity={"a": 1}, storage="float16", parts=(ROWS,), slots_per_shard=2, stacks=STACKS
)
TABLES = {"keys": encode_keys([str(row) for row in range(ROWS)])}
VALUES = {
    stack.name: np.random.default_rng(0).normal(size=(ROWS, 1, *stack.shape)).astype(np.float16)
    for stack in STACKS
}


def write(location: Path) -> None:
    with Writer(location, MANIFEST, Labelling(rows=ROWS), TABLES) as writer:
        for rows in writer.pending:
            for row in reversed(rows):
                arrays = {name: values[row : row + 1] for name, values in VALUES.items()}
                errors = {"tokens": (float(row), 4.0, row / 2)}
                writer.write(row, arrays, {row: "bad"} if row == 1 else {}, errors)


def publish_records_first() -> None:
    """The bug that this test exists for: the shard counts as done before its data are there."""
    begin = Writer._begin

    def hasty(self: Writer, index: int, rows: range) -> object:
        digests = {stack.name: ["0" * 32] * len(rows) for stack in STACKS}
        record = Record(shard=index, slots=(rows.start, rows.stop), digests=digests, skipped={})
        self._container.write_record(index, record.to_bytes(self._container.record_bytes(index)))
        return begin(self, index, rows)

    Writer._begin = hasty


def check(location: Path, step: int) -> None:
    reader = Reader(location)
    for name, values in VALUES.items():
        expected = values[:, 0].copy()
        expected[1] = 0
        if not np.array_equal(reader.read(range(ROWS), stack=name), expected):
            raise AssertionError(f"killed at step {step}: {name} differs")
    errors = {"tokens": [(1.0, 8.0, 0.5), (2.0, 4.0, 1.0)]}  # of the two shards
    if reader.skipped != {1: "bad"} or reader.errors != errors or not verify(location).ok:
        raise AssertionError(f"killed at step {step}: the ledger differs")


def write_killed(location: Path, step: int) -> None:
    kill_at(step)
    write(location)


def write_again(location: Path, step: int) -> None:
    kill_at(0)
    write(location)
    check(location, step)


def main() -> None:
    location = Path(sys.argv[2], f"sample.{sys.argv[1]}")
    if sys.argv[3:]:
        publish_records_first()

    for step in itertools.count(1):
        killed = in_child(partial(write_killed, location, step))
        in_child(partial(write_again, location, step))
        if not killed:
            break
        shutil.rmtree(location) if location.is_dir() else location.unlink()
    sys.stdout.write(f"{step - 1}\n")


main()
