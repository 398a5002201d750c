"""A labelling, and another in its place: no reader is disturbed, and no feature is touched."""

import dataclasses
import json
import os
import pickle
from collections.abc import Iterator

import numpy as np
import pytest
from cache_inputs import (
    Inputs,
    Where,
    assert_alike,
    beside,
    extract,
    is_zarr,
    label,
    objects,
    plain_group,
)

from cache import (
    NameMissing,
    Reader,
    Target,
    Writer,
    inspect,
    verify,
)
from cache.location import open_container

OLD = Inputs.of("a", "b", "c", "d", "e", "broken1")
NEW = Inputs.of("f", "e", "b", "a=A", "broken2", "g", "d")  # c and broken1 are gone, a has changed


# ---- what a labelling says -----------------------------------------------------------------------


def test_groups_folds_and_rows_without(anywhere):
    extract(anywhere, OLD)
    labelling, tables = OLD.labelling()
    with Reader(anywhere) as reader:
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
    found = inspect(anywhere)
    assert found.splits == {n: (tables["split"] == i).sum() for i, n in enumerate(("train", "val"))}
    assert found.folds == [(tables["fold"] == fold).sum() for fold in range(3)]
    assert found.groups == {"site": len(set(Reader(anywhere).groups("site")))}
    masks = tables["labels/mask"]
    assert found.targets["mask"] == {"sky": (masks == 0).sum(), "sea": (masks == 1).sum()}


def test_without_splits_groups_or_folds(anywhere, sample):
    bare = sample.with_labelling(splits=())
    del bare.tables["split"]
    bare.write(anywhere)
    with Reader(anywhere) as reader:
        np.testing.assert_array_equal(reader.split, [-1] * 10)
        np.testing.assert_array_equal(reader.split_rows(), range(10))
        with pytest.raises(NameMissing, match="it holds none"):
            reader.split_rows("train")
        with pytest.raises(NameMissing, match="has no folds; `sidecache label --folds` draws them"):
            _ = reader.folds
    found = inspect(anywhere)
    assert (found.splits, found.folds, found.groups) == ({}, [], {})


def test_lengths(anywhere, sample):
    extract(anywhere, OLD)
    with Reader(anywhere) as reader:
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
                beside(anywhere, "wrong"),
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


def test_another_labelling_of_the_same_rows(anywhere):
    extract(anywhere, OLD)
    before = inspect(anywhere)
    with Reader(anywhere) as open_since:
        label(anywhere, OLD, seed=1)
        now = inspect(anywhere)
        assert now.labelling == OLD.digest(seed=1) != before.labelling
        assert (now.content, now.fingerprint, now.bytes) == (
            before.content,
            before.fingerprint,
            before.bytes,
        )
        assert_alike(anywhere, extract(beside(anywhere, "fresh"), OLD, seed=1))
        # Whoever has it open goes on as before, also in another process
        for reader in (open_since, pickle.loads(pickle.dumps(open_since))):
            for name, table in OLD.labelling()[1].items():
                np.testing.assert_array_equal(reader.labelling_table(name), table)
            np.testing.assert_array_equal(
                reader.labels("mask", rows=[3]), OLD.labelling()[1]["labels/mask"][[3]]
            )
            np.testing.assert_array_equal(reader.read([1, 0]), OLD.features["tokens"][[1, 0], 0])
            assert reader.labelling_digest == OLD.digest()
    assert Reader(anywhere).labelling.history == (OLD.digest(), OLD.digest(seed=1))


def test_former_labellings_go_with_the_change_after_the_next(anywhere):
    extract(anywhere, OLD)
    sizes = []
    for seed in range(1, 9):
        label(anywhere, OLD, seed=seed)
        container = open_container(anywhere)
        sizes.append(sum(map(len, objects(anywhere).values())))
        names = raw_names(anywhere)
        for name in (*container.document["tables"], *container.document["former"]):
            assert name in names
        left = {name.split("/")[1] for name in names if name.startswith("labellings/")}
        assert len(left) == 2
        assert verify(anywhere).ok
    if is_zarr(anywhere):
        assert sizes[-1] < sizes[1] + 1000  # the history grows


def test_fewer_rows_and_others_first(anywhere):
    """Rows are chosen and ordered by a labelling; no feature moves."""
    extract(anywhere, OLD)
    some = OLD.at([4, 0, 2])
    labelling, tables = some.labelling()
    with Writer.resume(anywhere) as writer:
        writer.label(labelling, {**tables, "slots": np.array([4, 0, 2])}, some.digest())
        assert writer.pending == []
    assert_alike(anywhere, extract(beside(anywhere, "fresh"), some))
    with Reader(anywhere) as reader:
        assert (reader.rows, reader.manifest.slots) == (3, 6)
        assert reader.nbytes == 3 * reader.manifest.slot_nbytes
        assert reader.slot_keys == list(OLD.keys)
        with pytest.raises(IndexError, match=r"row 3 is outside.*0 to 2"):
            reader.read([3])
    found = inspect(anywhere)
    assert (found.rows, found.rows_done, found.slots, found.slots_pending) == (3, 3, 6, 0)


def test_a_labelling_that_does_not_fit_is_refused_and_changes_nothing(anywhere):
    extract(anywhere, OLD)
    before = objects(anywhere)
    labelling, tables = OLD.labelling(seed=1)
    with Writer.resume(anywhere) as writer:
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
    assert objects(anywhere) == before


def test_only_a_writer_that_is_alone_and_between_shards_changes_the_cache(anywhere):
    extract(anywhere, OLD)
    labelling, tables = OLD.labelling(seed=1)
    with Writer.resume(anywhere, worker=1, workers=2) as writer:
        with pytest.raises(ValueError, match="alone, and between shards"):
            writer.label(labelling, tables, "")
        with pytest.raises(ValueError, match="alone, and between shards"):
            writer.extend(NEW.slot_tables)
    with Writer.resume(anywhere) as writer:
        added = writer.extend(NEW.slot_tables)
        first = NEW.at([0])
        writer.write(added.start, first.features)
        with pytest.raises(ValueError, match="alone, and between shards"):
            writer.label(labelling, tables, "")
        writer.write(added.start + 1, NEW.at([1]).features)
        writer.label(labelling, tables, "")


def raw_names(location: Where) -> set[str]:
    """Every array that plain zarr or h5py finds."""
    group = plain_group(location)
    if is_zarr(location):
        return {name for name, node in group.members(max_depth=None) if hasattr(node, "shape")}
    names: set[str] = set()
    with group:
        group.visititems(lambda name, node: names.add(name) if hasattr(node, "shape") else None)
    return names
