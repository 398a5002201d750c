"""Where a cache is: the store and the name in it, and the container that the suffix chooses."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self

import numpy as np

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
from cache.stores.posix import PosixStore
from cache.stores.store import Lock, Store

CONTAINERS: dict[str, type[Container]] = {".zarr": ZarrContainer, ".h5": Hdf5Container}
STORES: dict[str, Callable[[str], Store]] = {}  # by the scheme of a URL: the store of a folder

Where = str | os.PathLike[str]


@dataclass(frozen=True)
class Location:
    """One cache's place. `text` is what the caller said."""

    text: str
    store: Store
    name: str
    kind: type[Container]

    @classmethod
    def of(cls, where: Where) -> Self:
        """Raises LocationError for a suffix or a scheme that is unknown."""
        text = os.fspath(where)
        scheme, url, _ = text.partition("://")
        folder, _, name = text.rstrip("/").rpartition("/")
        if not url:
            path = Path(text).absolute()
            folder, name = str(path.parent), path.name
        elif scheme not in STORES:
            raise LocationError(f"{text}: expected a local path, received a URL")
        suffix = PurePosixPath(name).suffix
        if suffix not in CONTAINERS:
            raise LocationError(
                f"{text}: expected a folder name ending in .zarr or a file name ending in .h5, "
                f"received suffix {suffix!r}"
            )
        store = STORES[scheme](folder) if url else PosixStore(Path(folder))
        return cls(text, store, name, CONTAINERS[suffix])

    def __str__(self) -> str:
        return self.store.where(self.name)

    def is_there(self) -> bool:
        """Whether something stands here; an empty folder is as good as nothing."""
        return self.store.exists(self.name)

    def open(self) -> Container:
        """Read the layout of the cache; no data are read.

        Raises: LocationError, CacheNotFound, CacheDamaged, FormatVersionError.
        """
        if not self.store.exists(self.name):
            raise CacheNotFound(f"{self.text}: there is no cache here; `extract` makes one")
        try:
            return self.kind.open(self.store, self.name)
        except (IsADirectoryError, NotADirectoryError) as error:
            expected = "folder" if self.kind is ZarrContainer else "file"
            raise LocationError(
                f"{self.text}: expected a {expected} for suffix {self.kind.suffix}"
            ) from error
        except CacheError as error:
            if str(self) not in str(error):
                error.args = (f"{self.text}: {error}", *error.args[1:])
            raise

    def lock(self, *, shared: bool = False) -> Lock:
        """Take the writer's lock of the cache, which workers of one job share.

        Raises CacheLocked when another writer has it.
        """
        try:
            return self.store.lock(self.name, shared=shared)
        except BlockingIOError as error:
            raise CacheLocked(
                f"{self} is being written by another process: wait for it or stop it; "
                "the lock goes away with the process, also when that is killed"
            ) from error

    def create(
        self, document: dict[str, Any], tables: Mapping[str, np.ndarray], *, shared: bool = False
    ) -> Lock:
        """Create an empty cache, which is there whole or not at all; its lock.

        Raises FileExistsError when somebody else has created one in the meantime.
        """

        def build(name: str) -> None:
            self.kind.create(self.store, name, document, tables)

        return self.store.create(self.name, build, shared=shared)

    def remove(self, unless: Callable[[], bool] = lambda: False) -> None:
        """Delete the cache; refuses what does not look like one.

        `unless` is asked when nobody else can write it any more: True leaves it there. Raises:
        LocationError; CacheLocked when it is being written.
        """
        lock = self.lock()
        try:
            self._refuse_other_things()
            if not unless():
                self.store.remove(self.name)
        finally:
            lock.release()

    def _refuse_other_things(self) -> None:
        try:
            self.open()
        except FormatVersionError:
            pass  # a cache all the same
        except CacheDamaged as error:
            if not self.kind.was_one(self.store, self.name):
                raise LocationError(
                    f"{self} is not a sidecache cache, so it is not overwritten: "
                    "choose another name, or delete it yourself"
                ) from error


def open_container(where: Where) -> Container:
    """Read the layout of the cache at a location. Raises what `Location.open` raises."""
    return Location.of(where).open()
