"""Labellings that are replaced, and rows that come, change and go: nobody who reads is disturbed,
and what is read afterwards is what a fresh cache would give."""

import dataclasses
import json
import math
import os
import pickle
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr
from cache_inputs import STACKS, TARGETS, Inputs, extract, fill, label, manifest_of, update

from cache import (
    CacheDamaged,
    CacheIncomplete,
    Labelling,
    NameMissing,
    NoSpace,
    Reader,
    Target,
    Writer,
    encode_keys,
    files,
    inspect,
    match,
    verify,
)
from cache.location import open_container

OLD = Inputs.of("a", "b", "c", "d", "e", "broken1")
NEW = Inputs.of("f", "e", "b", "a=A", "broken2", "g", "d")  # c and broken1 are gone, a has changed


def assert_alike(location: Path, fresh: Path) -> None:
    """Row for row the same, by every way to ask."""
    with Reader(location) as one, Reader(fresh) as other:
        assert one.keys == other.keys
        assert one.content == other.content
        assert one.labelling_digest == other.labelling_digest
        assert one.fingerprint == other.fingerprint
        assert one.skipped == other.skipped
        np.testing.assert_array_equal(one.source_sha256, other.source_sha256)
        for stack in STACKS:
            np.testing.assert_array_equal(one.lengths(stack.name), other.lengths(stack.name))
            rows = np.random.default_rng(0).permutation(one.rows)
            np.testing.assert_array_equal(
                one.read(rows, stack=stack.name), other.read(rows, stack=stack.name)
            )
        for target in TARGETS:
            np.testing.assert_array_equal(one.labels(target.name), other.labels(target.name))
        assert one.groups("site") == other.groups("site")
        np.testing.assert_array_equal(one.folds, other.folds)
        np.testing.assert_array_equal(one.split, other.split)
        for names in ((), ("train",), ("val", "train")):
            np.testing.assert_array_equal(one.split_rows(*names), other.split_rows(*names))
    said = [dataclasses.asdict(inspect(each)) for each in (location, fresh)]
    for name in ("targets", "kinds", "folds", "groups", "splits", "rows", "skipped", "complete"):
        assert said[0][name] == said[1][name], name
    assert verify(location).ok and verify(location).complete


# ---- what a labelling says -----------------------------------------------------------------------


def test_groups_folds_and_rows_without(location):
    extract(location, OLD)
    labelling, tables = OLD.labelling()
    with Reader(location) as reader:
        assert reader.labelling == dataclasses.replace(labelling, history=(OLD.digest(),))
        assert reader.labelling_digest == OLD.digest()
        np.testing.assert_array_equal(reader.folds, tables["fold"])
        np.testing.assert_array_equal(reader.split, tables["split"])
        assert -1 in reader.folds and -1 in reader.split
        assert reader.groups("site") == json.loads(tables["groups/site"].tobytes())
        with pytest.raises(NameMissing, match=r"no group 'age' in .*: it holds site"):
            reader.groups("age")
        splits = reader.split.copy()
        splits[list(reader.skipped)] = -1
        np.testing.assert_array_equal(reader.split_rows("val"), np.flatnonzero(splits == 1))
        assert len(reader.split_rows("train", "val")) == (splits >= 0).sum() < len(splits) - 1
        assert len(reader.split_rows()) == len(splits) - 1  # rows of no split, too
    found = inspect(location)
    assert found.splits == {n: (tables["split"] == i).sum() for i, n in enumerate(("train", "val"))}
    assert found.folds == [(tables["fold"] == fold).sum() for fold in range(3)]
    assert found.groups == {"site": len(set(Reader(location).groups("site")))}
    masks = tables["labels/mask"]
    assert found.targets["mask"] == {"sky": (masks == 0).sum(), "sea": (masks == 1).sum()}


