"""What every container must do. The numbers are compared through raw zarr and h5py as well, which
see the files without the code under test."""

import dataclasses
import errno
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr

from cache import Reader, Target, Writer, decode, files, inspect, verify
from cache.ledger import Record
from cache.location import Location, open_container
from cache.stores.posix import PosixStore


def raw(location: Path, name: str) -> np.ndarray:
    if location.suffix == ".zarr":
        return np.asarray(zarr.open_group(location, mode="r")[name][...])
    with h5py.File(location, "r") as file:
        return file[name][...]


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16", "int8"])
def test_reads_back_what_was_written(location, samples, storage):
    sample = samples(storage)
    sample.write(location)
    rows = [9, 3, 4, 5, 0, 1, 1, 2]
    with Reader(location) as reader:
        for name, values in sample.values.items():
            for view in (0, 1):
                np.testing.assert_array_equal(
                    reader.read(rows, stack=name, view=view), values[rows, view]
                )
        np.testing.assert_array_equal(
            reader.read(range(2, 9), taps=slice(1, 3)), sample.values["tokens"][2:9, 0, 1:3]
        )
        values = decode(reader.read([0]), storage)
        assert (values.dtype, values.shape) == (np.float32, (1, 3, 5, 4))
        assert reader.read([]).shape == (0, *sample.manifest.stored_shape("tokens"))
    assert verify(location).ok


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "int8"])
def test_plain_libraries_read_the_same(location, samples, storage):
    sample = samples(storage)
    sample.write(location)
    for name, values in sample.values.items():
        stored = raw(location, f"stacks/{name}")
        assert stored.dtype == values.dtype
        np.testing.assert_array_equal(stored, values)
    for name, table in sample.stored.items():
        np.testing.assert_array_equal(raw(location, name), table)
    shards, record_bytes = raw(location, "ledger").shape
    assert shards == 3
    for shard in range(shards):
        record = open_container(location).record(shard)
        assert raw(location, "ledger")[shard].tobytes() == record
        assert len(record) == record_bytes


def test_int8_decodes_with_two_lines_of_numpy(location, samples):
    sample = samples("int8")
    sample.write(location)
    tokens = raw(location, "stacks/tokens")[7, 0]
    scale = tokens[..., -4:].copy().view("<f4")
    values = tokens[..., :-4].astype("float32") * scale
    np.testing.assert_array_equal(values, decode(sample.values["tokens"][7, 0], "int8"))
    assert scale.shape == (3, 5, 1)


def test_int8_skips_and_resumes(location, samples):
    sample = samples("int8")
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        writer.write(4, sample.rows(4, 8), {5: "truncated image"})
    sample.write(location)
    with Reader(location) as reader:
        assert not decode(reader.read([5]), "int8").any()
        np.testing.assert_array_equal(
            reader.read([9, 6], stack="late", view=1), sample.values["late"][[9, 6], 1]
        )
    assert verify(location).ok


def test_zarr_needs_no_sidecache_to_check_its_shards(tmp_path, sample):
    """zarr recomputes the CRC32C of every shard index, and skips none of our rows."""
    location = sample.write(tmp_path / "a.zarr")
    array = zarr.open_group(location, mode="r")["stacks/tokens"]
    np.testing.assert_array_equal(array[9, 1], sample.values["tokens"][9, 1])
    assert array.shards == (4, 2, 3, 5, 4)
    assert array.chunks == (1, 1, 3, 5, 4)


