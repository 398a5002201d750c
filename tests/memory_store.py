"""An object store in memory, as S3 is one: whole objects, put if absent, no renames, no locks."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Mapping

from cache.stores.store import Bytes, Draft, Lock, Run, Store

BUCKETS: dict[str, dict[str, bytes]] = {}  # by the URL of the folder
_MUTEX = threading.Lock()


class MemoryStore(Store):
    """All objects of one bucket. Every call that an object store would get is in `calls`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.calls: list[tuple[str, str]] = []

    @property
    def objects(self) -> dict[str, bytes]:
        """Also after pickling: the bucket is somewhere else."""
        return BUCKETS.setdefault(self.url, {})

    def where(self, name: str) -> str:
        return f"{self.url}/{name}"

    # ---- what S3 can do

    def _get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        self.calls.append(("get", name))
        try:
            data = self.objects[name]
        except KeyError:
            raise FileNotFoundError(self.where(name)) from None
        return data[offset:] if length is None else data[offset : offset + length]

    def _put(self, name: str, data: Bytes, *, if_absent: bool = False) -> bool:
        self.calls.append(("put", name))
        with _MUTEX:
            if if_absent and name in self.objects:
                return False
            self.objects[name] = bytes(data)
            return True

    def _list(self, prefix: str) -> list[str]:
        self.calls.append(("list", prefix))
        return sorted(name for name in list(self.objects) if name.startswith(prefix))

    def _delete(self, name: str) -> None:
        self.calls.append(("delete", name))
        self.objects.pop(name, None)

    # ---- the contract

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        return self._get(name, offset, length)

    def read_runs(self, name: str, runs: Iterable[Run]) -> list[int]:
        received = []
        for offset, buffers in runs:
            data = self._get(name, offset, sum(buffer.nbytes for buffer in buffers))
            received.append(len(data))
            for buffer in buffers:
                piece, data = data[: buffer.nbytes], data[buffer.nbytes :]
                buffer[: len(piece)] = piece
        return received

    def size(self, name: str) -> int:
        return len(self._get(name))

    def exists(self, name: str) -> bool:
        return name in self.objects or bool(self._list(f"{name}/"))

    def taken(self, name: str, root: str) -> bool:
        return root in self.objects

    def names(self, folder: str) -> list[str]:
        prefix = f"{folder.rstrip('/')}/"
        found = set()
        for name in self._list(prefix):
            first, slash, _ = name.removeprefix(prefix).partition("/")
            found.add(first + slash)
        return sorted(found)

    def close(self) -> None:
        pass

    def write_new(self, contents: Mapping[str, Bytes]) -> None:
        for name, data in contents.items():
            if not self._put(name, data, if_absent=True) and self._get(name) != bytes(data):
                raise FileExistsError(self.where(name))

    def publish_new(self, name: str, data: Bytes) -> bool:
        return self._put(name, data, if_absent=True)

    def replace(self, name: str, data: Bytes, *, waiting: str) -> None:
        self._put(name, data)

    def begin(self, name: str, size: int, *, waiting: str) -> Draft:
        return _MemoryDraft(self, name, size)

    def delete(self, name: str) -> None:
        self._delete(name)

    def delete_below(self, folder: str) -> None:
        for name in self._list(f"{folder.rstrip('/')}/"):
            self._delete(name)

    def sweep(self, waiting: str) -> None:
        pass

    def create(self, name: str, build: Callable[[str], None], *, shared: bool) -> Lock:
        build(name)
        return _NoLock()

    def remove(self, name: str) -> None:
        for each in sorted(self._list(name), key=lambda each: each.count("/")):
            if each == name or each.startswith(f"{name}/"):
                self._delete(each)

    def lock(self, name: str, *, shared: bool = False) -> Lock:
        return _NoLock()

    def free_bytes(self) -> int:
        return sys.maxsize

    def used_bytes(self, name: str) -> int:
        return sum(len(self.objects[each]) for each in self._list(f"{name}/"))


class _NoLock:
    def release(self) -> None:
        pass


class _MemoryDraft(Draft):
    def __init__(self, store: MemoryStore, name: str, size: int) -> None:
        self._store, self._name, self._data = store, name, bytearray(size)

    def write(self, data: memoryview, offset: int) -> None:
        self._data[offset : offset + data.nbytes] = data

    def publish(self) -> bool:
        return self._store._put(self._name, self._data, if_absent=True)

    def overwrite(self) -> None:
        self._store._put(self._name, self._data)

    def discard(self) -> None:
        self._data = bytearray()
