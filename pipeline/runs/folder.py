"""A folder that one process at a time writes, and files that a crash leaves whole.

Knows nothing of what the files say. A file is written beside its place under a name that nobody
else uses, made durable, and renamed. The lock is the kernel's and ends with the process. Where a
file system has no locks (some network mounts) nothing keeps two processes out of one folder: each
of its files is then one's or the other's, never a mixture of both.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path

from cache.files import sync_folder, sync_tree, try_lock
from pipeline.errors import RunError

LITTER_SECONDS = 600  # a partial file that nobody has touched for so long is a crash's leftover
_PARTIAL = re.compile(r"^\..*\.[0-9a-f]{32}\.partial$")


def hold(folder: Path) -> int:
    """Take the lock of a folder, which is made if need be; the descriptor that holds it.

    Raises RunError if another process has it, or if there can be no such folder.
    """
    try:
        make_folder(folder)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise RunError(
            f"{folder}: expected a folder, or a place where one can be made; came "
            f"{error.strerror!r}. Choose another --out."
        ) from error
    if try_lock(fd) is not False:
        sweep_litter(folder)
        return fd
    os.close(fd)
    raise RunError(
        f"{folder} is being written by another process: wait for it or stop it; the lock goes "
        f"away with the process, also when that is killed"
    )


def make_folder(folder: Path) -> None:
    """Make a folder with those above it, durably; nothing if it is there."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        sync_folder(path.parent)


def other_names(folder: Path, known: Collection[str]) -> list[str]:
    """What is in a folder beside `known` names and the leftovers of a crash."""
    names = (path.name for path in folder.iterdir())
    return sorted(name for name in names if name not in known and not _PARTIAL.match(name))


def sweep_litter(folder: Path, older_than: float = LITTER_SECONDS) -> None:
    """Delete what a crash left half-written in a folder, if that is some seconds ago."""
    for path in folder.iterdir():
        if _PARTIAL.match(path.name):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > older_than:
                    path.unlink()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file; it gets its name `path` when it is on disk, or never."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        sync_file(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees half of it, after a power cut either."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def append_text(path: Path, text: str) -> None:
    """Add whole lines to a file. A line that a crash has cut is ended first: it spoils no other.

    Not durable before `sync_file`.
    """
    with path.open("ab") as file:
        cut = file.tell() and _last_byte(path) != b"\n"
        file.write((b"\n" if cut else b"") + text.encode())


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read()


def copy_tree(source: Path, target: Path) -> None:
    """Copy a folder over another one, durably."""
    make_folder(target)
    shutil.copytree(source, target, dirs_exist_ok=True)
    sync_tree(target)


def sync_file(path: Path) -> None:
    """Make a file's bytes durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def delete(folder: Path, patterns: Collection[str]) -> None:
    """Delete the files below a folder that `patterns` name, and what becomes empty above them."""
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if path.is_dir() and not path.is_symlink():
                continue
            path.unlink()
            for above in path.relative_to(folder).parents[:-1]:
                with contextlib.suppress(OSError):  # not empty
                    (folder / above).rmdir()
