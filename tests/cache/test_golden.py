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
CASES = {
    "version_1.zarr": (
        "float16",
        "210c0f23b11531c2f07ba50867c8bcae0d24326237eff32761b6cab36319b2c2",
    ),
    "version_1.h5": (
        "bfloat16",
        "3c17d833e9b698e841a48f04224b2f162b9aa9c08b3fb8b91549c5269b0f5494",
    ),
    "version_1_int8.zarr": (
        "int8",
        "c2fb900ba9929bf84fffef18d6d7f13ee26edb5a657abd0b961b5c31393f1370",
    ),
    "version_1_int8.h5": (
        "int8",
        "c2fb900ba9929bf84fffef18d6d7f13ee26edb5a657abd0b961b5c31393f1370",
    ),
    "version_1_targets.zarr": (
        "float32",
        "6694f04ab1b2e237809b41b0621f9747b26c296f1f6b5059667fbdfb875293f6",
    ),
    "version_1_targets.h5": (
        "float32",
        "6694f04ab1b2e237809b41b0621f9747b26c296f1f6b5059667fbdfb875293f6",
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
        assert reader.manifest.format_version == 1
        assert reader.manifest.storage == storage
        assert reader.fingerprint == FINGERPRINT
        assert reader.content == content
        assert reader.skipped == {3: "truncated image"}
        assert reader.keys == ["0.png", "1.png", "2.png", "3.png", "4.png"]
        np.testing.assert_array_equal(reader.split_rows("test"), [4])
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
