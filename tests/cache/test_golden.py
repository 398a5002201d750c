"""Caches of format version 1 stay readable, to the same numbers, for ever."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cache import Reader, decode, inspect, verify

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
