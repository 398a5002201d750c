"""A local or mounted folder as a store: plain files, renames, hard links, `flock`.

An object becomes visible by a hard link or a rename after its `fsync`; then the folders above it
are synchronised, as far up as the cache reaches. A new cache is built beside its place under the
name `.<name>.<random>.creating`.
"""

import contextlib
import errno
import glob
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from cache import files
from cache.stores import journal
from cache.stores.store import Bytes, Change, Draft, InPlace, Lock, Room, Run, Store, Write

PARTIAL = ".partial"  # a folder of unfinished files
LITTER_SECONDS = 600  # a temporary name that nobody has locked for so long is a crash's leftover


class PosixStore(Store, InPlace):
    """All below one folder, which need not be there yet."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._files, self._pid = files.OpenFiles(), os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        PosixStore.__init__(self, state["root"])

    def where(self, name: str) -> str:
        """The full path."""
        return str(self.root / name)

    # ---- reading

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """From the file as it is now."""
        with files.opened(self.root / name) as fd:
            if length is None:
                length = max(0, os.fstat(fd).st_size - offset)
            return files.read_from(fd, offset, length)

    def read_runs(self, name: str, runs: Iterable[Run]) -> list[int]:
        """By `preadv`, straight into the buffers; keeps the file open."""
        with self._open_files().use(self.root / name) as fd:
            return [files.read_exactly(fd, buffers, offset) for offset, buffers in runs]

    def size(self, name: str) -> int:
        """Of the file as it is now."""
        return (self.root / name).stat().st_size

    def exists(self, name: str) -> bool:
        """An empty folder is as good as nothing."""
        path = self.root / name
        return any(path.iterdir()) if path.is_dir() else path.exists()

    def names(self, folder: str) -> list[str]:
        """What the folder lists."""
        try:
            with os.scandir(self.root / folder) as entries:
                return sorted(f"{e.name}/" if e.is_dir() else e.name for e in entries)
        except FileNotFoundError:
            return []

    def close(self) -> None:
        """Close the files that are open to read."""
        self._files.close()

    def _open_files(self) -> files.OpenFiles:
        if self._pid != os.getpid():  # forked: another thread may have held the pool's lock
            self._files, self._pid = files.OpenFiles(), os.getpid()
        return self._files

    # ---- writing

    def write_new(self, contents: Mapping[str, Bytes]) -> None:
        """Straight to their places; the folders once, after all files."""
        folders = set()
        for name, data in contents.items():
            files.write_new(self.root / name, memoryview(data))
            folders |= {self.root / above for above in PurePosixPath(name).parents}
        for folder in sorted(folders - {self.root}, reverse=True):  # the lowest first
            files.sync_folder(folder)

    def publish_new(self, name: str, data: Bytes) -> bool:
        """Written beside its place, and linked."""
        path = self.root / name
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
        try:
            files.write_new(partial, memoryview(data))
            return files.publish(partial, path)
        finally:
            partial.unlink(missing_ok=True)
            self._sync_above(path)

    def replace(self, name: str, data: Bytes, *, waiting: str) -> None:
        """By a rename."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, memoryview(data), self.root / waiting / PARTIAL)
        self._sync_above(path)

    def begin(self, name: str, size: int, *, waiting: str) -> Draft:
        """An unfinished file of its full length, which has a name of its own and is locked: that
        says that somebody lives who writes it."""
        stem = name.removeprefix(waiting).strip("/").replace("/", ".")
        fd, partial = files.new_file(self.root / waiting / PARTIAL, stem)
        try:
            os.ftruncate(fd, size)
            files.try_lock(fd, shared=True)
        except BaseException:
            os.close(fd)
            raise
        return _PosixDraft(self, fd, partial, self.root / name)

    def write_over(self, name: str, writes: Iterable[Write]) -> None:
        """In place."""
        with files.opened(self.root / name, os.O_WRONLY) as fd:
            for offset, data in writes:
                files.write_all(fd, memoryview(data), offset)
            os.fsync(fd)

    def delete(self, name: str) -> None:
        """Durable before the next one is deleted."""
        path = self.root / name
        if path.exists():
            path.unlink()
            files.sync_folder(path.parent)

    def delete_below(self, folder: str) -> None:
        """As far as this user may."""
        path = self.root / folder
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
            files.sync_folder(path.parent)

    def sweep(self, waiting: str) -> None:
        """Those that nobody has locked."""
        files.sweep(self.root / waiting / PARTIAL)

    def _sync_above(self, path: Path) -> None:
        """Make the names above a file durable, up to the folder that is the cache."""
        files.sync_folders(path.parent, self.root / path.relative_to(self.root).parts[0])

    # ---- a cache as a whole

    def create(self, name: str, build: Callable[[str], None], *, shared: bool) -> Lock:
        """Built under another name, locked, and renamed: the lock is of the file itself."""
        there = files.make_folders(self.root)
        self._sweep_creations(name)
        temporary = f".{name}.{uuid.uuid4().hex}.creating"
        try:
            build(temporary)
            lock = self.lock(temporary, shared=shared)
            try:
                journal.forget(self.root / name)  # of a cache that was deleted by hand
                _rename_new(self.root / temporary, self.root / name)
            except BaseException:
                lock.release()
                raise
        finally:
            _delete(self.root / temporary)
        files.sync_folders(self.root, there)
        return lock

    def remove(self, name: str) -> None:
        """Under its name it is gone at once."""
        path = self.root / name
        doomed = path.with_name(f".{path.name}.{uuid.uuid4().hex}.creating")
        path.rename(doomed)
        journal.forget(path)
        _delete(doomed)

    def lock(self, name: str, *, shared: bool = False) -> Lock:
        """By `flock`, which the kernel releases with the process, also when that is killed."""
        path = self.root / name
        writable = path.is_file() and os.access(path, os.W_OK)
        fd = os.open(path, os.O_RDWR if writable else os.O_RDONLY)  # NFS locks nothing open to read
        if files.try_lock(fd, shared=shared) is not False:
            return _PosixLock(fd)
        os.close(fd)
        raise BlockingIOError(errno.EWOULDBLOCK, "another process has its lock", str(path))

    def free_bytes(self) -> int:
        """Of the file system."""
        return files.free_bytes(self.root)

    def used_bytes(self, name: str) -> int:
        """Blocks on the disk; holes take none."""
        return files.allocated_bytes(self.root / name)

    def _sweep_creations(self, name: str) -> None:
        """Delete what a killed creation of this cache left behind."""
        for litter in self.root.glob(f".{glob.escape(name)}.*.creating"):
            with contextlib.suppress(OSError):
                if time.time() - litter.stat().st_mtime > LITTER_SECONDS:
                    lock = self.lock(litter.name)
                    try:
                        _delete(litter)
                    finally:
                        lock.release()

    # ---- in place

    def room(self, name: str, offset: int = 0, *, new: bool = False) -> Room:
        """A descriptor of the file."""
        flags = os.O_CREAT | os.O_TRUNC if new else 0
        return _PosixRoom(os.open(self.root / name, os.O_WRONLY | flags, 0o666), offset)

    def change(self, name: str, change: Change) -> None:
        """Through a journal beside the file."""
        journal.publish(self.root / name, change)
        journal.finish(self.root / name, change)

    def pending(self, name: str) -> Change | None:
        """What the journal says, if there is one."""
        return journal.pending(self.root / name)

    def settle(self, name: str) -> None:
        """Make the writes of the journal again, and delete it."""
        if change := self.pending(name):
            journal.finish(self.root / name, change)


