"""Everything that can go wrong with a cache, as one tree.

    CacheError
    ├── LocationError        (ValueError)         the path names no cache: bad suffix, not ours
    ├── CacheNotFound        (FileNotFoundError)  nothing is there
    ├── CacheIncomplete      (RuntimeError)       extraction has not finished
    ├── CacheDamaged         (ValueError)         the bytes are not what was written
    ├── FormatVersionError   (ValueError)         written by another version of the format
    ├── IdentityMismatch     (ValueError)         written by another identity; `.differences`
    │   └── LabellingMismatch                     the same features, asked other things
    ├── CacheLocked          (RuntimeError)       another process is writing it now
    ├── NoSpace              (OSError)            the disk is too full for the job
    ├── NotWritable          (PermissionError)    this user, or nobody, may write there
    ├── StorageOverflow      (OverflowError)      a value does not fit the storage type; `.index`
    └── NameMissing          (KeyError)           no such stack, split, target or table
        └── TapMissing                            the cache does not hold that tap

Each also subclasses the builtin that a caller would expect, so `except ValueError` works as usual.
Every message says what was expected, what came, and what to do.
"""

import errno
from collections.abc import Sequence
from typing import Any


class CacheError(Exception):
    """Base of every error that `cache` raises on purpose."""


class LocationError(CacheError, ValueError):
    """The path does not name a cache: another suffix, or something that is not a cache."""


class CacheNotFound(CacheError, FileNotFoundError):
    """There is nothing at the location."""


class CacheIncomplete(CacheError, RuntimeError):
    """Some shards have no ledger record yet."""


class CacheDamaged(CacheError, ValueError):
    """A file is missing, short, or holds other bytes than were written; `.file` if one is."""

    def __init__(self, message: str, file: str | None = None) -> None:
        super().__init__(message)
        self.file = file


class FormatVersionError(CacheError, ValueError):
    """The cache has a format version that this program does not read."""


class IdentityMismatch(CacheError, ValueError):
    """The cache at the location was made from something else than what is asked for.

    `differences` lists `(dotted field, value in the cache, value requested)`.
    """

    def __init__(self, message: str, differences: Sequence[tuple[str, Any, Any]] = ()) -> None:
        super().__init__(message)
        self.differences = list(differences)


class LabellingMismatch(IdentityMismatch):
    """The cache holds these features, and the source of its inputs asks other things of them now
    than when it was last asked."""


class CacheLocked(CacheError, RuntimeError):
    """Another process holds the cache open for writing."""


class NoSpace(CacheError, OSError):
    """The file system has, or had, too little room."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.ENOSPC


class NotWritable(CacheError, PermissionError):
    """This user, or nobody, may write at the location."""


class StorageOverflow(CacheError, OverflowError):
    """A value cannot be held by the storage type.

    `index` is the position of the first such value in the array that was encoded, `value` itself.
    """

    def __init__(self, message: str, index: tuple[int, ...] = (), value: float = 0.0) -> None:
        super().__init__(message)
        self.index = index
        self.value = value


class NameMissing(CacheError, KeyError):
    """A stack, split, target or table is asked for that the cache does not hold."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""  # KeyError would show the repr


class TapMissing(NameMissing):
    """A tap is asked for that the cache does not hold."""