def test_without_splits_groups_or_folds(location, sample):
    bare = sample.with_labelling(splits=())
    del bare.tables["split"]
    bare.write(location)
    with Reader(location) as reader:
        np.testing.assert_array_equal(reader.split, [-1] * 10)
        np.testing.assert_array_equal(reader.split_rows(), range(10))
        with pytest.raises(NameMissing, match="it holds none"):
            reader.split_rows("train")
        with pytest.raises(NameMissing, match="has no folds; `sidecache label --folds` draws them"):
            _ = reader.folds
    found = inspect(location)
    assert (found.splits, found.folds, found.groups) == ({}, [], {})


def test_lengths(location, sample):
    extract(location, OLD)
    with Reader(location) as reader:
        np.testing.assert_array_equal(reader.lengths("tokens"), OLD.lengths)
        np.testing.assert_array_equal(reader.lengths("late"), [2] * 6)  # nobody says
        assert reader.lengths().dtype == reader.lengths("late").dtype == np.int32
        with pytest.raises(NameMissing):
            reader.lengths("other")
    for wrong, match_ in ((6, r"slot 3 is 6, expected 0 to 5 tokens"), (-1, r"slot 3 is -1")):
        lengths = np.full(10, 5, np.int32)
        lengths[3] = wrong
        with pytest.raises(ValueError, match=match_):
            Writer(
                location.with_stem("wrong"),
                sample.manifest,
                sample.labelling,
                {**sample.tables, "lengths/tokens": lengths},
            )


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The length of every read."""
    lengths: list[int] = []
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        lengths.append(real(fd, buffers, offset))
        return lengths[-1]

    monkeypatch.setattr(os, "preadv", preadv)
    yield lengths


def test_masks_are_written_from_a_file_and_read_row_by_row(location, sample, tmp_path, bytes_read):
    """They may be larger than the memory."""
    shape = (10, 300, 200)
    masks = np.memmap(tmp_path / "masks", np.uint8, "w+", shape=shape)
    masks[:] = np.random.default_rng(0).integers(0, 3, shape)
    masks[masks == 2] = 255
    target = Target(name="mask", kind="segmentation", classes=("sky", "sea"), shape=(300, 200))
    sample = sample.with_labelling(targets=(*sample.labelling.targets, target))
    sample.tables["labels/mask"] = masks
    sample.write(location)
    with Reader(location) as reader:
        del bytes_read[:]
        read = reader.labels("mask", rows=[7, 2, 7])
        assert sum(bytes_read) == 3 * 300 * 200
        np.testing.assert_array_equal(read, masks[[7, 2, 7]])
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(reader.labels("mask"), masks)
        np.testing.assert_array_equal(reader.labels("label", rows=[4]), [1])
        assert reader.labels("mask", rows=[]).shape == (0, 300, 200)
        for rows in ([10], [-1]):
            with pytest.raises(IndexError, match="has rows 0 to 9"):
                reader.labels("mask", rows=rows)
    pixels = {"sky": (masks == 0).sum(), "sea": (masks == 1).sum()}
    assert inspect(location).targets["mask"] == pixels
    extent = open_container(location).table("labellings/0/labels/mask")
    with (location.parent / extent.name).open("r+b") as file:
        file.seek(extent.offset + 9)
        file.write(b"\7")
    assert "labels/mask" in str(verify(location).damaged[0])


# ---- replaced ------------------------------------------------------------------------------------


def test_another_labelling_of_the_same_rows(location):
    extract(location, OLD)
    before = inspect(location)
    with Reader(location) as open_since:
        label(location, OLD, seed=1)
        now = inspect(location)
        assert now.labelling == OLD.digest(seed=1) != before.labelling
        assert (now.content, now.fingerprint, now.bytes) == (
            before.content,
            before.fingerprint,
            before.bytes,
        )
        assert_alike(location, extract(location.with_stem("fresh"), OLD, seed=1))
        # Whoever has it open goes on as before, also in another process
        for reader in (open_since, pickle.loads(pickle.dumps(open_since))):
            for name, table in OLD.labelling()[1].items():
                np.testing.assert_array_equal(reader.labelling_table(name), table)
            np.testing.assert_array_equal(
                reader.labels("mask", rows=[3]), OLD.labelling()[1]["labels/mask"][[3]]
            )
            np.testing.assert_array_equal(reader.read([1, 0]), OLD.features["tokens"][[1, 0], 0])
            assert reader.labelling_digest == OLD.digest()
    assert Reader(location).labelling.history == (OLD.digest(), OLD.digest(seed=1))


def test_former_labellings_go_with_the_change_after_the_next(location):
    extract(location, OLD)
    sizes = []
    for seed in range(1, 9):
        label(location, OLD, seed=seed)
        container = open_container(location)
        sizes.append(sum(p.stat().st_size for p in location.rglob("*") if p.is_file()))
        names = raw_names(location)
        for name in (*container.document["tables"], *container.document["former"]):
            assert name in names
        left = {name.split("/")[1] for name in names if name.startswith("labellings/")}
        assert len(left) == 2
        assert verify(location).ok
    if location.is_dir():
        assert sizes[-1] < sizes[1] + 1000  # the history grows


def raw_names(location: Path) -> set[str]:
    """Every array that plain zarr or h5py finds."""
    if location.is_dir():
        group = zarr.open_group(location, mode="r")
        return {name for name, node in group.members(max_depth=None) if hasattr(node, "shape")}
    names: set[str] = set()
    with h5py.File(location, "r") as file:
        file.visititems(lambda name, node: names.add(name) if hasattr(node, "shape") else None)
    return names


def test_fewer_rows_and_others_first(location):
    """Rows are chosen and ordered by a labelling; no feature moves."""
    extract(location, OLD)
    some = OLD.at([4, 0, 2])
    labelling, tables = some.labelling()
    with Writer.resume(location) as writer:
        writer.label(labelling, {**tables, "slots": np.array([4, 0, 2])}, some.digest())
        assert writer.pending == []
    assert_alike(location, extract(location.with_stem("fresh"), some))
    with Reader(location) as reader:
        assert (reader.rows, reader.manifest.slots) == (3, 6)
        assert reader.nbytes == 3 * reader.manifest.slot_nbytes
        assert reader.slot_keys == list(OLD.keys)
        with pytest.raises(IndexError, match=r"row 3 is outside.*0 to 2"):
            reader.read([3])
    found = inspect(location)
    assert (found.rows, found.rows_done, found.slots, found.slots_pending) == (3, 3, 6, 0)


def test_a_labelling_that_does_not_fit_is_refused_and_changes_nothing(location):
    extract(location, OLD)
    before = files_of(location)
    labelling, tables = OLD.labelling(seed=1)
    with Writer.resume(location) as writer:
        for wrong, message in (
            ({"slots": np.array([0, 1, 2, 3, 4, 6])}, "'slots': row 5 is 6, expected 0 to 5"),
            ({"fold": np.full(6, 3, np.int16)}, "'fold': row 0 is 3"),
            ({"labels/kind": np.zeros(5, np.int64)}, r"expected int64 \(6,\)"),
            ({"more": np.zeros(6)}, r"\['more'\]: the labelling does not speak of them"),
        ):
            with pytest.raises(ValueError, match=message):
                writer.label(labelling, {**tables, **wrong}, "")
        fewer = {name: table for name, table in tables.items() if name != "split"}
        with pytest.raises(ValueError, match=r"\['split'\] are missing"):
            writer.label(labelling, fewer, "")
    assert files_of(location) == before


def files_of(location: Path) -> dict[Path, bytes]:
    paths = [location, *location.parent.rglob("*")]
    return {path: path.read_bytes() for path in paths if path.is_file()}


def test_only_a_writer_that_is_alone_and_between_shards_changes_the_cache(location):
    extract(location, OLD)
    labelling, tables = OLD.labelling(seed=1)
    with Writer.resume(location, worker=1, workers=2) as writer:
        with pytest.raises(ValueError, match="alone, and between shards"):
            writer.label(labelling, tables, "")
        with pytest.raises(ValueError, match="alone, and between shards"):
            writer.extend(NEW.slot_tables)
    with Writer.resume(location) as writer:
        added = writer.extend(NEW.slot_tables)
        first = NEW.at([0])
        writer.write(added.start, first.features)
        with pytest.raises(ValueError, match="alone, and between shards"):
            writer.label(labelling, tables, "")
        writer.write(added.start + 1, NEW.at([1]).features)
        writer.label(labelling, tables, "")


# ---- rows that come, change and go ---------------------------------------------------------------


@pytest.mark.parametrize("slots_per_shard", [1, 2, 4, 64])
def test_an_updated_cache_is_a_fresh_one(location, slots_per_shard):
    extract(location, OLD, slots_per_shard=slots_per_shard)
    with Reader(location) as open_since:
        found = update(location, NEW)
        assert (found.new, found.changed, found.vanished) == ([0, 4, 5], [3], [2, 5])
        assert found.slots.tolist() == [6, 4, 1, 7, 8, 9, 3]
        assert not found.same
        assert_alike(location, extract(location.with_stem("fresh"), NEW, slots_per_shard=3))
        np.testing.assert_array_equal(open_since.read(range(6)), expected(OLD, "tokens"))
        assert open_since.keys == list(OLD.keys)
        np.testing.assert_array_equal(open_since.labels("kind"), OLD.labelling()[1]["labels/kind"])
    newer = Inputs.of("h", *NEW.keys[2:5], "c", "f")  # c comes back: it is still there
    assert update(location, newer).slots.tolist()[4:] == [2, 6]
    assert_alike(location, extract(location.with_stem("newer"), newer))
    assert len(Reader(location).manifest.parts) == 3
    same = update(location, newer)
    assert same.same and not same.missing and not same.vanished
    assert len(Reader(location).manifest.parts) == 3


def expected(inputs: Inputs, stack: str) -> np.ndarray:
    values = inputs.features[stack][:, 0].copy()
    values[list(inputs.skipped)] = 0
    return values


def test_plain_libraries_read_an_updated_cache(location):
    """By `labelling_at`, `slots` and parts, with the lines that docs/format.md gives."""
    extract(location, OLD)
    update(location, NEW)
    text = (Path(__file__).parents[2] / "docs/format.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    if location.suffix == ".h5":
        lines = code.splitlines()
        (instead,) = (line for line in lines if line.startswith("# or: "))
        kept = [line for line in lines if not line.startswith(("group =", "document ="))]
        kept.insert(kept.index(instead), instead.removeprefix("# or: "))
        code = "\n".join(kept)
    code = code.split("values =")[0].replace(f"x{location.suffix}", str(location))
    for row in range(7):
        known: dict = {}
        exec(code.replace("slots[5]", f"slots[{row}]"), known)
        np.testing.assert_array_equal(known["tokens"], expected(NEW, "tokens")[row])
        assert known["key"] == NEW.keys[row]
        labels = known["group"][f"{known['at']}labels/kind"][:]
        np.testing.assert_array_equal(labels, NEW.labelling()[1]["labels/kind"])
        if location.suffix == ".h5":
            known["group"].close()


def test_before_the_labelling_speaks_of_them_nobody_sees_new_slots(location):
    extract(location, OLD)
    before = inspect(location)
    with Writer.resume(location) as writer:
        added = writer.extend(NEW.slot_tables)
        assert added == range(6, 13)
        assert writer.pending == [range(6, 8), range(8, 10), range(10, 12), range(12, 13)]
        now = inspect(location)
        assert (now.rows, now.complete, now.slots_pending) == (6, True, 7)
        assert (now.content, now.labelling) == (before.content, before.labelling)
        fill(writer, NEW, added.start)
        now = inspect(location)
        assert (now.slots, now.slots_pending, now.content) == (13, 0, before.content)
    assert_alike(location, extract(location.with_stem("fresh"), OLD))


def test_rows_of_slots_that_are_not_filled_are_incomplete(location):
    extract(location, OLD)
    labelling, tables = NEW.labelling()
    with Writer.resume(location) as writer:
        added = writer.extend(NEW.slot_tables)
        writer.label(labelling, {**tables, "slots": np.array(added)}, NEW.digest())
    with pytest.raises(CacheIncomplete, match="0 of 7 rows are done"):
        Reader(location)
    with Writer.resume(location) as writer:
        assert writer.slots_done == 6
        writer.write(8, NEW.at([2, 3]).features)
    with Reader(location, allow_incomplete=True) as reader:
        assert (reader.rows_done, reader.slots_pending) == (2, 5)
        np.testing.assert_array_equal(reader.read([2, 3]), expected(NEW, "tokens")[2:4])
        with pytest.raises(CacheIncomplete, match="rows 0 to 1 are not done yet"):
            reader.read([0])


def test_an_update_is_resumed_by_workers(location):
    extract(location, OLD)
    with Writer.resume(location) as writer:
        writer.extend(NEW.slot_tables)
    writers = [Writer.resume(location, worker=worker, workers=2) for worker in range(2)]
    assert [writer.pending for writer in writers] == [
        [range(8, 10), range(12, 13)],
        [range(6, 8), range(10, 12)],
    ]
    for writer in writers:
        fill(writer, NEW, 6)
    for writer in writers:
        writer.close()
    labelling, tables = NEW.labelling()
    with Writer.resume(location) as writer:
        slots = {"slots": np.arange(6, 13)}
        writer.label(labelling, {**tables, **slots}, NEW.digest())
    assert_alike(location, extract(location.with_stem("fresh"), NEW))


def test_slots_of_an_update_are_written_in_their_own_shards(location):
    """A part begins with a new shard, wherever the one before it ends."""
    extract(location, OLD, slots_per_shard=4)  # slots 0 to 3, 4 and 5; then 6 to 9, 10 to 12
    with Writer.resume(location) as writer:
        writer.extend(NEW.slot_tables)
        with pytest.raises(ValueError, match=r"reach past their shard, which is slots 6 to 9"):
            writer.write(8, NEW.at([2, 3, 4]).features)
        for wrong in (4, 5, -1, 13):
            with pytest.raises(ValueError, match="not in a pending shard"):
                writer.write(wrong, NEW.at([0]).features)
        for slots in ((10, 13), (7, 10), (6, 7)):
            writer.write(slots[0], NEW.at(range(slots[0] - 6, slots[1] - 6)).features)
        assert writer.pending == []
    with Reader(location) as reader:
        assert reader.manifest.shards == 4


def test_an_update_must_say_of_its_slots_what_the_cache_says_of_others(location):
    extract(location, OLD)
    before = files_of(location)
    tables = NEW.slot_tables
    with Writer.resume(location) as writer:
        for changes, message in (
            ({"source_sha256": None}, "'source_sha256': expected it for all parts"),
            ({"lengths/tokens": None}, "'lengths/tokens': expected it for all parts"),
            ({"lengths/late": NEW.lengths * 0}, "'lengths/late': expected it for all parts"),
            ({"source_sha256": OLD.digests}, r"expected uint8 \(7, 32\), received uint8 \(6, 32\)"),
            ({"final_norm/weight": np.zeros(4)}, "is the whole cache's: an update cannot change"),
            ({"lengths/tokens": NEW.lengths * 9}, "slot .* expected 0 to 3 tokens"),
        ):
            changed = {n: t for n, t in {**tables, **changes}.items() if t is not None}
            with pytest.raises(ValueError, match=message):
                writer.extend(changed)
    assert files_of(location) == before


def test_an_update_that_does_not_fit_on_the_disk_is_refused(location, monkeypatch):
    extract(location, OLD)
    before = files_of(location)
    with Writer.resume(location) as writer:
        monkeypatch.setattr(files, "free_bytes", lambda path: 100)
        with pytest.raises(NoSpace, match="are still to be written and 100 are free"):
            writer.extend(NEW.slot_tables)
    assert files_of(location) == before


def test_a_disk_that_is_full_in_the_middle_of_a_change_changes_nothing(location, monkeypatch):
    extract(location, OLD)
    real = files.write_all
    for allowed in range(50):
        calls = iter([True] * allowed)

        def write_all(
            fd: int, data: memoryview, offset: int, calls: Iterator[bool] = calls
        ) -> None:
            if not next(calls, False):
                raise OSError(28, "No space left on device")
            real(fd, data, offset)

        monkeypatch.setattr(files, "write_all", write_all)
        try:
            label(location, OLD, seed=1)
        except NoSpace:
            monkeypatch.undo()
            assert inspect(location).labelling in (OLD.digest(), OLD.digest(seed=1))
        else:
            break
    monkeypatch.undo()
    assert allowed > 3
    assert_alike(location, extract(location.with_stem("fresh"), OLD, seed=1))


def test_inputs_that_are_alike_share_features(location):
    extract(location, OLD)
    copies = Inputs.of("a", "copy of b=b", "b", "another copy=b", "z", "copy of z=z")
    found = update(location, copies)
    assert found.slots.tolist()[:4] == [0, 1, 1, 1]
    assert_alike(location, extract(location.with_stem("fresh"), copies))
    with Reader(location) as reader:
        assert reader.keys == list(copies.keys)


# ---- which inputs a cache knows ------------------------------------------------------------------


def test_match_names_what_is_new_changed_and_gone(location):
    extract(location, OLD)
    with Reader(location) as reader:
        found = match(reader, OLD.keys, OLD.digests)
        assert found.same and found.missing == found.vanished == []
        assert found.slots.tolist() == list(range(6))
        found = match(reader, NEW.keys, NEW.digests)
        assert found.slots.tolist() == [-1, 4, 1, -1, -1, -1, 3]
        assert (found.new, found.changed, found.missing) == ([0, 4, 5], [3], [0, 3, 4, 5])
        assert found.vanished == [2, 5]
        other_order = OLD.at([1, 0, 2, 3, 4, 5])
        found = match(reader, other_order.keys, other_order.digests)
        assert (found.same, found.missing, found.slots.tolist()[:2]) == (False, [], [1, 0])
        renamed = Inputs.of("x=a", *OLD.keys[1:])
        found = match(reader, renamed.keys, renamed.digests)
        assert (found.same, found.missing, found.vanished) == (False, [], [0])


def test_match_needs_digests(location, sample):
    del sample.tables["source_sha256"]
    sample.write(location)
    with Reader(location) as reader, pytest.raises(NameMissing, match="source_sha256"):
        match(reader, ["a"], np.zeros((1, 32), np.uint8))


# ---- repaired ------------------------------------------------------------------------------------


def flip(location: Path, stack: str, slot: int, view: int = 0) -> None:
    container = open_container(location)
    shard = int(container.manifest.shards_of(np.array(slot)))
    extents = container.slots(stack, shard)
    place = slot - container.manifest.shard_slots(shard).start
    with (location.parent / extents.name).open("r+b") as file:
        file.seek(int(extents.offsets[place, view]) + 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def test_a_damaged_row_is_replaced_in_its_place(location):
    extract(location, OLD)
    update(location, NEW)
    before, content = records(location), inspect(location).content
    flip(location, "late", 7)  # of a part that came later; row 3
    (damage,) = verify(location).damaged
    assert (damage.row, damage.key, damage.stack) == (3, "a", "late")
    with Writer.resume(location) as writer:
        assert writer.replace(7, NEW.at([3]).features) is True
        assert writer.pending == []
    assert verify(location).ok
    assert (inspect(location).content, records(location)) == (content, before)
    assert_alike(location, extract(location.with_stem("fresh"), NEW))


def records(location: Path) -> list[bytes | None]:
    container = open_container(location)
    return [container.record(shard) for shard in range(container.manifest.shards)]


def test_other_bits_replace_the_record(location):
    """Another machine's last bits: the checksum follows, of that slot alone."""
    extract(location, OLD)
    before, content = records(location), inspect(location).content
    flip(location, "tokens", 2)
    other = {name: values + np.float16(1) for name, values in OLD.at([2]).features.items()}
    with Writer.resume(location) as writer:
        assert writer.replace(2, other) is False
    assert verify(location).ok
    assert inspect(location).content != content
    assert [a == b for a, b in zip(before, records(location), strict=True)] == [True, False, True]
    with Reader(location) as reader:
        np.testing.assert_array_equal(reader.read([2]), other["tokens"][:, 0])
        np.testing.assert_array_equal(reader.read([3]), OLD.features["tokens"][[3], 0])


