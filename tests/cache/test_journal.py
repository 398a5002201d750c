"""A change of an HDF5 file: however much of it has reached the disk, it counts as not begun or as
done. Torn states are made by hand here; `kill_every_step.py` kills, too."""

import io
import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from cache_inputs import Inputs, extract, label, update
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache import CacheDamaged, Reader, Writer, files, inspect, verify
from cache.containers.overlay import Overlay
from cache.stores import journal
from cache.stores.store import Change

BLOCK = 512
OLD = Inputs.of("a", "b", "broken1")
NEW = Inputs.of("c", "b", "a=A")


class Stopped(Exception):
    """Where a process was killed."""


@pytest.fixture(scope="module", params=["label", "extend and label"])
def change(request, tmp_path_factory):
    """Of one change: a file before it, with the journal there; the bytes after it; and what it is
    then. With `extend`, of the change that makes room for new slots."""
    folder = tmp_path_factory.mktemp("torn")
    location = extract(folder / "a.h5", OLD)
    before = shutil.copy(location, folder / "before.h5")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(os, "fsync", lambda fd: None)

    def stop(path: Path, change: Change) -> None:
        shutil.copy(path, folder / "decided.h5")
        shutil.copy(journal.journal_path(path), folder / "redo")
        real(path, change)
        raise Stopped

    real = journal.finish
    monkeypatch.setattr(journal, "finish", stop)
    with pytest.raises(Stopped):
        label(location, OLD, seed=1) if request.param == "label" else update(location, NEW)
    monkeypatch.undo()
    return before, folder / "decided.h5", folder / "redo", location.read_bytes()


def put(location: Path, data: bytes, redo: Path) -> None:
    """Make a torn file that its journal belongs to."""
    location.write_bytes(data)
    there = journal.journal_path(location)
    magic, text, rest = redo.read_bytes().split(b"\n", 2)
    head = json.loads(text)
    head["file"] = location.stat().st_ino
    head["check"] = journal._check(head, rest)
    text = json.dumps(head).encode()
    there.write_bytes(b"\n".join([magic, text, rest]))


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_torn_file_with_its_journal_is_the_changed_one(change, tmp_path, data):
    _, decided, redo, after = change
    torn = bytearray(decided.read_bytes().ljust(len(after), b"\0"))
    size = data.draw(st.integers(len(decided.read_bytes()), len(after)) | st.just(len(after)))
    blocks = range(-(-len(after) // BLOCK))
    for block in data.draw(st.sets(st.sampled_from(blocks)) | st.just(set(blocks))):
        torn[block * BLOCK : (block + 1) * BLOCK] = after[block * BLOCK : (block + 1) * BLOCK]
    location = tmp_path / "a.h5"
    put(location, bytes(torn[:size]), redo)
    for _ in range(2):  # a reader, and a second one
        assert verify(location).ok
        assert inspect(location).labelling in (OLD.digest(), OLD.digest(seed=1))
        with Reader(location) as reader:
            np.testing.assert_array_equal(reader.read([1]), OLD.features["tokens"][[1], 0])
    with Writer.resume(location):
        assert not journal.journal_path(location).exists()
    assert location.read_bytes() == after


def test_without_a_journal_nothing_was_decided(change, tmp_path):
    """What was written behind the end belongs to nobody."""
    before, decided, _, _ = change
    location = tmp_path / "a.h5"
    shutil.copy(decided, location)
    assert decided.read_bytes()[: before.stat().st_size] == before.read_bytes()
    assert inspect(location).labelling == OLD.digest() and verify(location).ok
    update(location, NEW)
    other = shutil.copy(before, tmp_path / "b.h5")
    update(other, NEW)
    assert inspect(location).content == inspect(other).content
    assert location.stat().st_size == other.stat().st_size
    assert verify(location).ok


def test_garbage_behind_the_end_is_no_ledger(location, tmp_path):
    location = extract(tmp_path / "a.h5", OLD)
    with location.open("ab") as file:
        file.write(b"\x5a" * 100_000)
    assert verify(location).ok
    with Writer.resume(location) as writer:
        writer.extend(NEW.slot_tables)
    container = Reader(location).container
    assert not any(container.record(container.manifest.shards - 1))
    assert inspect(location).slots_pending == 3


def test_a_journal_of_another_file_is_refused(change, tmp_path):
    before, _, redo, _ = change
    location = tmp_path / "a.h5"
    put(location, before.read_bytes(), redo)
    other = tmp_path / "b.h5"
    other.write_bytes(location.read_bytes())
    location.unlink()
    other.rename(location)
    kept = location.read_bytes()
    for act in (Reader, inspect, Writer.resume):
        with pytest.raises(
            CacheDamaged, match=r"\.a\.h5\.redo belongs to another file than .*a\.h5"
        ):
            act(location)
    assert not verify(location).ok
    assert location.read_bytes() == kept
    journal.journal_path(location).unlink()
    assert verify(location).ok


def test_a_damaged_journal_is_refused(change, tmp_path):
    before, _, redo, _ = change
    location = tmp_path / "a.h5"
    put(location, before.read_bytes(), redo)
    there = journal.journal_path(location)
    whole = there.read_bytes()
    for data in (b"", whole[:-1], whole[:40], whole.replace(b"redo 1", b"redo 2"), b"\n\n\n"):
        there.write_bytes(data)
        with pytest.raises(CacheDamaged, match=r"\.a\.h5\.redo is damaged.*delete it if `verify`"):
            Reader(location)


def test_who_may_not_write_reads_a_change_that_was_interrupted(change, tmp_path, monkeypatch):
    _, decided, redo, _ = change
    location = tmp_path / "a.h5"
    put(location, decided.read_bytes(), redo)
    real = os.open

    def only_read(path: object, flags: int, *arguments: int, **named: int) -> int:
        if flags & os.O_ACCMODE:
            raise PermissionError(13, "no")
        return real(path, flags, *arguments, **named)

    monkeypatch.setattr(os, "open", only_read)
    assert Reader(location).keys and verify(location).ok
    assert journal.journal_path(location).exists()


def test_a_new_cache_has_nothing_to_do_with_an_old_journal(change, tmp_path):
    """The old one was deleted by hand, and the new one may even get its inode."""
    before, _, redo, _ = change
    location = tmp_path / "a.h5"
    put(location, before.read_bytes(), redo)
    location.unlink()
    extract(location, NEW)
    assert verify(location).ok and inspect(location).rows == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]


def test_overwriting_takes_the_journal_away(change, tmp_path, sample):
    before, _, redo, _ = change
    location = tmp_path / "a.h5"
    put(location, before.read_bytes(), redo)
    sample.write(location, overwrite=True)
    assert verify(location).ok and inspect(location).rows == 10
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]


