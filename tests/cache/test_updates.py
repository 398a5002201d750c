"""Rows that come, change and go: what is read afterwards is what a fresh cache would give."""

import json
import math
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cache_inputs import (
    STACKS,
    Inputs,
    assert_alike,
    beside,
    extract,
    features_of,
    fill,
    label,
    manifest_of,
    objects,
    update,
)

from cache import (
    CacheIncomplete,
    Labelling,
    NameMissing,
    NoSpace,
    Reader,
    Writer,
    encode_keys,
    files,
    inspect,
    match,
    verify,
)

OLD = Inputs.of("a", "b", "c", "d", "e", "broken1")
NEW = Inputs.of("f", "e", "b", "a=A", "broken2", "g", "d")  # c and broken1 are gone, a has changed


# ---- rows that come, change and go ---------------------------------------------------------------


@pytest.mark.parametrize("slots_per_shard", [1, 2, 4, 64])
def test_an_updated_cache_is_a_fresh_one(anywhere, slots_per_shard):
    extract(anywhere, OLD, slots_per_shard=slots_per_shard)
    with Reader(anywhere) as open_since:
        found = update(anywhere, NEW)
        assert (found.new, found.changed, found.vanished) == ([0, 4, 5], [3], [2, 5])
        assert found.slots.tolist() == [6, 4, 1, 7, 8, 9, 3]
        assert not found.same
        assert_alike(anywhere, extract(beside(anywhere, "fresh"), NEW, slots_per_shard=3))
        np.testing.assert_array_equal(open_since.read(range(6)), features_of(OLD, "tokens"))
        assert open_since.keys == list(OLD.keys)
        np.testing.assert_array_equal(open_since.labels("kind"), OLD.labelling()[1]["labels/kind"])
    newer = Inputs.of("h", *NEW.keys[2:5], "c", "f")  # c comes back: it is still there
    assert update(anywhere, newer).slots.tolist()[4:] == [2, 6]
    assert_alike(anywhere, extract(beside(anywhere, "newer"), newer))
    assert len(Reader(anywhere).manifest.parts) == 3
    same = update(anywhere, newer)
    assert same.same and not same.missing and not same.vanished
    assert len(Reader(anywhere).manifest.parts) == 3


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
        np.testing.assert_array_equal(known["tokens"], features_of(NEW, "tokens")[row])
        assert known["key"] == NEW.keys[row]
        labels = known["group"][f"{known['at']}labels/kind"][:]
        np.testing.assert_array_equal(labels, NEW.labelling()[1]["labels/kind"])
        if location.suffix == ".h5":
            known["group"].close()


def test_before_the_labelling_speaks_of_them_nobody_sees_new_slots(anywhere):
    extract(anywhere, OLD)
    before = inspect(anywhere)
    with Writer.resume(anywhere) as writer:
        added = writer.extend(NEW.slot_tables)
        assert added == range(6, 13)
        assert writer.pending == [range(6, 8), range(8, 10), range(10, 12), range(12, 13)]
        now = inspect(anywhere)
        assert (now.rows, now.complete, now.slots_pending) == (6, True, 7)
        assert (now.content, now.labelling) == (before.content, before.labelling)
        fill(writer, NEW, added.start)
        now = inspect(anywhere)
        assert (now.slots, now.slots_pending, now.content) == (13, 0, before.content)
    assert_alike(anywhere, extract(beside(anywhere, "fresh"), OLD))


def test_rows_of_slots_that_are_not_filled_are_incomplete(anywhere):
    extract(anywhere, OLD)
    labelling, tables = NEW.labelling()
    with Writer.resume(anywhere) as writer:
        added = writer.extend(NEW.slot_tables)
        writer.label(labelling, {**tables, "slots": np.array(added)}, NEW.digest())
    with pytest.raises(CacheIncomplete, match="0 of 7 rows are done"):
        Reader(anywhere)
    with Writer.resume(anywhere) as writer:
        assert writer.slots_done == 6
        writer.write(8, NEW.at([2, 3]).features)
    with Reader(anywhere, allow_incomplete=True) as reader:
        assert (reader.rows_done, reader.slots_pending) == (2, 5)
        np.testing.assert_array_equal(reader.read([2, 3]), features_of(NEW, "tokens")[2:4])
        with pytest.raises(CacheIncomplete, match="rows 0 to 1 are not done yet"):
            reader.read([0])


def test_an_update_is_resumed_by_workers(anywhere):
    extract(anywhere, OLD)
    with Writer.resume(anywhere) as writer:
        writer.extend(NEW.slot_tables)
    writers = [Writer.resume(anywhere, worker=worker, workers=2) for worker in range(2)]
    assert [writer.pending for writer in writers] == [
        [range(8, 10), range(12, 13)],
        [range(6, 8), range(10, 12)],
    ]
    for writer in writers:
        fill(writer, NEW, 6)
    for writer in writers:
        writer.close()
    labelling, tables = NEW.labelling()
    with Writer.resume(anywhere) as writer:
        slots = {"slots": np.arange(6, 13)}
        writer.label(labelling, {**tables, **slots}, NEW.digest())
    assert_alike(anywhere, extract(beside(anywhere, "fresh"), NEW))


def test_slots_of_an_update_are_written_in_their_own_shards(anywhere):
    """A part begins with a new shard, wherever the one before it ends."""
    extract(anywhere, OLD, slots_per_shard=4)  # slots 0 to 3, 4 and 5; then 6 to 9, 10 to 12
    with Writer.resume(anywhere) as writer:
        writer.extend(NEW.slot_tables)
        with pytest.raises(ValueError, match=r"reach past their shard, which is slots 6 to 9"):
            writer.write(8, NEW.at([2, 3, 4]).features)
        for wrong in (4, 5, -1, 13):
            with pytest.raises(ValueError, match="not in a pending shard"):
                writer.write(wrong, NEW.at([0]).features)
        for slots in ((10, 13), (7, 10), (6, 7)):
            writer.write(slots[0], NEW.at(range(slots[0] - 6, slots[1] - 6)).features)
        assert writer.pending == []
    with Reader(anywhere) as reader:
        assert reader.manifest.shards == 4