def test_metadata_tables_and_splits(location, sample):
    sample.write(location)
    with Reader(location) as reader:
        assert reader.manifest == sample.manifest
        assert reader.fingerprint == sample.manifest.fingerprint
        assert reader.keys == [f"images/é{row}.png" for row in range(10)]
        np.testing.assert_array_equal(reader.labels(), np.arange(10) % 3)
        np.testing.assert_array_equal(reader.split_rows("val"), [3, 7])
        np.testing.assert_array_equal(reader.split_rows("val", "train"), np.arange(10))
        np.testing.assert_array_equal(reader.source_sha256, sample.tables["source_sha256"])
        assert reader.final_norm["kind"] == "layer"
        assert reader.final_norm["eps"] == 1e-6
        np.testing.assert_array_equal(
            reader.final_norm["weight"], sample.tables["final_norm/weight"]
        )
        ladder = reader.tables_below("ladder")
        assert sorted(ladder) == ["block0/qkv_weight", "block11/qkv_weight"]
        for name, table in ladder.items():
            np.testing.assert_array_equal(table, sample.tables[f"ladder/{name}"])
        assert list(reader.tables_below("ladder/block11")) == ["qkv_weight"]
        assert reader.tables_below("ladd") == reader.tables_below("keys") == {}
        with pytest.raises(KeyError, match=r"no split 'test'.*train, val"):
            reader.split_rows("test")
        with pytest.raises(KeyError, match=r"no target 'age'.*label"):
            reader.labels("age")
        with pytest.raises(KeyError, match=r"no table 'nothing'.*keys"):
            reader.table("nothing")


def several_targets(sample, rows=10):
    """The sample with a target of each kind beside its own; row 1 has no label for any of them."""
    targets = (
        *sample.labelling.targets,
        Target(name="marks", kind="multilabel", classes=("tail", "ears")),
        Target(name="age", kind="regression"),
    )
    marks = (np.arange(rows)[:, None] % [2, 5] == 0).astype(np.int8)
    ages = np.linspace(-1, 8, rows, dtype=np.float32)
    labels = sample.tables["labels/label"].copy()
    labels[1], marks[1], ages[1] = -1, -1, np.nan
    sample.tables |= {"labels/label": labels, "labels/marks": marks, "labels/age": ages}
    return sample.with_labelling(targets=targets)


def test_targets_of_every_kind(location, sample):
    sample = several_targets(sample)
    sample.write(location)
    with Reader(location) as reader:
        assert [target.name for target in reader.labelling.targets] == ["label", "marks", "age"]
        for name in ("label", "marks", "age"):
            table = sample.tables[f"labels/{name}"]
            assert reader.labels(name).dtype == table.dtype
            np.testing.assert_array_equal(reader.labels(name), table)
            np.testing.assert_array_equal(raw(location, f"labellings/0/labels/{name}"), table)
            assert reader.target(name).name == name
        np.testing.assert_array_equal(reader.labels(), reader.labels("label"))
        assert reader.target() == sample.labelling.targets[0]
        with pytest.raises(KeyError, match=r"no target 'sex'.*it holds label, marks, age"):
            reader.labels("sex")
    found = inspect(location)
    assert found.kinds == {"label": "class", "marks": "multilabel", "age": "regression"}
    assert found.targets == {
        "label": {"cat": 4, "dog": 2, "eel": 3},
        "marks": {"tail": 5, "ears": 2},
        "age": {"rows": 9, "min": -1.0, "mean": pytest.approx(35 / 9), "max": 8.0},
    }
    assert verify(location).ok


def test_other_labels_are_another_labelling_of_the_same_content(tmp_path, sample):
    contents, labellings = [], []
    for name, age in (("a", 0.5), ("b", 0.5), ("c", 0.25)):
        changed = several_targets(dataclasses.replace(sample, tables=dict(sample.tables)))
        changed.tables["labels/age"][4] = age
        found = inspect(changed.write(tmp_path / f"{name}.zarr"))
        contents.append(found.content)
        labellings.append(found.labelling)
    assert contents[0] == contents[1] == contents[2]
    assert labellings[0] == labellings[1] != labellings[2]