def test_without_locks_it_is_the_same(change, tmp_path, monkeypatch):
    monkeypatch.setattr("cache.files.try_lock", lambda fd, **_: None)
    _, decided, redo, after = change
    location = tmp_path / "a.h5"
    put(location, decided.read_bytes(), redo)
    Reader(location)
    with Writer.resume(location):
        assert location.read_bytes() == after
    label(location, OLD, seed=4)
    assert inspect(location).labelling == OLD.digest(seed=4)


def test_numbers_never_move(tmp_path):
    """Where a reader has a file open, it goes on with what it knows."""
    location = extract(tmp_path / "a.h5", OLD)
    places = []
    for seed in range(1, 6):
        container = Reader(location).container
        places.append([container.slots("tokens", 0).offsets.tolist(), container.record_place(0)])
        label(location, OLD, seed=seed)
    assert all(place == places[0] for place in places)


def test_the_library_never_opens_the_file(tmp_path, monkeypatch):
    real = h5py.File

    def watched(file: object, *arguments: object, **named: object) -> h5py.File:
        assert isinstance(file, Overlay)
        return real(file, *arguments, **named)

    monkeypatch.setattr(h5py, "File", watched)
    location = extract(tmp_path / "a.h5", OLD)
    update(location, NEW)
    assert verify(location).ok


@given(
    st.lists(
        st.tuples(st.integers(0, 60), st.binary(max_size=20)) | st.integers(0, 80), max_size=12
    ),
    st.binary(max_size=50),
)
def test_an_overlay_is_a_file(steps, below):
    """Beside a real one in memory."""
    overlay = Overlay(lambda offset, length: below[offset : offset + length], len(below))
    real = io.BytesIO(below)
    for step in steps:
        for file in (overlay, real):
            if isinstance(step, tuple):
                file.seek(step[0])
                file.write(step[1])
    size = len(real.getvalue())
    assert overlay.seek(0, os.SEEK_END) == overlay.size == size
    for step in steps:
        start = step[0] if isinstance(step, tuple) else step
        overlay.seek(start)
        piece = bytearray(7)
        overlay.readinto(piece)
        assert bytes(piece) == real.getvalue()[start : start + 7].ljust(7, b"\0")
        assert overlay.tell() == start + 7
    assert overlay.unchanged()


def test_an_overlay_notices_that_the_file_changes():
    data = bytearray(b"abcdef")
    overlay = Overlay(lambda offset, length: bytes(data[offset : offset + length]), 6)
    overlay.seek(2)
    overlay.readinto(bytearray(2))
    data[5] = 0
    assert overlay.unchanged()
    data[3] = 0
    assert not overlay.unchanged()


def test_readers_pass_over_a_change_that_goes_on(tmp_path, monkeypatch):
    """The writer stops in the middle; a reader finds the change made, and does not wait for it."""
    location = extract(tmp_path / "a.h5", OLD)
    seen, real = [], files.write_all

    def write_all(fd: int, data: memoryview, offset: int) -> None:
        real(fd, data, offset)
        monkeypatch.setattr(files, "write_all", real)
        if journal.journal_path(location).exists():
            seen.append(inspect(location).labelling)
        monkeypatch.setattr(files, "write_all", write_all)

    monkeypatch.setattr(files, "write_all", write_all)
    label(location, OLD, seed=1)
    assert len(seen) > 5 and set(seen) == {OLD.digest(seed=1)}