def test_an_update_must_say_of_its_slots_what_the_cache_says_of_others(anywhere):
    extract(anywhere, OLD)
    before = objects(anywhere)
    tables = NEW.slot_tables
    with Writer.resume(anywhere) as writer:
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
    assert objects(anywhere) == before


def test_an_update_that_does_not_fit_on_the_disk_is_refused(location, monkeypatch):
    extract(location, OLD)
    before = objects(location)
    with Writer.resume(location) as writer:
        monkeypatch.setattr(files, "free_bytes", lambda path: 100)
        with pytest.raises(NoSpace, match="are still to be written and 100 are free"):
            writer.extend(NEW.slot_tables)
    assert objects(location) == before


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
    assert_alike(location, extract(beside(location, "fresh"), OLD, seed=1))


def test_inputs_that_are_alike_share_features(anywhere):
    extract(anywhere, OLD)
    copies = Inputs.of("a", "copy of b=b", "b", "another copy=b", "z", "copy of z=z")
    found = update(anywhere, copies)
    assert found.slots.tolist()[:4] == [0, 1, 1, 1]
    assert_alike(anywhere, extract(beside(anywhere, "fresh"), copies))
    with Reader(anywhere) as reader:
        assert reader.keys == list(copies.keys)


# ---- which inputs a cache knows ------------------------------------------------------------------


def test_match_names_what_is_new_changed_and_gone(anywhere):
    extract(anywhere, OLD)
    with Reader(anywhere) as reader:
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


def test_match_needs_digests(anywhere, sample):
    del sample.tables["source_sha256"]
    sample.write(anywhere)
    with Reader(anywhere) as reader, pytest.raises(NameMissing, match="source_sha256"):
        match(reader, ["a"], np.zeros((1, 32), np.uint8))


# ---- meanwhile -----------------------------------------------------------------------------------


def test_opening_while_the_labelling_is_replaced_again_and_again(anywhere):
    extract(anywhere, OLD)
    digests = {OLD.digest(seed=seed): seed for seed in (0, 1)}
    stop, wrong = threading.Event(), []

    def replace() -> None:
        seed = 0
        with Reader(anywhere) as reader:
            places = reader.place_tables
        with Writer.resume(anywhere) as writer:
            while not stop.is_set():
                seed = 1 - seed
                labelling, tables = OLD.labelling(seed=seed)
                writer.label(labelling, {**tables, **places}, OLD.digest(seed=seed))

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(60):
            with Reader(anywhere) as reader:
                if reader.labelling_digest not in digests:
                    wrong.append(reader.labelling_digest)
    finally:
        stop.set()
        thread.join()
    assert not wrong
    assert verify(anywhere).ok


def test_reading_labels_while_they_are_replaced_once(anywhere):
    """Those that a reader has opened stay until the change after the next."""
    extract(anywhere, OLD)
    tables = [OLD.labelling(seed=seed)[1] for seed in (0, 1)]
    for seed in [1, 0] * 8:
        thread = threading.Thread(target=label, args=(anywhere, OLD), kwargs={"seed": seed})
        thread.start()
        with Reader(anywhere) as reader:
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


def test_content_and_labelling_by_the_book(anywhere):
    """Recomputed from raw bytes, as docs/format.md defines them."""
    import hashlib

    extract(anywhere, OLD)
    update(anywhere, NEW)
    manifest = manifest_of(NEW).to_dict()
    described = {name: manifest[name] for name in ("storage", "views", "stacks")}
    described |= {"rows": 7, "skipped": [4], "keys": list(NEW.keys)}
    text = json.dumps(described, sort_keys=True, separators=(",", ":"))
    import xxhash

    rows = [
        xxhash.xxh3_128_hexdigest(np.ascontiguousarray(features_of(NEW, stack.name)[row]).tobytes())
        for stack in STACKS
        for row in range(7)
    ]
    content = hashlib.sha256((text + "".join(rows)).encode()).hexdigest()
    assert inspect(anywhere).content == content
    labelling, tables = NEW.labelling()
    described = {
        n: labelling.to_dict()[n] for n in ("rows", "targets", "splits", "groups", "folds")
    }
    described["keys"] = list(NEW.keys)
    total = hashlib.sha256(json.dumps(described, sort_keys=True, separators=(",", ":")).encode())
    total.update(NEW.digests.tobytes())
    for name in sorted(tables):
        total.update(tables[name].tobytes())
    assert inspect(anywhere).labelling == total.hexdigest()


def test_a_labelling_without_anything(anywhere):
    extract(anywhere, OLD)
    labelling = Labelling(rows=6)
    digest = labelling.digest(OLD.keys, OLD.digests, {})
    with Writer.resume(anywhere) as writer:
        writer.label(labelling, {}, digest)
        writer.label(labelling, {}, digest)
    with Reader(anywhere) as reader:
        assert reader.labelling_digest == digest
        np.testing.assert_array_equal(reader.slots, range(6))
    label(anywhere, OLD, seed=2)
    assert_alike(anywhere, extract(beside(anywhere, "fresh"), OLD, seed=2))
    assert math.prod(Reader(anywhere).manifest.parts) == 6
    assert encode_keys(OLD.keys).tobytes() == Reader(anywhere).table("keys").tobytes()