def test_a_cache_without_targets_or_values(location, sample):
    bare = sample.with_labelling(targets=())
    del bare.tables["labels/label"]
    bare.write(location)
    with Reader(location) as reader, pytest.raises(KeyError, match=r"no target in .*holds none"):
        reader.labels()
    empty = sample.with_labelling(targets=(Target(name="age", kind="regression"),))
    empty.tables["labels/age"] = np.full(10, np.nan, np.float32)
    empty.write(location, overwrite=True)
    nothing = {"rows": 0, "min": None, "mean": None, "max": None}
    assert inspect(location).targets == {"age": nothing}


def test_seconds_are_the_wall_time_of_all_legs(location, sample, monkeypatch):
    """By a clock that says what it is told; what is not published is not counted."""
    now = 100.0
    monkeypatch.setattr("cache.writer.time.perf_counter", lambda: now)
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        assert inspect(location).seconds is None
        now += 1.5
        sample.fill(writer, [range(4, 8)])
        assert inspect(location).seconds == 1.5
        now += 2.0004
        sample.fill(writer, [range(4)])
        now += 50.0
        writer.write(8, sample.rows(8, 9))  # is given up
    assert Reader(location, allow_incomplete=True).seconds == 3.5
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        now += 0.25
        sample.fill(writer)
    assert Reader(location).seconds == inspect(location).seconds == 3.75
    content = inspect(location).content
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        writer.forget([1])
        now += 9.0
        sample.fill(writer)
    assert Reader(location).seconds == 11.25  # the repaired shard's time replaces its first one
    assert inspect(location).content == content


