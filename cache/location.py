"""Where a cache is: the container of a path, and its creation, one file or folder at a time.

The suffix chooses the container. A cache appears under its name only when its layout is complete:
it is built beside its place under a temporary name, made durable, locked, and renamed.
"""

import contextlib
import errno
import glob
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cache import files
from cache.containers import journal
from cache.containers.container import Container
from cache.containers.hdf5 import Hdf5Container
from cache.containers.zarr import ZarrContainer
from cache.errors import (
    CacheDamaged,
    CacheError,
    CacheLocked,
    CacheNotFound,
    FormatVersionError,
    LocationError,
)

CONTAINERS: dict[str, type[Container]] = {".zarr": ZarrContainer, ".h5": Hdf5Container}
LITTER_SECONDS = 600  # a temporary name that nobody has locked for so long is a crash's leftover


def container_of(location: str | Path) -> type[Container]:
    """The container class for a location. Raises LocationError for another suffix."""
    path = Path(location)
    if "://" in str(location):
        raise LocationError(f"{location}: expected a local path, received a URL")
    if path.suffix not in CONTAINERS:
        raise LocationError(
            f"{location}: expected a folder name ending in .zarr or a file name ending in .h5, "
            f"received suffix {path.suffix!r}"
        )
    return CONTAINERS[path.suffix]


def open_container(location: str | Path) -> Container:
    """Read the layout of the cache at a location; no data are read.

    Raises: LocationError, CacheNotFound, CacheDamaged, FormatVersionError.
    """
    kind, path = container_of(location), Path(location).absolute()
    if not path.exists():
        raise CacheNotFound(f"{location}: there is no cache here; `extract` makes one")
    expected = "folder" if kind is ZarrContainer else "file"
    if path.is_dir() != (kind is ZarrContainer):
        raise LocationError(f"{location}: expected a {expected} for suffix {kind.suffix}")
    try:
        return kind.open(path)
    except CacheError as error:
        if str(path) not in str(error):
            error.args = (f"{location}: {error}", *error.args[1:])
        raise


def lock(path: Path, *, shared: bool = False) -> int:
    """Take the writer's lock of a cache and return the descriptor that holds it.

    Workers of one job share it. Raises CacheLocked when another writer has it.
    """
    writable = path.is_file() and os.access(path, os.W_OK)
    fd = os.open(path, os.O_RDWR if writable else os.O_RDONLY)  # NFS locks nothing open to read
    if files.try_lock(fd, shared=shared) is not False:
        return fd
    os.close(fd)
    raise CacheLocked(
        f"{path} is being written by another process: wait for it or stop it; "
        "the lock goes away with the process, also when that is killed"
    )


def create(
    location: Path,
    document: dict[str, Any],
    tables: Mapping[str, np.ndarray],
    *,
    shared: bool = False,
) -> int:
    """Create an empty cache and return the descriptor that holds its lock.

    Raises FileExistsError when somebody else has created one in the meantime.
    """
    path = location.absolute()
    there = files.make_folders(path.parent)
    _sweep(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.creating")
    try:
        container_of(path).create(temporary, document, tables)
        journal.forget(path)  # of a cache that was deleted by hand; the new one is another
        fd = lock(temporary, shared=shared)  # of the file itself: the rename keeps it
        try:
            _publish(temporary, path)
        except BaseException:
            os.close(fd)
            raise
    finally:
        _delete(temporary)
    files.sync_folders(path.parent, there)
    return fd


def remove(location: Path, unless: Callable[[], bool] = lambda: False) -> None:
    """Delete the cache at a location; refuses what does not look like one.

    `unless` is asked when nobody else can write it any more: True leaves it there. Raises:
    LocationError; CacheLocked when it is being written.
    """
    path = location.absolute()
    fd = lock(path)
    try:
        _refuse_other_things(path)
        if unless():
            return
        doomed = path.with_name(f".{path.name}.{uuid.uuid4().hex}.creating")
        path.rename(doomed)
        journal.forget(path)
        _delete(doomed)
    finally:
        os.close(fd)


def is_there(location: Path) -> bool:
    """Whether something stands at the location; an empty folder is as good as nothing."""
    if location.is_dir():
        return any(location.iterdir())
    return location.exists()


def _publish(temporary: Path, path: Path) -> None:
    """Give a finished layout its name; FileExistsError when the name is taken."""
    if temporary.is_dir():
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise FileExistsError(f"{path} exists") from error
            raise
    elif not files.publish(temporary, path):
        raise FileExistsError(f"{path} exists")


def _refuse_other_things(path: Path) -> None:
    try:
        open_container(path)
    except FormatVersionError:
        pass  # a cache all the same
    except CacheDamaged as error:
        if not _was_a_cache(path):
            raise LocationError(
                f"{path} is not a sidecache cache, so it is not overwritten: "
                "choose another name, or delete it yourself"
            ) from error


def _was_a_cache(path: Path) -> bool:
    if path.is_dir():
        root = path / "zarr.json"
        return root.exists() and b'"sidecache"' in root.read_bytes()
    head = files.read_at(path, 0, 2**20)
    return head.startswith(b"\x89HDF") and b'"fingerprint"' in head


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Delete what a killed creation of this cache left behind."""
    for litter in path.parent.glob(f".{glob.escape(path.name)}.*.creating"):
        with contextlib.suppress(OSError, CacheLocked):
            if time.time() - litter.stat().st_mtime > LITTER_SECONDS:
                fd = lock(litter)
                _delete(litter)
                os.close(fd)
