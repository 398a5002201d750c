"""Make the golden caches of format version 1, which every later version must go on reading.

`python tests/golden/make.py`, from the repository root, makes those that are missing and touches
none that is there. Never delete one to make a failing test pass: a failing golden test means that
the format has changed. The int8 caches came later, with everything that came into the format with
them: blocks, tables below tables, and a measured error. After them came those with a target of each
kind, and seconds in the ledger.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from cache import Labelling, Manifest, Stack, Target, Writer, encode, encode_keys

ROWS = 5


def values(storage: str) -> np.ndarray:
    """(row, view, tap, token, dim): small multiples of 1/8, exact in every storage type.

    For int8, the first value of each token is 127 of its steps, and every other token's steps are
    twice as large.
    """
    shape = (ROWS, 2, 3, 2, 4)
    exact = (np.arange(np.prod(shape)).reshape(shape) % 97 / 8).astype(np.float32)
    if storage == "int8":
        exact[..., 0] = 127 / 8
        exact[..., 1, :] *= -2
    return encode(exact, storage)


MARKS = [[1, 0], [0, 0], [-1, -1], [1, 1], [0, 1]]
AGES = [1.5, np.nan, -2, 0, 1e-3]


def write(location: Path, storage: str, *, several: bool = False) -> None:
    """One cache with two views, a skipped row, two shards and a short third one.

    several: with a multilabel target and a regression beside the classes.
    """
    later = storage == "int8"
    manifest = Manifest(
        identity={"backbone": {"name": "golden"}, "seed": 7},
        storage=storage,
        parts=(ROWS,),
        views=2,
        slots_per_shard=2,
        stacks=(Stack(name="tokens", taps=("z0", "z1", "z2"), tokens=2, prefix_tokens=1, dim=4),),
        final_norm={"kind": "layer", "eps": 1e-6},
        blocks=({"kind": "vit", "heads": 2}, {"kind": "vit", "heads": 4}) if later else (),
        notes={"created_by": "tests/golden/make.py"},
    )
    labelling = Labelling(
        rows=ROWS,
        targets=(
            Target(name="label", classes=("cat", "dog")),
            Target(name="marks", kind="multilabel", classes=("tail", "ears")),
            Target(name="age", kind="regression"),
        )[: 3 if several else 1],
        splits=("train", "test"),
    )
    tables = {
        "keys": encode_keys([f"{row}.png" for row in range(ROWS)]),
        "labels/label": np.arange(ROWS) % 2,
        "split": np.array([0, 0, 0, 1, 1], np.uint8),
        "source_sha256": np.arange(ROWS * 32, dtype=np.uint8).reshape(ROWS, 32),
        "final_norm/weight": np.arange(4, dtype=np.float32),
        "final_norm/bias": np.ones(4, np.float32),
    }
    if several:
        tables["labels/marks"] = np.array(MARKS, np.int8)
        tables["labels/age"] = np.array(AGES, np.float32)
    if later:
        tables["ladder/block0/qkv_weight"] = np.arange(6, dtype=np.float32).reshape(2, 3)
    with Writer(location, manifest, labelling, tables) as writer:
        for rows in writer.pending:
            skipped = {3: "truncated image"} if 3 in rows else {}
            array = values(storage)[rows.start : rows.stop]
            errors = {"tokens": (0.25, 4.0, rows.start / 8)} if later else {}
            writer.write(rows.start, {"tokens": array}, skipped, errors)


if __name__ == "__main__":
    pass