def test_threads_share_the_wall_time(location, samples):
    """Shards that are published at the same time do not count it twice."""
    sample = samples(rows=12, slots_per_shard=1)
    begin = time.perf_counter()
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        threads = [
            threading.Thread(target=sample.fill, args=(writer, [range(row, row + 1)]))
            for row in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert 0 <= Reader(location).seconds <= time.perf_counter() - begin + 12 * 0.0005


def test_content_depends_on_the_numbers_alone(tmp_path, sample):
    contents = set()
    for number, slots_per_shard in enumerate((1, 3, 4, 10, 64)):
        changed = sample.with_manifest(slots_per_shard=slots_per_shard, notes={"n": number})
        for suffix in ("zarr", "h5"):
            location = tmp_path / f"{number}.{suffix}"
            with Writer(location, changed.manifest, changed.labelling, changed.tables) as writer:
                for rows in reversed(writer.pending):
                    for row in reversed(rows):
                        writer.write(row, changed.rows(row, row + 1))
            contents.add(inspect(location).content)
            np.testing.assert_array_equal(raw(location, "stacks/late"), sample.values["late"])
    assert len(contents) == 1
    sample.values["late"][7, 1, 0, 1, 2] += 1
    assert inspect(sample.write(tmp_path / "other.h5")).content not in contents


def test_second_open_of_a_complete_cache_has_nothing_to_do(location, sample):
    sample.write(location)
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        assert writer.pending == []
        assert writer.slots_done == 10
        assert writer.bytes_written == 0


def test_resumes_with_the_shards_on_disk(location, sample):
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        sample.fill(writer, [range(4, 8)])
        writer.write(0, sample.rows(0, 3))  # not a whole shard: is given up
    other_layout = sample.with_manifest(slots_per_shard=7)
    with Writer(
        location, other_layout.manifest, other_layout.labelling, other_layout.tables
    ) as writer:
        assert writer.pending == [range(4), range(8, 10)]
        assert writer.manifest.slots_per_shard == 4
        sample.fill(writer)
    np.testing.assert_array_equal(raw(location, "stacks/tokens"), sample.values["tokens"])


def test_skipped_rows_are_zeros_and_in_no_split(location, sample):
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        writer.write(0, sample.rows(0, 4), {1: "truncated image " + "x" * 500, 3: "zéro"})
        sample.fill(writer)
    with Reader(location) as reader:
        assert list(reader.skipped) == [1, 3]
        assert reader.skipped[3] == "zéro"
        assert len(reader.skipped[1]) == 160
        assert not reader.read([1, 3]).any()
        np.testing.assert_array_equal(reader.split_rows(), [0, 2, 4, 5, 6, 7, 8, 9])
        np.testing.assert_array_equal(reader.split_rows("val"), [7])
    assert verify(location).ok


def test_measured_errors_add_up(location, sample):
    def inspected() -> dict:
        return inspect(location).error

    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        for row, number in ((2, 0.25), (0, 0.5), (3, 0.0)):
            errors = {"tokens": (number, 4.0, number)}
            writer.write(row, sample.rows(row, row + 1), None, errors)
        assert inspected() == {}  # the shard is not done
        writer.write(1, sample.rows(1, 2))
        assert inspected() == {"tokens": {"relative": 0.25, "worst_token": 0.5}}
        overflown = {"tokens": (np.inf, np.inf, np.nan), "late": (0.0, 0.0, 0.0)}
        writer.write(8, sample.rows(8, 10), {}, overflown)
        writer.write(4, sample.rows(4, 7), {}, {"tokens": (9.0, 4.0, 2.0)})  # is given up
    late = {"relative": 0.0, "worst_token": 0.0}
    assert inspected() == {"tokens": {"relative": 0.25, "worst_token": 0.5}, "late": late}
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        writer.write(4, sample.rows(4, 8), {}, {"tokens": (15.25, 52.0, 0.75)})
    assert inspected() == {"tokens": {"relative": 0.5, "worst_token": 0.75}, "late": late}
    measured = inspect(location).content
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        writer.forget(range(3))
        sample.fill(writer)
    assert inspected() == {}
    assert inspect(location).content == measured
    assert verify(location).ok


def test_a_layout_without_room_for_errors_goes_without(location, sample, monkeypatch):
    """Caches laid out by an earlier program have shorter records; here ones without any slack."""
    names = {stack.name: ["0" * 32] * 4 for stack in sample.manifest.stacks}
    record = Record(shard=0, slots=(8, 12), digests=names, skipped={})
    length = len(record.to_bytes(4096).rstrip(b"\0"))
    monkeypatch.setattr("cache.containers.document.record_bytes", lambda manifest, part: length)
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        for rows in writer.pending:
            arrays = sample.rows(rows.start, rows.stop)
            writer.write(rows.start, arrays, {}, {"tokens": (0.1, 0.7, 0.3)})
    # only the last shard's record is short enough: it has two rows, not four
    expected = pytest.approx({"relative": (0.1 / 0.7) ** 0.5, "worst_token": 0.3})
    assert inspect(location).error == {"tokens": expected}
    assert set(map(len, Reader(location).errors.values())) == {1}
    assert raw(location, "ledger").shape == (3, length)
    assert verify(location).ok


def test_a_record_has_room_for_a_reason_on_every_row(location, sample):
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        for rows in writer.pending:
            writer.write(
                rows.start, sample.rows(rows.start, rows.stop), dict.fromkeys(rows, "é" * 999)
            )
    with Reader(location) as reader:
        assert len(reader.skipped) == 10


def test_workers_own_shards_and_give_the_same_bytes(location, sample):
    first = Writer(location, sample.manifest, sample.labelling, sample.tables, worker=0, workers=2)
    second = Writer(location, sample.manifest, sample.labelling, sample.tables, worker=1, workers=2)
    with first, second:
        assert first.pending == [range(4), range(8, 10)]
        assert second.pending == [range(4, 8)]
        sample.fill(second)
        assert second.pending == []
        sample.fill(first)
    np.testing.assert_array_equal(raw(location, "stacks/tokens"), sample.values["tokens"])
    with Reader(location) as reader:
        assert reader.complete


def test_the_loser_of_a_race_uses_the_winners_cache(location, sample, monkeypatch):
    with Writer(
        location, sample.manifest, sample.labelling, sample.tables, worker=0, workers=2
    ) as winner:
        monkeypatch.setattr(
            "cache.location.Location.is_there", lambda self: False
        )  # it looked too early
        other = sample.with_manifest(slots_per_shard=3)
        with Writer(
            location, other.manifest, other.labelling, other.tables, worker=1, workers=2
        ) as loser:
            assert loser.manifest == winner.manifest
            sample.fill(loser)
        sample.fill(winner)
    assert list(location.parent.iterdir()) == [location]
    assert verify(location).complete


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("equal", [True, False], ids=["equal bytes", "other last bits"])
def test_two_writers_of_a_shard_never_publish_a_mixture(location, sample, monkeypatch, seed, equal):
    """No locks, or a worker's number given twice: in any order, what is complete is whole. With
    other last bits (another machine's) that is Zarr's alone; HDF5's `verify` tells."""
    monkeypatch.setattr("cache.files.try_lock", lambda fd, **_: None)
    random = np.random.default_rng(seed)
    values = {"a": sample.values, "b": sample.values}
    if not equal:
        values["b"] = {name: array + array.dtype.type(1) for name, array in sample.values.items()}
    writers = {
        name: Writer(location, sample.manifest, sample.labelling, sample.tables) for name in values
    }
    steps = [(name, row) for name in writers for row in range(4)]
    for place in random.permutation(len(steps)):
        name, row = steps[place]
        arrays = {stack: array[row : row + 1] for stack, array in values[name].items()}
        writers[name].write(row, arrays)
        if open_container(location).record(0) and (equal or location.suffix == ".zarr"):
            assert verify(location).ok, (seed, name, row)
    for writer in writers.values():
        writer.close()
    if location.suffix == ".zarr":
        assert not list(location.rglob(".partial"))
    elif not equal:
        return
    assert verify(location).ok
    with Reader(location, allow_incomplete=True) as reader:
        rows = reader.read(range(4), view=1)
    assert any(np.array_equal(rows, v["tokens"][:4, 1]) for v in values.values())


def test_a_file_that_a_killed_writer_named_is_vouched_for(tmp_path, sample, monkeypatch):
    """Killed between a shard's name and its record: the next writer's bits may differ."""
    location = tmp_path / "a.zarr"
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        monkeypatch.setattr(writer._container, "write_record", lambda *_: None)
        sample.fill(writer, [range(4)])
    assert inspect(location).rows_done == 0
    other = {name: array + array.dtype.type(1) for name, array in sample.values.items()}
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        writer.write(0, {name: array[:4] for name, array in other.items()})
    assert verify(location).ok
    with Reader(location, allow_incomplete=True) as reader:
        np.testing.assert_array_equal(reader.read(range(4)), sample.values["tokens"][:4, 0])


def test_a_forgotten_shard_is_written_anew(location, sample):
    """Forgetting repairs: what is damaged must not be taken for another writer's."""
    sample.write(location)
    container = open_container(location)
    extents = container.slots("tokens", 1)
    with (location.parent / extents.name).open("r+b") as file:
        file.seek(int(extents.offsets[0, 0]))
        file.write(b"\xff\xff\xff")
    found = verify(location)
    assert ({damage.row for damage in found.damaged}, found.lost_shards) == ({4}, [])
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        writer.forget([1])
        sample.fill(writer)
    assert verify(location).ok
    with Reader(location) as reader:
        np.testing.assert_array_equal(reader.read(range(10)), sample.values["tokens"][:, 0])


def test_a_cut_file_without_a_record_is_replaced(tmp_path, sample):
    location = sample.write(tmp_path / "a.zarr")
    shard = location / "stacks/tokens/c/1/0/0/0/0"
    shard.write_bytes(shard.read_bytes()[:100])
    (location / "ledger/c/1/0").unlink()
    sample.write(location)
    assert verify(location).ok
    with Reader(location) as reader:
        np.testing.assert_array_equal(reader.read(range(10)), sample.values["tokens"][:, 0])


@pytest.mark.parametrize("locks", [True, None], ids=["locks", "no locks"])
def test_unfinished_files_of_killed_writers_are_swept(tmp_path, sample, monkeypatch, locks):
    location = tmp_path / "a.zarr"
    if locks is None:
        monkeypatch.setattr("cache.files.try_lock", lambda fd, **_: None)
    live = Writer(location, sample.manifest, sample.labelling, sample.tables, workers=2)
    live.write(0, sample.rows(0, 2))
    folder = location / "stacks/tokens/.partial"
    (mine,) = folder.iterdir()
    for name, age in (("0.1.old", 10**6), ("0.1.hour", 3600), ("0.1.new", 5)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - age,) * 2)
    if locks:
        os.utime(mine, (0, 0))  # however old: its writer lives
    other = Writer(location, sample.manifest, sample.labelling, sample.tables, worker=1, workers=2)
    left = {path.name for path in folder.iterdir()}
    other.close()
    assert left == {mine.name, "0.1.new", *(["0.1.hour"] if locks is None else [])}
    live.write(2, sample.rows(2, 4))
    live.close()
    assert inspect(location).rows_done == 4 and verify(location).ok


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EACCES])
def test_a_file_system_without_hard_links(location, sample, monkeypatch, code):
    """Some have none at all, some none between folders."""

    def link(source: Path, target: Path) -> None:
        raise OSError(code, "no hard links")

    monkeypatch.setattr(os, "link", link)
    sample.write(location)
    assert verify(location).ok
    with Reader(location) as reader:
        np.testing.assert_array_equal(reader.read(range(10)), sample.values["tokens"][:, 0])


