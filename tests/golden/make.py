"""Make the golden caches of format version 1, which every later version must go on reading.

Run once, from the repository root, before version 1 was published: `python tests/golden/make.py`.
Never run it to make a failing test pass: a failing golden test means that the format has changed.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from cache import Manifest, Stack, Target, Writer, encode, encode_keys

ROWS = 5


def values(storage: str) -> np.ndarray:
    """(row, view, tap, token, dim): small multiples of 1/8, exact in every storage type."""
    shape = (ROWS, 2, 3, 2, 4)
    return encode((np.arange(np.prod(shape)).reshape(shape) % 97 / 8).astype(np.float32), storage)


def write(location: Path, storage: str) -> None:
    """One cache with two views, a skipped row, two shards and a short third one."""
    manifest = Manifest(
        identity={"backbone": {"name": "golden"}, "seed": 7},
        storage=storage,
        rows=ROWS,
        views=2,
        rows_per_shard=2,
        stacks=(Stack(name="tokens", taps=("z0", "z1", "z2"), tokens=2, prefix_tokens=1, dim=4),),
        targets=(Target(name="label", classes=("cat", "dog")),),
        splits=("train", "test"),
        final_norm={"kind": "layer", "eps": 1e-6},
        notes={"created_by": "tests/golden/make.py"},
    )
    tables = {
        "keys": encode_keys([f"{row}.png" for row in range(ROWS)]),
        "labels/label": np.arange(ROWS) % 2,
        "split": np.array([0, 0, 0, 1, 1], np.uint8),
        "source_sha256": np.arange(ROWS * 32, dtype=np.uint8).reshape(ROWS, 32),
        "final_norm/weight": np.arange(4, dtype=np.float32),
        "final_norm/bias": np.ones(4, np.float32),
    }
    with Writer(location, manifest, tables, overwrite=location.exists()) as writer:
        for rows in writer.pending:
            skipped = {3: "truncated image"} if 3 in rows else {}
            array = values(storage)[rows.start : rows.stop]
            writer.write(rows.start, {"tokens": array}, skipped)


if __name__ == "__main__":
    folder = Path(__file__).parent
    write(folder / "version_1.zarr", "float16")
    write(folder / "version_1.h5", "bfloat16")