class _PosixLock:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def release(self) -> None:
        os.close(self._fd)


class _PosixDraft(Draft):
    """A file with a name of its own, until it gets that of the object."""

    def __init__(self, store: PosixStore, fd: int, partial: Path, path: Path) -> None:
        self._store, self._fd, self._partial, self._path = store, fd, partial, path

    def write(self, data: memoryview, offset: int) -> None:
        files.write_all(self._fd, data, offset)

    def publish(self) -> bool:
        os.fsync(self._fd)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        ours = files.publish(self._partial, self._path)
        self._store._sync_above(self._path)  # also another's name: a record may now speak of it
        return ours

    def overwrite(self) -> None:
        self._partial.replace(self._path)
        self._store._sync_above(self._path)

    def discard(self) -> None:
        self._partial.unlink(missing_ok=True)
        os.close(self._fd)


class _PosixRoom(Room):
    """An open file, from some offset on."""

    def __init__(self, fd: int, offset: int) -> None:
        self._fd, self._offset = fd, offset

    def write(self, data: memoryview, offset: int) -> None:
        files.write_all(self._fd, data, self._offset + offset)

    def publish(self) -> bool:
        os.fsync(self._fd)
        return True

    def overwrite(self) -> None:
        raise AssertionError("it has its name already")

    def discard(self) -> None:
        os.close(self._fd)

    def resize(self, size: int) -> None:
        os.ftruncate(self._fd, size)


def _rename_new(temporary: Path, path: Path) -> None:
    """Give a finished file or folder its name; FileExistsError when the name is taken."""
    if temporary.is_dir():
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise FileExistsError(f"{path} exists") from error
            raise
    elif not files.publish(temporary, path):
        raise FileExistsError(f"{path} exists")


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
