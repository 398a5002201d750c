"""What every store must do, and in what order the posix one brings it to the disk."""

import ast
import dataclasses
import errno
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cache_inputs import Inputs, extract, fill, manifest_of
from disk_recorder import Disk
from memory_store import MemoryStore

from cache import CacheNotFound, LocationError, Reader, Writer, files, inspect, verify
from cache.location import STORES, Location
from cache.stores import journal
from cache.stores.posix import PosixStore
from cache.stores.store import Change, InPlace, Store

NAME = "x.zarr/a/b"
OLD, NEW = Inputs.of("a", "b", "c"), Inputs.of("d", "b", "a=A")


@pytest.fixture(params=["posix", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "posix":
        return PosixStore(tmp_path / "root")
    return MemoryStore(f"memory://{tmp_path.name}-{request.node.name}")


def begin(store: Store, data: bytes, name: str = NAME) -> object:
    draft = store.begin(name, len(data), waiting="x.zarr/a")
    draft.write(memoryview(data), 0)
    return draft


def test_reads_ranges(store):
    store.write_new({NAME: b"0123456789", "x.zarr/empty": memoryview(b"")})
    assert store.read(NAME) == b"0123456789"
    assert store.read(NAME, 3) == b"3456789"
    assert store.read(NAME, 3, 4) == b"3456"
    assert store.read(NAME, 8, 9) == b"89"
    assert store.read(NAME, 20, 9) == b""
    assert store.read("x.zarr/empty") == b""
    assert (store.size(NAME), store.size("x.zarr/empty")) == (10, 0)


def test_reads_runs_into_the_callers_memory(store):
    store.write_new({NAME: bytes(range(100))})
    memory = memoryview(bytearray(40))
    runs = [
        (50, [memory[:5], memory[5:10]]),
        (0, [memory[10:13]]),
        (95, [memory[20:23], memory[23:30]]),
        (200, [memory[30:35]]),
    ]
    assert store.read_runs(NAME, runs) == [10, 3, 5, 0]
    assert bytes(memory[:13]) == bytes([*range(50, 60), 0, 1, 2])
    assert bytes(memory[20:25]) == bytes(range(95, 100))
    assert not any(memory[25:])
    assert store.read_runs(NAME, []) == []
    store.close()
    assert store.read_runs(NAME, [(99, [memory[:1]])]) == [1]


def test_what_is_missing_is_a_file_not_found(store):
    for act in (
        lambda: store.read(NAME),
        lambda: store.size(NAME),
        lambda: store.read_runs(NAME, [(0, [memoryview(bytearray(1))])]),
    ):
        with pytest.raises(FileNotFoundError):
            act()
    assert not store.exists(NAME) and not store.exists("x.zarr")
    assert store.names("x.zarr") == []
    store.delete(NAME)
    store.delete_below("x.zarr")
    store.sweep("x.zarr")


def test_names_are_those_directly_below(store):
    store.write_new({"x.zarr/zarr.json": b"1", "x.zarr/a/b/c": b"2", "x.zarr/a/d": b"3"})
    assert store.names("x.zarr") == store.names("x.zarr/") == ["a/", "zarr.json"]
    assert store.names("x.zarr/a") == ["b/", "d"]
    assert store.exists("x.zarr/a/b") and store.exists("x.zarr/a/d")
    assert not store.exists("x.zarr/a/e")
    store.delete("x.zarr/a/d")
    store.delete_below("x.zarr/a/b")
    assert not store.exists("x.zarr/a/b/c") and not store.exists("x.zarr/a/d")
    assert store.exists("x.zarr/zarr.json")


def test_publishes_only_what_is_new(store):
    assert store.publish_new(NAME, b"first") is True
    assert store.publish_new(NAME, b"second") is False
    assert store.read(NAME) == b"first"
    assert store.names("x.zarr/a") == ["b"]


def test_replaces_in_one_step(store):
    store.replace(NAME, b"first", waiting="x.zarr/a")
    store.replace(NAME, memoryview(b"second"), waiting="x.zarr/a")
    assert store.read(NAME) == b"second"
    wrong, stop = [], threading.Event()

    def look() -> None:
        while not stop.is_set():
            if store.read(NAME) not in (b"second", *(bytes([n]) * n for n in range(1, 100))):
                wrong.append(store.read(NAME))

    thread = threading.Thread(target=look)
    thread.start()
    for n in range(1, 100):
        store.replace(NAME, bytes([n]) * n, waiting="x.zarr/a")
    stop.set()
    thread.join()
    assert not wrong


def test_a_draft_is_seen_when_it_is_published(store):
    draft = store.begin(NAME, 6, waiting="x.zarr/a")
    draft.write(memoryview(b"def"), 3)
    assert not store.exists(NAME)
    draft.write(memoryview(b"abc"), 0)
    assert draft.publish() is True
    assert store.read(NAME) == b"abcdef"
    draft.discard()
    assert store.read(NAME) == b"abcdef"
    store.sweep("x.zarr/a")
    assert store.names("x.zarr/a") == ["b"]


def test_of_two_drafts_the_first_stays_unless_it_is_written_over(store):
    one, other, third = (begin(store, data) for data in (b"one", b"other", b"third"))
    assert one.publish() is True
    assert other.publish() is False
    assert store.read(NAME) == b"one"
    other.discard()
    assert third.publish() is False
    third.overwrite()
    assert store.read(NAME) == b"third"
    for draft in (one, third):
        draft.discard()
    begin(store, b"given up", "x.zarr/a/c").discard()
    store.sweep("x.zarr/a")
    assert store.names("x.zarr/a") == ["b"]


def test_threads_write_one_draft(store):
    draft = store.begin(NAME, 64_000, waiting="x.zarr/a")
    pieces = [memoryview(bytes([n]) * 1000) for n in range(64)]
    threads = [
        threading.Thread(target=draft.write, args=(piece, n * 1000))
        for n, piece in enumerate(pieces)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert draft.publish()
    draft.discard()
    assert store.read(NAME) == b"".join(pieces)


def test_writes_over_bytes_that_are_there(store):
    store.write_new({NAME: b"0123456789"})
    store.write_over(NAME, [(2, b"ab"), (9, b"z")])
    assert store.read(NAME) == b"01ab45678z"
    with pytest.raises(FileNotFoundError):
        store.write_over("x.zarr/none", [(0, b"a")])


def test_a_cache_comes_and_goes_as_a_whole(store):
    root = "x.zarr/zarr.json"
    seen = []

    def build(name: str) -> None:
        store.write_new({f"{name}/a/b": b"1"})
        seen.append(store.taken("x.zarr", root))
        if not store.publish_new(f"{name}/zarr.json", b"2"):
            raise FileExistsError

    assert not store.taken("x.zarr", root)
    store.create("x.zarr", build, shared=False).release()
    assert (seen, store.taken("x.zarr", root)) == ([False], True)
    assert store.names("x.zarr") == ["a/", "zarr.json"]
    with pytest.raises(FileExistsError):
        store.create("x.zarr", build, shared=True)
    assert store.used_bytes("x.zarr") >= 2
    store.remove("x.zarr")
    assert not store.taken("x.zarr", root) and not store.exists("x.zarr")
    assert store.names("") in ([], [""])


def test_a_creation_that_was_killed_is_no_cache(store):
    def build(name: str) -> None:
        store.write_new({f"{name}/a": b"1"})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.create("x.zarr", build, shared=False)
    assert not store.taken("x.zarr", "x.zarr/zarr.json")


def test_what_is_new_is_not_written_over_what_another_creation_makes(store):
    if isinstance(store, InPlace):
        return  # it makes each under a name of its own
    store.write_new({NAME: b"one"})
    store.write_new({NAME: b"one"})
    with pytest.raises(FileExistsError):
        store.write_new({NAME: b"other"})


def test_pickles(store):
    store.write_new({NAME: b"abc"})
    memory = memoryview(bytearray(3))
    store.read_runs(NAME, [(0, [memory])])
    again = pickle.loads(pickle.dumps(store))
    assert (again.read(NAME), again.where(NAME)) == (b"abc", store.where(NAME))
    assert again.read_runs(NAME, [(1, [memory[:2]])]) == [2]
    assert again.where(NAME).endswith("/x.zarr/a/b")


def test_free_bytes(store):
    assert store.free_bytes() > 0


def test_locks(tmp_path):
    """Where there are any. They end with the object that holds them."""
    store, other = PosixStore(tmp_path), PosixStore(tmp_path)
    (tmp_path / "x.zarr").mkdir()
    (tmp_path / "x.h5").write_bytes(b"")
    for name in ("x.zarr", "x.h5"):
        shared = [store.lock(name, shared=True), other.lock(name, shared=True)]
        with pytest.raises(BlockingIOError):
            other.lock(name)
        for lock in shared:
            lock.release()
        lock = other.lock(name)
        for options in ({}, {"shared": True}):
            with pytest.raises(BlockingIOError):
                store.lock(name, **options)
        lock.release()
        store.lock(name).release()


def test_a_creation_is_locked_when_it_appears(store, tmp_path):
    if not isinstance(store, PosixStore):
        return
    lock = store.create("x.zarr", lambda name: store.write_new({f"{name}/a": b""}), shared=False)
    with pytest.raises(BlockingIOError):
        store.lock("x.zarr")
    lock.release()
    store.lock("x.zarr").release()


# ---- in place ------------------------------------------------------------------------------------


def test_a_room_is_a_part_of_a_file(tmp_path):
    store = PosixStore(tmp_path)
    room = store.room("x.h5", new=True)
    room.write(memoryview(b"abc"), 2)
    room.resize(8)
    assert room.publish() is True
    room.discard()
    assert store.read("x.h5") == b"\0\0abc\0\0\0"
    room = store.room("x.h5", 4)
    room.write(memoryview(b"XY"), 1)
    room.publish()
    room.discard()
    assert store.read("x.h5") == b"\0\0abcXY\0"


def test_a_change_is_made_or_pending(tmp_path, monkeypatch):
    store = PosixStore(tmp_path)
    store.write_new({"x.h5": b"0123456789"})
    change = Change(size=6, writes=((0, b"abc"), (2, b"C"), (5, b"")))
    store.change("x.h5", change)
    assert (store.read("x.h5"), store.pending("x.h5")) == (b"abC345", None)
    monkeypatch.setattr(journal, "finish", lambda path, change: None)  # killed
    other = Change(size=8, writes=((6, b"gh"),))
    store.change("x.h5", other)
    monkeypatch.undo()
    assert (store.read("x.h5"), store.pending("x.h5")) == (b"abC345", other)
    store.settle("x.h5")
    assert (store.read("x.h5"), store.pending("x.h5")) == (b"abC345gh", None)
    store.settle("x.h5")
    assert store.names("") == ["x.h5"]


# ---- the order of durability ---------------------------------------------------------------------


@pytest.fixture
def posix(tmp_path: Path, disk: Disk) -> Iterator[PosixStore]:
    """A store whose every call ends with nothing at risk."""
    store = PosixStore(tmp_path)
    store.write_new({"x.zarr/there": b"1", "x.h5": b"0123456789"})
    disk.names.discard(tmp_path / "x.h5")  # `create` makes such names
    assert disk.at_risk() == ["x.zarr"]  # and those of folders
    disk.names.clear()
    yield store
    assert disk.at_risk() == []


def test_new_objects_are_durable(posix, disk):
    posix.write_new({"x.zarr/a/b/c": b"1", "x.zarr/a/d": b"2"})
    assert disk.at_risk() == []
    assert posix.publish_new("x.zarr/e/f", b"3")
    assert disk.at_risk() == []


def test_a_replacement_is_durable_before_it_has_the_name(posix, disk, tmp_path):
    disk.decisions[tmp_path / "x.zarr/there"] = 0
    posix.replace("x.zarr/there", b"two", waiting="x.zarr")
    assert disk.decisions == {tmp_path / "x.zarr/there": 1}
    posix.replace(NAME, b"one", waiting="x.zarr")  # in a folder that it makes


def test_a_draft_is_durable_before_it_has_the_name(posix, disk):
    draft = begin(posix, b"abc")
    assert draft.publish()
    assert disk.at_risk() == []
    other = begin(posix, b"abcd")
    assert not other.publish()
    other.overwrite()
    assert disk.at_risk() == []
    for each in (draft, other):
        each.discard()


def test_what_is_written_over_and_deleted_is_durable(posix, disk):
    posix.write_over("x.zarr/there", [(0, b"2")])
    assert disk.at_risk() == []
    posix.delete("x.zarr/there")
    assert disk.at_risk() == []


def test_a_room_is_durable_when_it_is_published(posix, disk):
    room = posix.room("x.h5", 3)
    room.write(memoryview(b"abc"), 0)
    assert disk.at_risk() == ["x.h5"]
    room.publish()
    room.discard()
    assert disk.at_risk() == []


def test_a_change_is_durable_in_the_journal_before_it_is_made(posix, disk, tmp_path):
    log = journal.journal_path(tmp_path / "x.h5")
    disk.decisions[log], disk.journaled[tmp_path / "x.h5"] = 0, (log, 10)
    posix.change("x.h5", Change(size=12, writes=((0, b"abc"), (10, b"kl"))))
    assert disk.decisions[log] == 1 and disk.at_risk() == []


def test_a_new_cache_is_durable_before_it_has_the_name(posix, disk, tmp_path):
    disk.decisions[tmp_path / "y.zarr"] = 0
    store = PosixStore(tmp_path / "new" / "folders")
    lock = store.create("y.zarr", lambda n: store.write_new({f"{n}/a/b": b"1"}), shared=False)
    lock.release()
    assert disk.at_risk() == []


@pytest.mark.parametrize("forgotten", ["the bytes", "the names"])
@pytest.mark.parametrize("act", ["replace", "draft", "change", "create"])
def test_the_recorder_finds_what_is_forgotten(tmp_path, disk, monkeypatch, forgotten, act):
    store = PosixStore(tmp_path)
    store.write_new({"x.zarr/there": b"1", "x.h5": b"0123456789"})
    disk.names.clear()
    if forgotten == "the bytes":
        monkeypatch.setattr(os, "fsync", lambda fd: None)
    else:
        monkeypatch.setattr(files, "sync_folder", lambda folder: None)
    log = journal.journal_path(tmp_path / "x.h5")
    disk.journaled[tmp_path / "x.h5"] = (log, 10)
    with pytest.raises(AssertionError):
        match act:
            case "replace":
                store.replace(NAME, b"one", waiting="x.zarr")
            case "draft":
                begin(store, b"one").publish()
            case "change":
                store.change("x.h5", Change(size=10, writes=((0, b"abc"),)))
            case _:
                store.create("y.zarr", lambda n: store.write_new({f"{n}/a": b"1"}), shared=False)
        assert disk.at_risk() == []


def test_a_failing_disk_is_not_taken_for_a_missing_object(tmp_path, monkeypatch):
    store = PosixStore(tmp_path)
    store.write_new({NAME: b"abc"})

    def preadv(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(OSError, match="Input/output"):
        store.read(NAME)
    with pytest.raises(OSError, match="Input/output"):
        store.read_runs(NAME, [(0, [memoryview(bytearray(1))])])


# ---- a cache in an object store ------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(STORES, "memory", MemoryStore)
    return f"memory://{tmp_path.name}"


def test_hdf5_needs_a_store_that_writes_in_place(bucket):
    with pytest.raises(LocationError, match=r"a\.h5: HDF5 writes in the middle.*ending in \.zarr"):
        extract(f"{bucket}/a.h5", OLD)
    assert not MemoryStore(bucket).objects


def test_a_creation_that_was_killed_is_gone_on_with(bucket, monkeypatch):
    """By the same job; another one is told."""
    location = f"{bucket}/a.zarr"

    def killed(self: MemoryStore, name: str, data: bytes) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(MemoryStore, "publish_new", killed)
    with pytest.raises(KeyboardInterrupt):
        extract(location, OLD)
    monkeypatch.undo()
    monkeypatch.setitem(STORES, "memory", MemoryStore)
    with pytest.raises(CacheNotFound, match=r"memory://.*/a\.zarr: there is no cache here"):
        Reader(location)
    with pytest.raises(LocationError, match="holds what the creation of another cache has left"):
        extract(location, NEW)
    extract(location, OLD)
    assert verify(location).ok and inspect(location).complete


def test_of_two_creations_the_first_stays(bucket, monkeypatch):
    location = f"{bucket}/a.zarr"
    extract(location, OLD, slots_per_shard=2)
    before = dict(MemoryStore(bucket).objects)
    monkeypatch.setattr(Location, "is_there", lambda self: False)  # it looked too early
    extract(location, OLD, slots_per_shard=3)
    assert MemoryStore(bucket).objects == before


def test_overwriting_deletes_the_root_first(bucket, monkeypatch):
    location = f"{bucket}/a.zarr"
    extract(location, OLD)
    deleted: list[str] = []
    real = MemoryStore._delete

    def delete(self: MemoryStore, name: str) -> None:
        deleted.append(name)
        real(self, name)

    monkeypatch.setattr(MemoryStore, "_delete", delete)
    other = manifest_of(NEW)
    labelling, tables = NEW.labelling()
    manifest = dataclasses.replace(other, identity={"b": 2})
    tables = {**tables, **NEW.slot_tables}
    with Writer(location, manifest, labelling, tables, overwrite=True) as writer:
        fill(writer, NEW)
    assert deleted[0] == "a.zarr/zarr.json"
    assert verify(location).ok and inspect(location).rows == 3


def test_reading_asks_for_no_more_than_the_rows(bucket):
    """A run of neighbours is one range."""
    location = f"{bucket}/a.zarr"
    extract(location, OLD, slots_per_shard=3)
    with Reader(location) as reader:
        reader.read([0])
        calls = reader.container.store.calls
        del calls[:]
        reader.read([2, 1, 0])
        assert calls == [("get", "a.zarr/stacks/tokens/c/0/0/0/0/0")]


# ---- nobody else touches files -------------------------------------------------------------------


def test_only_stores_know_files():
    """`location` makes a path of what the user says; all others have names alone."""
    root = Path(__file__).parents[2] / "cache"
    plain = {"os", "pathlib", "shutil", "fcntl", "tempfile", "glob", "cache.files"}
    found = {}
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        if imported & plain:
            found[name] = imported & plain
    assert found.pop("location.py") == {"os", "pathlib"}
    assert set(found) == {"files.py", "stores/posix.py", "stores/journal.py"}
