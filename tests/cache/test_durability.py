"""In which order bytes and names reach the disk. A kill shows nothing of it, only a power cut does,
so every call that changes the disk, and every `fsync`, is recorded while the real code runs.

A file is at risk from its last write to its `fsync`, a name from its making to that of its folder.
When a file gets its name nothing of it is at risk; when a ledger record appears nothing at all is;
nor when a change of the document is decided, by the name of Zarr's root or of HDF5's journal.
Before HDF5's journal is safe nothing that was there is written over, and it stays until that is
done. When a writer has gone nothing is at risk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cache_inputs import STACKS, Inputs, extract, fill, label

from cache import Writer, verify
from cache.location import open_container
from cache.stores import journal
from cache.stores.store import Change

LINKS = ("rename", "replace", "link")


class Disk:
    """What a power cut could take, by path."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bytes: set[Path] = set()  # files with bytes that are not on the disk
        self.names: set[Path] = set()  # files and folders whose names are not
        self.synced: set[Path] = set()
        self.records = 0
        self.vouched: dict[tuple[Path, int], list[Path]] = {}  # by each record's place: files
        self.decisions: dict[Path, int] = {}  # by the name that makes one: how often it did
        self.journaled: dict[Path, tuple[Path, int]] = {}  # file: its journal, and its old end

    def at_risk(self) -> list[str]:
        """Unfinished files left out: nobody misses them."""
        there = {path for path in self.bytes | self.names if path.exists()}
        gone = {path for path in self.names if not path.exists() and path.parent.exists()}
        return sorted(
            str(path.relative_to(self.root))
            for path in there | gone
            if not _unfinished(path) and path.is_relative_to(self.root)
        )

    def wrote(self, path: Path, offset: int) -> None:
        if (path, offset) in self.vouched:
            self.published_record(path, offset)
        log, end = self.journaled.get(path, (path, 0))
        if offset < end:
            assert log.exists() and log not in self.names, "written over before it was decided"
        self.bytes.add(path)

    def made(self, path: Path) -> None:
        self.names.add(path)

    def unlinking(self, path: Path) -> None:
        for file, (log, _) in self.journaled.items():
            assert path != log or file not in self.bytes, "the journal goes before the change is"
        self.made(path)

    def sync(self, path: Path) -> None:
        self.synced.add(path)
        self.bytes.discard(path)
        if path.is_dir():
            self.names = {name for name in self.names if name.parent != path}

    def named(self, source: Path, target: Path) -> None:
        """`source` is about to be `target`, too."""
        if source in self.synced - self.bytes:
            self.synced.add(target)
        if _unfinished(target):  # within a layout that has no name yet
            self.names.add(target)
            return
        below = [source, *source.rglob("*")] if source.is_dir() else [source]
        loose = [path for path in below if path in self.bytes or path not in self.synced]
        assert not loose, f"{target} gets its name before its bytes are on the disk: {loose}"
        if (target, 0) in self.vouched:
            self.published_record(target, 0)
        if target in self.decisions:
            assert self.at_risk() == [], "decided before what it speaks of is on the disk"
            self.decisions[target] += 1
        self.names.add(target)

    def published_record(self, record: Path, offset: int) -> None:
        """Its own folders may be new."""
        others = [path for path in self.at_risk() if self.root / path not in record.parents]
        others += [str(path) for path in self.vouched[record, offset] if not path.exists()]
        assert others == [], "a record before what it vouches for"
        self.records += 1


def path_of(fd: int) -> Path:
    return Path(f"/proc/self/fd/{fd}").readlink()