def test_without_hard_links_a_name_is_not_taken_either(location, sample, monkeypatch):
    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no hard links")

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr("cache.files.try_lock", lambda fd, **_: None)
    first = Writer(location, sample.manifest, sample.labelling, sample.tables)
    monkeypatch.setattr(
        "cache.location.Location.is_there", lambda self: False
    )  # it looked too early
    second = Writer(location, sample.manifest, sample.labelling, sample.tables)
    other = {name: array + array.dtype.type(1) for name, array in sample.values.items()}
    sample.fill(first)
    if location.suffix == ".zarr":
        second.write(0, {name: array[:4] for name, array in other.items()})
    for writer in (first, second):
        writer.close()
    assert list(location.parent.iterdir()) == [location]
    with Reader(location) as reader:
        np.testing.assert_array_equal(reader.read(range(10)), sample.values["tokens"][:, 0])
    assert verify(location).ok


def test_a_row_that_the_faster_writer_skipped_stays_skipped(tmp_path, sample, monkeypatch):
    """Its zeros would pass for features."""
    monkeypatch.setattr("cache.files.try_lock", lambda fd, **_: None)
    location = tmp_path / "a.zarr"
    with (
        Writer(location, sample.manifest, sample.labelling, sample.tables) as first,
        Writer(location, sample.manifest, sample.labelling, sample.tables) as second,
    ):
        second.write(0, sample.rows(0, 3), {2: "truncated image"})
        first.write(0, sample.rows(0, 4), {1: "no answer"})
        second.write(3, sample.rows(3, 4))
    with Reader(location, allow_incomplete=True) as reader:
        assert reader.skipped == {
            1: "skipped by another writer of this shard",
            2: "truncated image",
        }
        assert not reader.read([1]).any()
    assert verify(location).ok


