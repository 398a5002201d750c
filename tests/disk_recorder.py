"""Records, while the real code runs, in which order bytes and names reach the disk.

A file is at risk from its last write to its `fsync`, a name from its making to that of its folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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


def recorded(root: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Record from now on what is written below `root`."""
    disk = Disk(root)
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
    return disk
