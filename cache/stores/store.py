"""The seam between a cache and where it lies: named objects below one root.

Names are relative, with slashes; no one else makes paths of them. A cache is one object (HDF5) or
all objects below one name (Zarr). Everything that a method writes or deletes is durable when it
returns, and no other process ever sees half of an object that it has published.

What an S3-like store can do (get ranges, put whole, put if absent, list, delete) is enough for the
Zarr container. Writing in place is more than that: it is `InPlace`, which HDF5 needs.

Missing objects are FileNotFoundError; other failures are OSErrors with their numbers. A store holds
nothing that does not survive pickling and forking, and threads share it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

Bytes = bytes | bytearray | memoryview
Write = tuple[int, bytes]  # where, what
Run = tuple[int, Sequence[memoryview]]  # where it begins, and what to fill from there on


class Lock(Protocol):
    """Held until it is released, or its process ends."""

    def release(self) -> None:
        """Let others have it."""


class Draft(ABC):
    """An object in the making, which nobody sees; threads may write different bytes of it."""

    @abstractmethod
    def write(self, data: memoryview, offset: int) -> None:
        """Write bytes (format "B") at an offset."""

    @abstractmethod
    def publish(self) -> bool:
        """Give it its name, if the name is free: whether it was. Never replaces an object."""

    @abstractmethod
    def overwrite(self) -> None:
        """Give it its name, in place of what has it; after `publish` has said no."""

    @abstractmethod
    def discard(self) -> None:
        """Give it up, if it has no name; and in any case what it takes to write it."""


class Store(ABC):
    """Objects by name, below a root."""

    @abstractmethod
    def where(self, name: str) -> str:
        """What people call an object: a full path or URL."""

    # ---- reading

    @abstractmethod
    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Up to `length` bytes from `offset`, fewer at the end; None: all."""

    @abstractmethod
    def read_runs(self, name: str, runs: Iterable[Run]) -> list[int]:
        """Fill the buffers of each run from consecutive bytes; how many each run has got, which is
        less than it holds only at the end of the object.

        For objects that are not replaced: an implementation may keep them open. `close` forgets.
        """

    @abstractmethod
    def size(self, name: str) -> int:
        """Number of bytes of an object."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is such an object, or any below that name."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """What lies directly below a folder: names of objects, and of folders with a slash behind
        them; sorted. Nothing for a folder that is not there."""

    @abstractmethod
    def close(self) -> None:
        """Forget what is kept open to read; a later read opens it again."""

    # ---- writing

    @abstractmethod
    def write_new(self, contents: Mapping[str, Bytes]) -> None:
        """Write objects where none are, and of which nobody speaks yet: killed, it may leave some
        of them, or a part of one."""

    @abstractmethod
    def publish_new(self, name: str, data: Bytes) -> bool:
        """Write a small object if the name is free: whether it was."""

    @abstractmethod
    def replace(self, name: str, data: Bytes, *, waiting: str) -> None:
        """Write a small object in one step: there is the old one or the new one, at any time.

        waiting: a folder in which what is unfinished may lie, where it needs a place.
        """

    @abstractmethod
    def begin(self, name: str, size: int, *, waiting: str) -> Draft:
        """Begin a large object of so many bytes."""

    def write_over(self, name: str, writes: Iterable[Write]) -> None:
        """Replace bytes of an object that is there; killed, it may leave any part of that done."""
        data = bytearray(self.read(name))
        for offset, piece in writes:
            data[offset : offset + len(piece)] = piece
        self.replace(name, data, waiting=name.rpartition("/")[0])

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete an object, if it is there."""

    @abstractmethod
    def delete_below(self, folder: str) -> None:
        """Delete all objects below a folder, which nobody speaks of any more."""

    @abstractmethod
    def sweep(self, waiting: str) -> None:
        """Delete the unfinished objects that killed processes have left in a folder."""

    # ---- a cache as a whole

    @abstractmethod
    def create(self, name: str, build: Callable[[str], None], *, shared: bool) -> Lock:
        """Have `build` lay out a cache under the name that it is given, and let it appear as `name`
        as a whole, locked.

        Where nothing can be renamed it is given `name` itself, and the object that makes it a cache
        comes last, by `publish_new`. Raises FileExistsError if the name is taken.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete an object and all below the name; a reader finds all of it or no cache."""

    @abstractmethod
    def lock(self, name: str, *, shared: bool = False) -> Lock:
        """Take the advisory lock of a cache; BlockingIOError if another has it.

        Where there are no locks this does nothing: they guard against a mistake, correctness does
        not rest on them.
        """

    @abstractmethod
    def free_bytes(self) -> int:
        """Bytes that may still be written."""

    @abstractmethod
    def used_bytes(self, name: str) -> int:
        """Bytes that deleting a cache gives back."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """Writes to one object that belong together, in this order; it has `size` bytes afterwards."""

    size: int
    writes: tuple[Write, ...]


class Room(Draft):
    """A part of an object that is written in its place: `publish` makes it durable."""

    @abstractmethod
    def resize(self, size: int) -> None:
        """Cut the whole object, or let it grow by zeros."""


class InPlace(ABC):
    """What a store can do beside, where bytes of an object may be written one by one."""

    @abstractmethod
    def room(self, name: str, offset: int = 0, *, new: bool = False) -> Room:
        """Write into an object from an offset on; `new`: make it, empty."""

    @abstractmethod
    def change(self, name: str, change: Change) -> None:
        """Make all of a change, or nothing: killed anywhere, it is not begun or `pending`."""

    @abstractmethod
    def pending(self, name: str) -> Change | None:
        """The change of an object that is decided, and perhaps made in part: who reads the object
        puts it over what is there."""

    @abstractmethod
    def settle(self, name: str) -> None:
        """Make what is pending; the caller has the lock."""