def test_a_skipped_row_that_can_be_read_again(location):
    extract(location, OLD)
    mended = Inputs.of("mended")
    with Writer.resume(location) as writer:
        assert writer.replace(5, mended.features) is False
    with Reader(location) as reader:
        assert reader.skipped == {}
        np.testing.assert_array_equal(reader.read([5]), mended.features["tokens"][:, 0])
    assert verify(location).ok


def test_what_cannot_be_replaced(location):
    extract(location, OLD)
    one = OLD.at([0]).features
    with Writer.resume(location) as writer:
        writer.extend(NEW.slot_tables)
        with pytest.raises(ValueError, match="slot 6 is not in a finished shard"):
            writer.replace(6, one)
        for slot in (-1, 13):
            with pytest.raises(ValueError, match=f"slot {slot} is not in a finished shard"):
                writer.replace(slot, one)
        with pytest.raises(ValueError, match=r"stack 'late'|stacks"):
            writer.replace(0, {"tokens": one["tokens"]})
        with pytest.raises(ValueError, match="expected arrays of one slot, received 2"):
            writer.replace(0, OLD.at([0, 1]).features)
    assert_alike(location, extract(location.with_stem("fresh"), OLD))


def test_lost_shards_are_told(location):
    """A record that is torn, and in Zarr a file that is gone: nothing can be written in place."""
    extract(location, OLD)
    update(location, NEW)
    place = open_container(location).record_place(1)
    with (location.parent / place.name).open("r+b") as file:
        file.seek(place.offset + 30)
        file.write(b"\xff")
    flip(location, "tokens", 1)
    found = verify(location)
    assert found.lost_shards == [1]
    assert {d.row for d in found.damaged} == {2, 6}  # slots 1 and 3; row c has gone
    if location.is_dir():
        (location.parent / open_container(location).slots("late", 4).name).unlink()
        found = verify(location)
        assert found.lost_shards == [1, 4]
        assert {d.row for d in found.damaged} == {2, 6, 4, 5}
        with Writer.resume(location) as writer, pytest.raises(CacheDamaged, match="is missing"):
            writer.replace(8, NEW.at([4]).features)
    with Writer.resume(location) as writer:
        writer.forget(found.lost_shards)
        writer.replace(1, NEW.at([2]).features)
        for slots in writer.pending:
            for slot in slots:
                inputs, n = (OLD, slot) if slot < 6 else (NEW, [0, 3, 4, 5][slot - 6])
                skipped = {slot: "no"} if n in inputs.skipped else {}
                writer.write(slot, inputs.at([n]).features, skipped)
    assert_alike(location, extract(location.with_stem("fresh"), NEW))


