"""Plain file descriptors: whole reads and writes, durable renames, locks.

All bulk bytes of a cache pass through `read_exactly` and `write_all`, whatever the backend. They
use positions, never the shared file offset, so any number of threads and forked processes may work
on one file. Nothing here knows what a cache is.
"""

import contextlib
import errno
import fcntl
import os
import sys
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

MOST_BUFFERS = 1024  # IOV_MAX on Linux and macOS
MOST_OPEN = 128  # descriptors kept open by one pool
YOUNG_SECONDS, OLD_SECONDS = 60, 86_400  # ages of a file that may be, or cannot be, in the making


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all bytes of `data` (format "B") at `offset`."""
    while data.nbytes:
        written = os.pwrite(fd, data, offset)  # at most 2 GiB a call on Linux
        data, offset = data[written:], offset + written


def read_exactly(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Fill `buffers` (format "B") one after another from consecutive bytes at `offset`.

    Returns the number of bytes read: less than asked for only at the end of the file.
    """
    waiting = list(buffers)
    total = 0
    while waiting:
        received = os.preadv(fd, waiting[:MOST_BUFFERS], offset + total)
        if received == 0:
            break
        total += received
        while waiting and received >= waiting[0].nbytes:
            received -= waiting.pop(0).nbytes
        if waiting and received:
            waiting[0] = waiting[0][received:]
    return total


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A descriptor of the file or folder, closed at the end."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def read_from(fd: int, offset: int, length: int) -> bytes:
    """Up to `length` bytes of an open file from `offset`; fewer at its end."""
    data = bytearray(length)
    return bytes(data[: read_exactly(fd, [memoryview(data)], offset)])


def read_at(path: Path, offset: int, length: int) -> bytes:
    """Up to `length` bytes of a file from `offset`; fewer at its end."""
    with opened(path) as fd:
        return read_from(fd, offset, length)


def sync(path: Path) -> None:
    """Make a file's bytes durable."""
    with opened(path) as fd:
        os.fsync(fd)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable; without it a rename may be lost in a power cut.

    Some file systems (SMB, some behind FUSE) refuse that for any folder: they are left to do it.
    """
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """Make every file and every name below a folder durable."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(Path(parent, name))
        sync_folder(Path(parent))


def make_folders(folder: Path) -> Path:
    """Make a folder and those above it; the lowest that was there before, to synchronise up to."""
    there = next(above for above in (folder, *folder.parents) if above.exists())
    folder.mkdir(parents=True, exist_ok=True)
    return there


def sync_folders(folder: Path, above: Path) -> None:
    """Make the names in `folder` and in its parents up to `above` durable.

    One call after all changes: a file system with a journal then writes it once.
    """
    sync_folder(folder)
    if folder != above:
        sync_folders(folder.parent, above)


def new_file(folder: Path, stem: str) -> tuple[int, Path]:
    """A new file in `folder`, which is made, under a name that nobody else chooses; open."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{stem}.{os.getpid()}.{uuid.uuid4().hex}"
        with contextlib.suppress(FileNotFoundError):  # somebody else's `sweep` found it empty
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), path


def write_atomic(path: Path, data: memoryview, folder: Path) -> None:
    """Replace a file: after a crash it holds the old bytes or the new, never a mixture.

    Written in `folder` first. The new name is durable when its folder has been synchronised.
    """
    fd, partial = new_file(folder, path.parent.name)
    try:
        write_all(fd, data, 0)
        os.fsync(fd)
    finally:
        os.close(fd)
    partial.replace(path)


def write_new(path: Path, data: memoryview) -> None:
    """Write a file where none is, in folders that are made, and make its bytes durable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        write_all(fd, data, 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(partial: Path, path: Path) -> bool:
    """Give a finished file its name if the name is free: whether it was. Never replaces a file."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError:  # it has no hard links, or none between folders; how it says so differs
        if path.exists():  # the gap between these two is small
            return False
        partial.rename(path)
        return True
    partial.unlink()
    return True


def try_lock(fd: int, *, shared: bool = False) -> bool | None:
    """Take the advisory lock of an open file or folder; False if another has it.

    The kernel releases it when the descriptor is closed, also by `kill -9`. None where the file
    system has no locks: the lock guards against a mistake, correctness does not rest on it.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN):
            return False
        return None
    return True


def sweep(folder: Path) -> None:
    """Delete the unfinished files in `folder` that killed processes left, and it, if it is empty.

    Whoever still writes one holds its lock. A young file may not be locked yet, and is not touched:
    its writer's try at the lock must not fail. Where there are no locks, only an old file can be
    nobody's.
    """
    with contextlib.suppress(OSError):  # it is gone, or another user's
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                _sweep_file(path)
        folder.rmdir()


def _sweep_file(path: Path) -> None:
    age = time.time() - path.stat().st_mtime
    if age <= YOUNG_SECONDS:
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        locked = try_lock(fd)
        if locked or (locked is None and age > OLD_SECONDS):
            path.unlink()
    finally:
        os.close(fd)


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write where `path` is, or will be.

    No limit where the file system gives no size at all, as some behind FUSE do.
    """
    for folder in (path.absolute(), *path.absolute().parents):
        if folder.exists():
            status = os.statvfs(folder)
            return status.f_bavail * status.f_frsize if status.f_blocks else sys.maxsize
    raise FileNotFoundError(f"no folder above {path} exists")


def allocated_bytes(path: Path) -> int:
    """Bytes on disk of a file, or of all files below a folder; holes take none."""
    if path.is_file():
        return path.stat().st_blocks * 512
    return sum(
        os.lstat(Path(parent, name)).st_blocks * 512
        for parent, _, names in os.walk(path)
        for name in names
    )


class OpenFiles:
    """Read descriptors shared by threads, at most `MOST_OPEN` of them idle."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, tuple[int, int]] = OrderedDict()  # path: (fd, users)

    @contextlib.contextmanager
    def use(self, path: Path) -> Iterator[int]:
        """A descriptor of the file, not closed while in use."""
        with self._lock:
            fd, users = self._open.pop(path, (-1, 0))
            if fd < 0:
                fd = os.open(path, os.O_RDONLY)
            self._open[path] = (fd, users + 1)
        try:
            yield fd
        finally:
            with self._lock:
                fd, users = self._open[path]
                self._open[path] = (fd, users - 1)
                self._close_idle(MOST_OPEN)

    def __del__(self) -> None:
        for fd, _ in self._open.values():  # without the lock: a fork may have copied it taken
            os.close(fd)

    def close(self) -> None:
        """Close every idle descriptor."""
        with self._lock:
            self._close_idle(0)

    def _close_idle(self, keep: int) -> None:
        idle = [path for path, (_, users) in self._open.items() if users == 0]
        for path in idle[: max(0, len(idle) - keep)]:
            os.close(self._open.pop(path)[0])
