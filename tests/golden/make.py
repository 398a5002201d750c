"""Make the golden caches, which every later version must go on reading.

`python tests/golden/make.py`, from the repository root, makes those of today's version that are
missing and touches none that is there. Never delete one to make a failing test pass: a failing
golden test means that the format has changed.

Those of version 1 cannot be made any more; `write` makes the same numbers. The int8 caches came
later, with everything that came into the format with them: blocks, tables below tables, and a
measured error. After them came those with a target of each kind, and seconds in the ledger. Those
of version 2 have masks, groups, folds and lengths, and two of them rows that an update brought.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from cache import Labelling, Manifest, Stack, Target, Writer, decode_keys, encode, encode_keys

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


MASKS = np.array(
    [[[0, 1, 255]], [[1, 1, 1]], [[255, 255, 255]], [[0, 0, 0]], [[1, 0, 1]]], np.uint8
)
SITES = ["north", "south", "north", "ünknown", "south"]
FIRST, SECOND = [0, 1, 2, 3, 4], [4, 6, 2, 5, 0]  # inputs of `write_labelled`, before and after


def labelling_of(inputs: list[int]) -> tuple[Labelling, dict[str, np.ndarray]]:
    """Something of everything; of inputs that an update brings, input n is asked what n - 5 is."""
    asked = [n % ROWS for n in inputs]
    labelling = Labelling(
        rows=len(inputs),
        targets=(
            Target(name="label", classes=("cat", "dog")),
            Target(name="marks", kind="multilabel", classes=("tail", "ears")),
            Target(name="age", kind="regression"),
            Target(name="mask", kind="segmentation", classes=("sky", "sea"), shape=(1, 3)),
        ),
        splits=("train", "test"),
        groups=("site",),
        folds=2,
        notes={"by": "tests/golden/make.py"},
    )
    return labelling, {
        "labels/label": np.array([0, 1, -1, 1, 0])[asked],
        "labels/marks": np.array(MARKS, np.int8)[asked],
        "labels/age": np.array(AGES, np.float32)[asked],
        "labels/mask": MASKS[asked],
        "split": np.array([0, 0, -1, 1, 1], np.int16)[asked],
        "fold": np.array([0, 1, 1, -1, 0], np.int16)[asked],
        "groups/site": encode_keys([SITES[n] for n in asked]),
    }


def slot_tables_of(inputs: list[int]) -> dict[str, np.ndarray]:
    """Keys, digests and lengths; input 5 is another version of 1.png, 6 is a copy of 3.png."""
    names = {5: "1.png", 6: "copy of 3.png"}
    digests = np.array([np.full(32, 3 if n == 6 else n) for n in inputs], np.uint8)
    return {
        "keys": encode_keys([names.get(n, f"{n}.png") for n in inputs]),
        "source_sha256": digests,
        "lengths/tokens": np.array([2, 1, 0, 2, 1, 2, 2], np.int32)[inputs],
    }


def write_labelled(location: Path, storage: str, *, updated: bool = False) -> None:
    """One cache of version 2 with everything; `updated`: brought to other inputs afterwards.

    One input has changed, one is a copy of another under its own key, two have vanished, and the
    rows come in another order.
    """
    manifest = Manifest(
        identity={"backbone": {"name": "golden"}, "seed": 8},
        storage=storage,
        parts=(ROWS,),
        views=2,
        slots_per_shard=2,
        stacks=(Stack(name="tokens", taps=("z0", "z1", "z2"), tokens=2, prefix_tokens=1, dim=4),),
        final_norm={"kind": "layer", "eps": 1e-6},
        blocks=({"kind": "vit", "heads": 2},),
        notes={"created_by": "tests/golden/make.py"},
    )
    labelling, tables = labelling_of(FIRST)
    tables |= {**slot_tables_of(FIRST), "final_norm/weight": np.arange(4, dtype=np.float32)}
    with Writer(location, manifest, labelling, tables) as writer:
        for slots in writer.pending:
            array = values(storage)[slots.start : slots.stop]
            skipped = {3: "truncated image"} if 3 in slots else {}
            writer.write(slots.start, {"tokens": array}, skipped, {"tokens": (0.25, 4.0, 0.5)})
        if updated:
            added = writer.extend(slot_tables_of([5]))
            writer.write(added.start, {"tokens": values(storage)[1:2, :, :, ::-1]})
            labelling, tables = labelling_of(SECOND)
            tables["slots"] = np.array([4, 3, 2, added.start, 0])
            asked = slot_tables_of(SECOND)
            tables["keys"] = asked["keys"]
            keys = decode_keys(asked["keys"])
            writer.label(labelling, tables, labelling.digest(keys, asked["source_sha256"], tables))


if __name__ == "__main__":
    folder = Path(__file__).parent
    for name, storage in (
        ("version_2.zarr", "bfloat16"),
        ("version_2.h5", "int8"),
        ("version_2_updated.zarr", "float16"),
        ("version_2_updated.h5", "float16"),
    ):
        if not (folder / name).exists():
            write_labelled(folder / name, storage, updated="updated" in name)