# ---- meanwhile -----------------------------------------------------------------------------------


def test_opening_while_the_labelling_is_replaced_again_and_again(location):
    extract(location, OLD)
    digests = {OLD.digest(seed=seed): seed for seed in (0, 1)}
    stop, wrong = threading.Event(), []

    def replace() -> None:
        seed = 0
        with Reader(location) as reader:
            places = reader.place_tables
        with Writer.resume(location) as writer:
            while not stop.is_set():
                seed = 1 - seed
                labelling, tables = OLD.labelling(seed=seed)
                writer.label(labelling, {**tables, **places}, OLD.digest(seed=seed))

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(60):
            with Reader(location) as reader:
                if reader.labelling_digest not in digests:
                    wrong.append(reader.labelling_digest)
    finally:
        stop.set()
        thread.join()
    assert not wrong
    assert verify(location).ok


def test_reading_labels_while_they_are_replaced_once(location):
    """Those that a reader has opened stay until the change after the next."""
    extract(location, OLD)
    tables = [OLD.labelling(seed=seed)[1] for seed in (0, 1)]
    for seed in [1, 0] * 8:
        thread = threading.Thread(target=label, args=(location, OLD), kwargs={"seed": seed})
        thread.start()
        with Reader(location) as reader:
            digest = reader.labelling_digest
            expected = tables[0] if digest == OLD.digest() else tables[1]
            for name, table in expected.items():
                np.testing.assert_array_equal(reader.labelling_table(name), table)
        thread.join()


