"""In which order bytes and names reach the disk. A kill shows nothing of it, only a power cut does,
so every call that changes the disk, and every `fsync`, is recorded while the real code runs.

A file is at risk from its last write to its `fsync`, a name from its making to that of its folder.
When a file gets its name nothing of it is at risk; when a ledger record appears nothing at all is;
when a writer has gone nothing is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cache import Writer, verify
from cache.location import open_container

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
        self.bytes.add(path)

    def made(self, path: Path) -> None:
        self.names.add(path)

    def sync(self, path: Path) -> None:
        self.synced.add(path)
        self.bytes.discard(path)
        if path.is_dir():
            self.names = {name for name in self.names if name.parent != path}

    def named(self, source: Path, target: Path) -> None:
        """`source` is about to be `target`, too."""
        if _unfinished(target):  # zarr, within a layout that has no name yet
            return
        below = [source, *source.rglob("*")] if source.is_dir() else [source]
        loose = [path for path in below if path in self.bytes or path not in self.synced]
        assert not loose, f"{target} gets its name before its bytes are on the disk: {loose}"
        if (target, 0) in self.vouched:
            self.published_record(target, 0)
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
    return any(name == ".partial" or name.endswith(".creating") for name in names)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(tmp_path)
    real: dict[str, Any] = {name: getattr(os, name) for name in (*LINKS, "pwrite", "ftruncate",
                                                                 "mkdir", "unlink")}  # fmt: skip

    def pwrite(fd: int, data: Any, offset: int) -> int:
        disk.wrote(path_of(fd), offset)
        return real["pwrite"](fd, data, offset)

    def ftruncate(fd: int, length: int) -> None:
        disk.bytes.add(path_of(fd))
        real["ftruncate"](fd, length)

    def mkdir(path: Any, *arguments: Any, **named: Any) -> None:
        real["mkdir"](path, *arguments, **named)
        disk.made(Path(path))

    def unlink(path: Any, *arguments: Any, **named: Any) -> None:
        real["unlink"](path, *arguments, **named)
        disk.made(Path(path))

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
        disk.vouched[record.path, record.offset] = files if place.suffix == ".zarr" else [place]


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