def test_a_folder_of_unfinished_files_may_vanish(tmp_path, sample, monkeypatch):
    """Another worker sweeps at the same time."""
    location = tmp_path / "a.zarr"
    writer = Writer(location, sample.manifest, sample.labelling, sample.tables)
    sample.fill(writer)
    folder, real = location / "stacks/tokens/.partial", Path.iterdir
    folder.mkdir(exist_ok=True)

    def iterdir(path: Path) -> Iterator[Path]:
        if path == folder:
            folder.rmdir()
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    writer.close()
    assert not folder.exists() and verify(location).ok


def test_a_sweep_never_holds_the_lock_of_a_young_file(tmp_path, monkeypatch):
    """Its writer asks for it once, and would go without."""
    (tmp_path / "0.1.young").write_bytes(b"half")
    monkeypatch.setattr(files, "try_lock", lambda fd, **_: pytest.fail("it was asked for"))
    files.sweep(tmp_path)
    assert (tmp_path / "0.1.young").exists()


def test_overwrite_resumes_the_same_identity(location, sample):
    """Left in a script it must not throw finished shards away."""
    with Writer(
        location, sample.manifest, sample.labelling, sample.tables, overwrite=True
    ) as writer:
        sample.fill(writer, [range(4)])
    with Writer(
        location, sample.manifest, sample.labelling, sample.tables, overwrite=True
    ) as writer:
        assert writer.slots_done == 4
        sample.fill(writer)
    with Writer(
        location, sample.manifest, sample.labelling, sample.tables, overwrite=True
    ) as writer:
        assert writer.pending == []
    other = sample.with_manifest(identity={"other": 1})
    with Writer(location, other.manifest, other.labelling, other.tables, overwrite=True) as writer:
        assert writer.slots_done == 0


