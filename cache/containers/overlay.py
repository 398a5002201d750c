"""What the HDF5 library sees instead of the file: its bytes, and over them what is to be written.

The library never touches a file. It reads and writes through a Python object, which keeps every
write, in order, and leaves it to us when and how these bytes come to the disk.
"""

import io
from collections.abc import Callable
from typing import Any

from cache.stores.store import Write


class Overlay(io.RawIOBase):
    """A file of `size` bytes whose contents `read` gives, under `writes`, the last on top.

    read: (offset, length) → the bytes there, fewer at the end. size: grows and shrinks with what
    the library does. read_already: every range that came from the file, to look at again.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        super().__init__()
        self.size = size
        self.writes: list[Write] = []
        self.read_already: dict[tuple[int, int], bytes] = {}
        self._read, self._at = read, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def writable(self) -> bool:
        """It is, though nobody else sees it."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Where the next read or write begins."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def tell(self) -> int:
        """Where the next read or write begins."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; behind the end with zeros, which the library asks for and never uses."""
        view = memoryview(buffer).cast("B")
        first, length = self._at, len(view)
        there = self._read(first, length)
        self.read_already[first, length] = there
        view[:] = there + bytes(length - len(there))
        for offset, data in self.writes:
            low, end = max(offset, first), min(offset + len(data), first + length)
            if low < end:
                view[low - first : end - first] = data[low - offset : end - offset]
        self._at += length
        return length

    def write(self, data: Any) -> int:
        """Keep the bytes."""
        kept = bytes(memoryview(data).cast("B"))
        if kept:
            self.writes.append((self._at, kept))
            self._at += len(kept)
            self.size = max(self.size, self._at)
        return len(kept)

    def truncate(self, size: int | None = None) -> int:
        """The library's way to say how long the file shall be."""
        self.size = self._at if size is None else size
        return self.size

    def unchanged(self) -> bool:
        """Whether the file still holds every byte that was read from it."""
        return all(self._read(*place) == there for place, there in self.read_already.items())