def test_copied_elsewhere_it_is_the_same_cache(location, tmp_path):
    extract(location, OLD)
    update(location, NEW)
    other = tmp_path / "elsewhere" / location.name
    other.parent.mkdir()
    shutil.copytree(location, other) if location.is_dir() else shutil.copy(location, other)
    assert inspect(other).content == inspect(location).content
    label(other, NEW, seed=3)
    assert inspect(other).labelling == NEW.digest(seed=3)


def test_content_and_labelling_by_the_book(location):
    """Recomputed from raw bytes, as docs/format.md defines them."""
    import hashlib

    extract(location, OLD)
    update(location, NEW)
    manifest = manifest_of(NEW).to_dict()
    described = {name: manifest[name] for name in ("storage", "views", "stacks")}
    described |= {"rows": 7, "skipped": [4], "keys": list(NEW.keys)}
    text = json.dumps(described, sort_keys=True, separators=(",", ":"))
    import xxhash

    rows = [
        xxhash.xxh3_128_hexdigest(np.ascontiguousarray(expected(NEW, stack.name)[row]).tobytes())
        for stack in STACKS
        for row in range(7)
    ]
    content = hashlib.sha256((text + "".join(rows)).encode()).hexdigest()
    assert inspect(location).content == content
    labelling, tables = NEW.labelling()
    described = {
        n: labelling.to_dict()[n] for n in ("rows", "targets", "splits", "groups", "folds")
    }
    described["keys"] = list(NEW.keys)
    total = hashlib.sha256(json.dumps(described, sort_keys=True, separators=(",", ":")).encode())
    total.update(NEW.digests.tobytes())
    for name in sorted(tables):
        total.update(tables[name].tobytes())
    assert inspect(location).labelling == total.hexdigest()


def test_a_labelling_without_anything(location):
    extract(location, OLD)
    labelling = Labelling(rows=6)
    digest = labelling.digest(OLD.keys, OLD.digests, {})
    with Writer.resume(location) as writer:
        writer.label(labelling, {}, digest)
        writer.label(labelling, {}, digest)
    with Reader(location) as reader:
        assert reader.labelling_digest == digest
        np.testing.assert_array_equal(reader.slots, range(6))
    label(location, OLD, seed=2)
    assert_alike(location, extract(location.with_stem("fresh"), OLD, seed=2))
    assert math.prod(Reader(location).manifest.parts) == 6
    assert encode_keys(OLD.keys).tobytes() == Reader(location).table("keys").tobytes()