def test_workers_that_overwrite_leave_each_others_cache(location, sample):
    sample.with_manifest(identity={"old": 1}).write(location)
    options = {"overwrite": True, "workers": 3}
    writers = []
    for worker in range(3):
        writer = Writer(
            location, sample.manifest, sample.labelling, sample.tables, worker=worker, **options
        )
        sample.fill(writer)
        writers.append(writer)
    for writer in writers:
        writer.close()
    assert inspect(location).complete and verify(location).ok


@pytest.mark.parametrize("other", ["writes", "has ended", "has removed the old one"])
def test_a_worker_that_comes_late_to_overwriting(location, sample, monkeypatch, other):
    """It saw the old cache; before it can remove it, another has put the new one there."""
    sample.with_manifest(identity={"old": 1}).write(location)
    real, held = Location.remove, []

    def late(self: Location, unless: Callable[[], bool]) -> None:
        monkeypatch.setattr(Location, "remove", real)
        if other == "has removed the old one":
            real(self)
        else:
            first = Writer(
                location,
                sample.manifest,
                sample.labelling,
                sample.tables,
                overwrite=True,
                workers=2,
            )
            sample.fill(first)
            held.append(first)
        if other == "has ended":
            first.close()
        real(self, unless)

    monkeypatch.setattr(Location, "remove", late)
    options = {"overwrite": True, "worker": 1, "workers": 2}
    with Writer(location, sample.manifest, sample.labelling, sample.tables, **options) as writer:
        assert writer.pending == [range(4, 8)]
        sample.fill(writer)
    for first in held:
        first.close()
    assert inspect(location).rows_done == (10 if held else 4)
    assert verify(location).ok


def test_leftovers_of_a_killed_creation_are_swept(location, sample):
    for age, suffix in ((0, "young"), (3600, "old"), (3600, "living")):
        litter = location.with_name(f".{location.name}.{suffix}.creating")
        litter.write_bytes(b"half")
        os.utime(litter, (time.time() - age,) * 2)
    held = PosixStore(litter.parent).lock(litter.name)
    sample.write(location)
    held.release()
    names = {path.name for path in location.parent.iterdir()}
    assert names == {
        location.name,
        *(f".{location.name}.{n}.creating" for n in ("young", "living")),
    }


