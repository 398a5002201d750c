"""Caches of every format version stay readable, to the same numbers, for ever."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cache import (
    Labelling,
    Reader,
    Target,
    Writer,
    decode,
    encode_keys,
    inspect,
    match,
    verify,
)

GOLDEN = Path(__file__).parents[1] / "golden"
FINGERPRINT = "b83f8add26bf8b04957fa57b504da67c52386a112e71e41fb703e176404134a9"
FINGERPRINT_2 = "bdcb80e3d0c4903ce41b93717825d91abe51b0be0c57f62892373172b12a4ef1"
LABELLING = "5a9ef0efbd133e61121753e49ce64e828dc33d080352ca3186c89432bdd8d91b"
LABELLING_OF_SEVERAL = "7cdc3404569e20529a5541223b7895835e009de61dd52f7a0de0789e85318b2a"
CASES = {  # the content as version 2 defines it: version 1's covered labels and splits, too
    "version_1.zarr": (
        "float16",
        "45d45b205a860c9604b6a6e5165d9f46f5d21354243ba412429c78afcf7f1ec4",
    ),
    "version_1.h5": (
        "bfloat16",
        "3588e61ac3fe6b97fc39cb21994711e50893407a6f011e6db4e822362401e258",
    ),
    "version_1_int8.zarr": (
        "int8",
        "e7ae5964b5deda14ff7321e5729f4e3d61cccda0e128eda7577580b978b905ef",
    ),
    "version_1_int8.h5": (
        "int8",
        "e7ae5964b5deda14ff7321e5729f4e3d61cccda0e128eda7577580b978b905ef",
    ),
    "version_1_targets.zarr": (
        "float32",
        "fe84fbdda6459f87adc1edbf971752fc7a0cb36a53adf45e163f9acc3811eeeb",
    ),
    "version_1_targets.h5": (
        "float32",
        "fe84fbdda6459f87adc1edbf971752fc7a0cb36a53adf45e163f9acc3811eeeb",
    ),
}


def make():
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", CASES)
def test_golden_cache_reads_to_known_numbers(name):
    storage, content = CASES[name]
    assert verify(GOLDEN / name).ok
    with Reader(GOLDEN / name) as reader:
        assert reader.container.format_version == 1
        assert reader.manifest.storage == storage
        assert reader.manifest.formerly == FINGERPRINT
        assert reader.is_known_as(FINGERPRINT) and reader.is_known_as(reader.fingerprint)
        assert not reader.is_known_as("") and not reader.is_known_as("0" * 64)
        assert reader.fingerprint == FINGERPRINT_2
        assert reader.labelling_digest == (LABELLING_OF_SEVERAL if "targets" in name else LABELLING)
        assert reader.content == content
        assert reader.skipped == {3: "truncated image"}
        assert reader.keys == ["0.png", "1.png", "2.png", "3.png", "4.png"]
        np.testing.assert_array_equal(reader.split_rows("test"), [4])
        np.testing.assert_array_equal(reader.split, [0, 0, 0, 1, 1])
        np.testing.assert_array_equal(reader.slots, range(5))
        np.testing.assert_array_equal(reader.lengths(), [2] * 5)
        assert (reader.labelling.groups, reader.labelling.folds) == ((), 0)
        assert reader.split.dtype == np.int16 and reader.labels().dtype == np.int64
        np.testing.assert_array_equal(reader.final_norm["weight"], [0, 1, 2, 3])
        expected = (np.arange(240).reshape(5, 2, 3, 2, 4) % 97 / 8).astype(np.float32)
        if storage == "int8":
            expected[..., 0] = 127 / 8
            expected[..., 1, :] *= -2
        expected[3] = 0
        for view in (0, 1):
            read = decode(reader.read(range(5), view=view), storage)
            np.testing.assert_array_equal(read, expected[:, view])


@pytest.mark.parametrize("name", CASES)
def test_golden_cache_reads_what_came_later_or_its_absence(name):
    error = inspect(GOLDEN / name).error
    with Reader(GOLDEN / name) as reader:
        ladder = reader.tables_below("ladder")
        if CASES[name][0] == "int8":
            assert reader.manifest.blocks == (
                {"kind": "vit", "heads": 2},
                {"kind": "vit", "heads": 4},
            )
            assert error == {"tokens": {"relative": 0.25, "worst_token": 0.5}}
            np.testing.assert_array_equal(ladder["block0/qkv_weight"], [[0, 1, 2], [3, 4, 5]])
        else:
            assert (reader.manifest.blocks, error, ladder) == ((), {}, {})


@pytest.mark.parametrize("name", CASES)
def test_golden_cache_reads_its_targets_and_seconds_or_their_absence(name):
    with Reader(GOLDEN / name) as reader:
        np.testing.assert_array_equal(reader.labels(), [0, 1, 0, 1, 0])
        kinds = {target.name: target.kind for target in reader.labelling.targets}
        if "targets" in name:
            assert kinds == {"label": "class", "marks": "multilabel", "age": "regression"}
            np.testing.assert_array_equal(
                reader.labels("marks"), [[1, 0], [0, 0], [-1, -1], [1, 1], [0, 1]]
            )
            ages = np.array([1.5, np.nan, -2, 0, 1e-3], np.float32)
            np.testing.assert_array_equal(reader.labels("age"), ages)
            assert reader.seconds == {"zarr": 0.008, "h5": 0.003}[name.rpartition(".")[2]]
        else:
            assert (kinds, reader.seconds) == ({"label": "class"}, None)


def test_making_again_touches_no_golden_cache(tmp_path):
    files = [path for path in GOLDEN.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    subprocess.run([sys.executable, GOLDEN / "make.py"], check=True, timeout=60)
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.parametrize("name", CASES)
def test_todays_writer_makes_the_golden_content(name, tmp_path):
    storage, content = CASES[name]
    make().write(tmp_path / name, storage, several="targets" in name)
    with Reader(tmp_path / name) as reader:
        assert reader.content == content
        assert reader.fingerprint == FINGERPRINT_2
        assert reader.labelling_digest == Reader(GOLDEN / name).labelling_digest


# ---- version 2 -----------------------------------------------------------------------------------

FINGERPRINT_OF_LABELLED = "3ebd86322968449e27556514924cf33fd2bb26d5b55ca05589a8281ce7e8f0c4"
LABELLED = "5d1302d43d6b57955d5c037bb7c57e4f53f030972d06f81f3b3eb1651e1785d2"
UPDATED = "5372e01048e48d17f9426af3cc21e164384aebe2a18764673bb20967be7dbc6a"
UPDATED_CONTENT = "f2403492cbb362ddf6ac3b241df00bd9b83a5acafea34e2e4c4a485709a11a3f"
SECOND = {  # storage, content, labelling; the bytes are those of version 1's
    "version_2.zarr": ("bfloat16", CASES["version_1.h5"][1], LABELLED),
    "version_2.h5": ("int8", CASES["version_1_int8.h5"][1], LABELLED),
    "version_2_updated.zarr": ("float16", UPDATED_CONTENT, UPDATED),
    "version_2_updated.h5": ("float16", UPDATED_CONTENT, UPDATED),
}


@pytest.mark.parametrize("name", SECOND)
def test_golden_cache_of_version_2_reads_to_known_numbers(name):
    storage, content, labelling = SECOND[name]
    assert verify(GOLDEN / name).ok and verify(GOLDEN / name).complete
    with Reader(GOLDEN / name) as reader:
        assert reader.container.format_version == 2
        assert (reader.fingerprint, reader.manifest.formerly) == (FINGERPRINT_OF_LABELLED, "")
        assert (reader.content, reader.labelling_digest) == (content, labelling)
        values = exact(storage)
        values[3] = 0
        if "updated" in name:
            values = np.concatenate([values, values[1:2, :, :, ::-1]])
            assert (reader.manifest.parts, reader.slots.tolist()) == ((5, 1), [4, 3, 2, 5, 0])
            assert reader.labelling.history == (LABELLED, UPDATED)
        else:
            assert (reader.manifest.parts, reader.slots.tolist()) == ((5,), [0, 1, 2, 3, 4])
            assert reader.labelling.history == (LABELLED,)
        for view in (0, 1):
            read = decode(reader.read(range(5), view=view), storage)
            np.testing.assert_array_equal(read, values[reader.slots, view])


def exact(storage):
    values = (np.arange(240).reshape(5, 2, 3, 2, 4) % 97 / 8).astype(np.float32)
    if storage == "int8":
        values[..., 0] = 127 / 8
        values[..., 1, :] *= -2
    return values


@pytest.mark.parametrize("name", SECOND)
def test_golden_cache_of_version_2_knows_its_rows_and_what_is_asked(name):
    ages = np.array([1.5, np.nan, -2, 0, 1e-3], np.float32)
    masks = [[0, 1, 255], [1, 1, 1], [255, 255, 255], [0, 0, 0], [1, 0, 1]]
    marks = [[1, 0], [0, 0], [-1, -1], [1, 1], [0, 1]]
    sites = ["north", "south", "north", "ünknown", "south"]
    keys = [f"{n}.png" for n in range(5)]
    lengths, inputs, asked = [2, 1, 0, 2, 1], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]
    if "updated" in name:
        keys = ["4.png", "copy of 3.png", "2.png", "1.png", "0.png"]
        lengths, inputs, asked = [1, 2, 0, 2, 2], [4, 3, 2, 5, 0], [4, 1, 2, 0, 0]
    with Reader(GOLDEN / name) as reader:
        assert reader.keys == keys
        assert reader.lengths().tolist() == lengths
        assert reader.source_sha256.tolist() == [[n] * 32 for n in inputs]
        assert reader.labels().tolist() == np.array([0, 1, -1, 1, 0])[asked].tolist()
        assert reader.labels("marks").tolist() == np.array(marks)[asked].tolist()
        np.testing.assert_array_equal(reader.labels("age"), ages[asked])
        assert reader.labels("mask").tolist() == np.array(masks)[asked][:, None].tolist()
        assert reader.labels("mask", rows=[3, 0]).tolist() == [[masks[asked[n]]] for n in (3, 0)]
        assert reader.split.tolist() == np.array([0, 0, -1, 1, 1])[asked].tolist()
        assert reader.folds.tolist() == np.array([0, 1, 1, -1, 0])[asked].tolist()
        assert reader.groups("site") == [sites[n] for n in asked]
        skipped = inputs.index(3)
        assert reader.skipped == {skipped: "truncated image"}
        train = [n for n in range(5) if asked[n] in (0, 1) and n != skipped]
        assert reader.split_rows("train").tolist() == train
    assert inspect(GOLDEN / name).error == {"tokens": {"relative": 0.25, "worst_token": 0.5}}


@pytest.mark.parametrize("name", SECOND)
def test_todays_writer_makes_the_golden_content_of_version_2(name, tmp_path):
    storage, content, labelling = SECOND[name]
    make().write_labelled(tmp_path / name, storage, updated="updated" in name)
    with Reader(tmp_path / name) as reader:
        assert (reader.content, reader.labelling_digest) == (content, labelling)
        assert reader.fingerprint == FINGERPRINT_OF_LABELLED


# ---- version 1 brought forward -------------------------------------------------------------------


@pytest.fixture(params=CASES)
def copied(request, tmp_path):
    """A golden cache that may be changed."""
    source, copy = GOLDEN / request.param, tmp_path / request.param
    shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
    return copy


def asked_anew():
    """Another labelling of the golden rows, and its tables."""
    target = Target(name="colour", classes=("red", "blue"))
    labelling = Labelling(rows=5, targets=(target,), splits=("a", "b", "c"), folds=2)
    tables = {
        "labels/colour": np.array([1, 0, -1, 1, 0]),
        "split": np.array([2, 1, 0, -1, 2], np.int16),
        "fold": np.array([0, 1, 0, 1, -1], np.int16),
    }
    return labelling, tables


def brought_forward(location, content):
    """What holds of a version-1 cache after any change of it."""
    found = inspect(location)
    assert (found.format_version, found.content) == (2, content)
    with Reader(location) as reader:
        assert reader.manifest.formerly == FINGERPRINT
        assert reader.is_known_as(FINGERPRINT)
        assert reader.fingerprint == FINGERPRINT_2
        assert reader.skipped == {3: "truncated image"}
        assert reader.final_norm["eps"] == 1e-6
        np.testing.assert_array_equal(reader.final_norm["weight"], [0, 1, 2, 3])
    assert verify(location).ok and verify(location).complete


def test_a_version_1_cache_is_labelled(copied):
    storage, content = CASES[copied.name]
    labelling, tables = asked_anew()
    with Reader(copied) as old:
        before, digest = old.labelling_digest, labelling.digest(old.keys, old.source_sha256, tables)
        with Writer.resume(copied) as writer:
            writer.label(labelling, tables, digest)
        np.testing.assert_array_equal(old.labels("label"), [0, 1, 0, 1, 0])  # it is open since
        np.testing.assert_array_equal(old.split, [0, 0, 0, 1, 1])
    brought_forward(copied, content)
    with Reader(copied) as reader:
        assert reader.labelling_digest == digest
        assert reader.labelling.history == (before, digest)
        for name, table in tables.items():
            np.testing.assert_array_equal(reader.labelling_table(name), table)
        np.testing.assert_array_equal(
            decode(reader.read([4, 0], view=1), storage),
            decode(Reader(GOLDEN / copied.name).read([4, 0], view=1), storage),
        )
    with Writer.resume(copied) as writer:  # and again: version 1's tables go
        writer.label(labelling, tables, digest)
    brought_forward(copied, content)
    if copied.is_dir():
        assert not (copied / "labels").exists() and not (copied / "split").exists()


def test_a_version_1_cache_is_extended(copied):
    storage, content = CASES[copied.name]
    with Reader(copied) as old:
        before, old_sha, old_keys = old.labelling_digest, old.source_sha256, old.keys
    more = make().values(storage)[:3]
    sha = np.full((3, 32), 9, np.uint8) + np.arange(3, dtype=np.uint8)[:, None]
    with Writer.resume(copied) as writer:
        added = writer.extend({"keys": encode_keys(["x", "y", "z"]), "source_sha256": sha})
        assert added == range(5, 8)
        brought_forward(copied, content)  # its labelling is version 1's, still
        assert inspect(copied).labelling == before
        for slots in writer.pending:
            writer.write(slots.start, {"tokens": more[slots.start - 5 : slots.stop - 5]})
    brought_forward(copied, content)
    with Reader(copied) as reader:
        assert (reader.rows, reader.manifest.parts) == (5, (5, 3))
        assert reader.labelling_digest == before
        found = match(reader, ["y", *old_keys], np.concatenate([sha[1:2], old_sha]))
        assert found.slots.tolist() == [6, 0, 1, 2, 3, 4]
    order = np.array([7, 2, 5, 0, 6])
    labelling, tables = asked_anew()
    digest = labelling.digest(
        ["z", "2.png", "x", "0.png", "y"],
        np.concatenate([sha[[2]], old_sha[[2]], sha[[0]], old_sha[[0]], sha[[1]]]),
        tables,
    )
    with Writer.resume(copied) as writer:
        writer.label(labelling, {**tables, "slots": order}, digest)
    with Reader(copied) as reader:
        assert reader.keys == ["z", "2.png", "x", "0.png", "y"]
        expected = np.concatenate([make().values(storage), more])[order]
        for view in (0, 1):
            np.testing.assert_array_equal(reader.read(range(5), view=view), expected[:, view])
        assert reader.is_known_as(FINGERPRINT) and reader.skipped == {}
    assert verify(copied).ok


def test_a_version_1_cache_is_repaired_and_stays_of_version_1(copied):
    storage, content = CASES[copied.name]
    container = Reader(copied).container
    extents = container.slots("tokens", 1)
    with (copied.parent / extents.name).open("r+b") as file:
        file.seek(int(extents.offsets[0, 1]))
        file.write(b"\x12\x34")
    (damage,) = verify(copied).damaged
    assert (damage.row, damage.key) == (2, "2.png")
    with Writer.resume(copied) as writer:
        assert writer.pending == []
        assert writer.replace(2, {"tokens": make().values(storage)[2:3]}) is True
    found = inspect(copied)
    assert (found.format_version, found.content) == (1, content)
    assert verify(copied).ok


def test_the_golden_caches_were_not_touched(copied):
    assert Reader(GOLDEN / copied.name).container.format_version == 1