def _unfinished(path: Path) -> bool:
    names = [path.name, *(parent.name for parent in path.parents)]
    return any(name.endswith((".partial", ".creating")) for name in names)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(tmp_path)
    changes = (*LINKS, "pwrite", "ftruncate", "mkdir", "unlink", "open")
    real: dict[str, Any] = {name: getattr(os, name) for name in changes}

    def pwrite(fd: int, data: Any, offset: int) -> int:
        disk.wrote(path_of(fd), offset)
        return real["pwrite"](fd, data, offset)

    def ftruncate(fd: int, length: int) -> None:
        disk.bytes.add(path_of(fd))
        real["ftruncate"](fd, length)

    def mkdir(path: Any, *arguments: Any, **named: Any) -> None:
        real["mkdir"](path, *arguments, **named)
        disk.made(Path(path))

    def unlink(path: Any, *arguments: Any, dir_fd: int | None = None) -> None:
        real["unlink"](path, *arguments, dir_fd=dir_fd)
        disk.unlinking(Path(path) if dir_fd is None else path_of(dir_fd) / path)

    def opening(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        fd = real["open"](path, flags, *arguments, **named)
        if flags & os.O_CREAT:
            disk.made(path_of(fd))
        return fd

    def linking(name: str) -> Callable[..., None]:
        def call(source: Any, target: Any, **named: Any) -> None:
            disk.named(Path(source), Path(target))
            real[name](source, target, **named)

        return call

    for name, call in (
        ("pwrite", pwrite),
        ("ftruncate", ftruncate),
        ("mkdir", mkdir),
        ("unlink", unlink),
        ("open", opening),
        ("fsync", lambda fd: disk.sync(path_of(fd))),
        *((name, linking(name)) for name in LINKS),
    ):
        monkeypatch.setattr(os, name, call)
    yield disk


def watch_records(disk: Disk, place: Path) -> None:
    container = open_container(place)
    stacks = [stack.name for stack in container.manifest.stacks]
    for shard in range(container.manifest.shards):
        record = container.record_place(shard)
        files = [place / f"stacks/{stack}/c/{shard}/0/0/0/0" for stack in stacks]
        disk.vouched[place.parent / record.name, record.offset] = (
            files if place.suffix == ".zarr" else [place]
        )


def test_a_new_cache_is_on_the_disk_before_anything_is_written(location, sample, disk):
    place = location.parent / "new" / "folders" / location.name
    with Writer(place, sample.manifest, sample.labelling, sample.tables):
        assert disk.at_risk() == []


def test_data_their_names_then_the_record_then_its_name(location, sample, disk):
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        watch_records(disk, location)
        sample.fill(writer)
        assert disk.records == sample.manifest.shards
        assert disk.at_risk() == []
    assert disk.at_risk() == []
    assert verify(location).ok


def test_what_is_forgotten_is_forgotten_durably(location, sample, disk):
    sample.write(location)
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        writer.forget([1])
        assert disk.at_risk() == []
        watch_records(disk, location)
        sample.fill(writer)
        assert disk.records == 1 and disk.at_risk() == []


def test_a_replaced_cache_is_durable(location, sample, disk):
    sample.write(location)
    other = sample.with_manifest(identity={"other": 1})
    with Writer(location, other.manifest, other.labelling, other.tables, overwrite=True):
        assert disk.at_risk() == []


def watch_decisions(disk: Disk, place: Path) -> None:
    if place.suffix == ".zarr":
        disk.decisions[place / "zarr.json"] = 0
        return
    log = journal.journal_path(place)
    disk.decisions[log] = 0
    disk.journaled[place] = (log, place.stat().st_size)


def stop_watching_the_file(disk: Disk) -> None:
    """Shards and records may be written in their places."""
    disk.journaled.clear()


@pytest.mark.parametrize("change", ["label", "extend"])
def test_a_change_is_decided_when_all_it_speaks_of_is_on_the_disk(location, disk, change):
    old, new = Inputs.of("a", "b", "c"), Inputs.of("d", "a=A")
    extract(location, old)
    assert disk.at_risk() == []
    watch_decisions(disk, location)
    if change == "label":
        label(location, old, seed=1)
        label(location, old, seed=2)
        label(location, old, seed=3)  # deletes
    else:
        with Writer.resume(location) as writer:
            writer.extend(new.slot_tables)
            assert disk.at_risk() == []
            stop_watching_the_file(disk)
            fill(writer, new, 3)
    assert list(disk.decisions.values()) == [3 if change == "label" else 1]
    assert disk.at_risk() == []
    assert verify(location).ok


def test_records_of_an_update_come_after_what_they_vouch_for(location, disk):
    old, new = Inputs.of("a", "b", "c"), Inputs.of("d", "a=A", "e")
    extract(location, old)
    with Writer.resume(location) as writer:
        added = writer.extend(new.slot_tables)
        container = open_container(location)
        for shard in range(2, 4):
            record = container.record_place(shard)
            names = [f"updates/1/stacks/{s.name}/c/{shard - 2}/0/0/0/0" for s in STACKS]
            files = [location / name for name in names]
            disk.vouched[location.parent / record.name, record.offset] = (
                files if location.suffix == ".zarr" else [location]
            )
        fill(writer, new, added.start)
    assert disk.records == 2 and disk.at_risk() == []


def test_a_row_that_is_replaced_is_durable_before_its_record(location, sample, disk):
    sample.write(location)
    watch_records(disk, location)
    other = {name: values + values.dtype.type(1) for name, values in sample.rows(5, 6).items()}
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        assert writer.replace(5, sample.rows(5, 6)) is True
        assert disk.records == 0 and disk.at_risk() == []
        assert writer.replace(5, other) is False
        assert disk.records == 1 and disk.at_risk() == []


@pytest.mark.parametrize("forgotten", ["the bytes", "the names"])
def test_the_recorder_finds_a_hasty_decision(location, disk, monkeypatch, forgotten):
    extract(location, Inputs.of("a", "b"))
    watch_decisions(disk, location)
    if forgotten == "the bytes":
        monkeypatch.setattr(os, "fsync", lambda fd: None)
    else:
        monkeypatch.setattr("cache.files.sync_folder", lambda folder: None)
    with pytest.raises(AssertionError, match="before"):
        label(location, Inputs.of("a", "b"), seed=1)


@pytest.mark.parametrize("forgotten", ["it is written", "it stays"])
def test_the_recorder_finds_a_forgotten_journal(tmp_path, disk, monkeypatch, forgotten):
    location = extract(tmp_path / "a.h5", Inputs.of("a", "b"))
    watch_decisions(disk, location)
    real = journal.publish

    def publish(path: Path, change: Change) -> None:
        if forgotten == "it stays":
            real(path, change)
            journal.journal_path(path).unlink()

    monkeypatch.setattr(journal, "publish", publish)
    with pytest.raises(AssertionError, match="written over before"):
        label(location, Inputs.of("a", "b"), seed=1)


def test_a_shard_of_a_writer_who_was_faster_is_durable(location, sample, disk, monkeypatch):
    """The faster one was killed before its folders were on the disk, and before its record."""
    monkeypatch.setattr("cache.files.try_lock", lambda fd, **_: None)
    with (
        Writer(location, sample.manifest, sample.labelling, sample.tables) as first,
        Writer(location, sample.manifest, sample.labelling, sample.tables) as second,
    ):
        watch_records(disk, location)
        sample.fill(first, [range(4)])
        disk.names |= set(location.rglob("stacks/*/c/**/*"))
        sample.fill(second, [range(4)])
        assert disk.records == 2 and disk.at_risk() == []


@pytest.mark.parametrize("forgotten", ["the bytes", "the names", "the order"])
def test_the_recorder_finds_what_is_forgotten(location, sample, disk, monkeypatch, forgotten):
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        watch_records(disk, location)
        kind = type(writer._container)
        match forgotten:
            case "the bytes":
                monkeypatch.setattr(os, "fsync", lambda fd: None)
            case "the names" if location.suffix == ".zarr":
                monkeypatch.setattr("cache.files.sync_folder", lambda folder: None)
            case _:
                monkeypatch.setattr(kind, "seal", lambda *_: True)  # or later
        with pytest.raises(AssertionError, match="before"):
            sample.fill(writer)


def test_the_real_fsync_is_called(location, sample, monkeypatch):
    """Once a file that is written: the other tests here replace it."""
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(path_of(fd)))
    sample.write(location)
    assert len(synced) > 3 * len(sample.manifest.stacks)