def test_threads_write_rows_of_one_shard(location, samples):
    sample = samples(rows=32, slots_per_shard=16)
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        work = [
            threading.Thread(target=writer.write, args=(row, sample.rows(row, row + 2)))
            for row in np.random.default_rng(1).permutation(16) * 2
        ]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
        assert writer.pending == []
    assert verify(location).ok
    np.testing.assert_array_equal(raw(location, "stacks/tokens"), sample.values["tokens"])


def test_many_threads_read_at_once(location, samples):
    sample = samples(rows=64, slots_per_shard=5)
    sample.write(location)
    wrong = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(50):
            rows = random.integers(0, 64, 9)
            if not np.array_equal(reader.read(rows), sample.values["tokens"][rows, 0]):
                wrong.append(rows)

    with Reader(location) as reader:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_pickled_reader_reads(location, sample):
    sample.write(location)
    with Reader(location) as reader:
        reader.read([1])
        copy = pickle.loads(pickle.dumps(reader))
    with copy:
        np.testing.assert_array_equal(copy.read([5]), sample.values["tokens"][[5], 0])


def test_reads_straight_into_the_callers_memory(location, sample):
    sample.write(location)
    memory = np.full((6, 3, 5, 4), 7, np.float16)
    with Reader(location) as reader:
        reader.read_into([8, 2], memory[1:3])
    np.testing.assert_array_equal(memory[1:3], sample.values["tokens"][[8, 2], 0])
    assert (memory[[0, 3, 4, 5]] == 7).all()


def test_open_files_are_bounded(tmp_path, samples):
    sample = samples(rows=150, slots_per_shard=1)
    location = sample.write(tmp_path / "many.zarr")
    with Reader(location) as reader:
        before = len(list(Path("/proc/self/fd").iterdir()))
        reader.read(range(150))
        assert len(list(Path("/proc/self/fd").iterdir())) - before <= 130


def test_verify_reports_progress_and_counts(location, sample):
    sample.write(location)
    seen = []
    found = verify(location, seen.append)
    assert found.ok
    assert found.complete
    assert (found.rows, found.bytes) == (10, sample.manifest.nbytes)
    assert [record.rows_done for record in seen] == [4, 8, 10]


def test_inspect_is_json_and_names_what_is_there(location, sample):
    import json

    sample.write(location)
    document = json.loads(json.dumps(inspect(location).to_dict()))
    assert document["rows"] == document["rows_done"] == 10
    assert document["bytes"] == sample.manifest.nbytes
    assert document["complete"] is True
    assert document["splits"] == {"train": 8, "val": 2}
    assert document["targets"] == {"label": {"cat": 4, "dog": 3, "eel": 3}}
    assert document["format"] == location.suffix[1:]
    assert document["error"] == {}
    assert document["stacks"][0]["taps"] == ["z0", "z1", "z2"]


def test_same_bytes_in_both_formats(tmp_path, sample):
    a, b = sample.write(tmp_path / "a.zarr"), sample.write(tmp_path / "b.h5")
    for name in ("stacks/tokens", "stacks/late", *sample.stored):
        assert raw(a, name).tobytes() == raw(b, name).tobytes(), name
    ledgers = [
        [dataclasses.replace(Record.from_bytes(data.tobytes()), seconds=None) for data in ledger]
        for ledger in (raw(a, "ledger"), raw(b, "ledger"))
    ]
    assert ledgers[0] == ledgers[1]


def test_zarr_rewritten_by_zarr_is_still_read(tmp_path, sample):
    """Other offsets in the shard files are honoured; dropped all-zero chunks are zeros."""
    location = sample.write(tmp_path / "a.zarr")
    array = zarr.open_group(location, mode="r+")["stacks/tokens"]
    array[4:8] = 0
    array[5] = sample.values["tokens"][5]
    with Reader(location) as reader:
        np.testing.assert_array_equal(reader.read([5], view=1), sample.values["tokens"][[5], 1])
        assert not reader.read([4, 6]).any()
    assert {damage.row for damage in verify(location).damaged} == {4, 6, 7}
