"""All of some writes to a file, or none: a redo journal beside the file, `.<name>.redo`.

The writes are complete and durable in the journal before the first of them touches the file; they
are done from the moment on that the journal has its name. Whoever reads meanwhile puts them over
what he finds in the file, so it does not matter how many of them are there already. Making them
again does no harm: the next writer does so, if this one was killed.
"""

import json
import os
from pathlib import Path

import xxhash

from cache import files
from cache.documents import canonical_json
from cache.errors import CacheDamaged
from cache.stores.store import Change

_MAGIC = b"sidecache redo 1"


def journal_path(path: Path) -> Path:
    """Where the journal of a file lies."""
    return path.with_name(f".{path.name}.redo")


def pending(path: Path) -> Change | None:
    """The change of a file that is not finished. Raises CacheDamaged."""
    there = journal_path(path)
    try:
        magic, text, data = there.read_bytes().split(b"\n", 2)
        head = json.loads(text)
    except FileNotFoundError:
        return None
    except ValueError:
        magic, head, data = b"", {}, b""
    if magic != _MAGIC or head["check"] != _check(head, data):
        raise CacheDamaged(
            f"{there} is damaged, and holds a change of {path.name} that is not finished: delete "
            "it if `verify` then finds the cache whole, otherwise make the cache again",
            str(there),
        )
    if head["file"] != path.stat().st_ino:
        raise CacheDamaged(
            f"{there} belongs to another file than {path}, which was replaced since: delete it if "
            "the cache is whole (`verify` tells), or bring back the file that was there",
            str(there),
        )
    writes, at = [], 0
    for offset, length in head["writes"]:
        writes.append((offset, data[at : at + length]))
        at += length
    return Change(size=head["size"], writes=tuple(writes))


def publish(path: Path, change: Change) -> None:
    """Decide on a change, durably; what the writes refer to must be on the disk."""
    data = b"".join(data for _, data in change.writes)
    places = [[offset, len(data)] for offset, data in change.writes]
    head = {"file": path.stat().st_ino, "size": change.size, "writes": places}
    text = canonical_json({**head, "check": _check(head, data)}).encode()
    there = journal_path(path)
    partial = there.with_name(f"{there.name}.partial")  # there is one writer
    files.write_new(partial, memoryview(_MAGIC + b"\n" + text + b"\n" + data))
    partial.rename(there)
    files.sync_folder(path.parent)


def finish(path: Path, change: Change) -> None:
    """Make the change, durably; again, where it was made in part."""
    with files.opened(path, os.O_WRONLY) as fd:
        for offset, data in change.writes:
            files.write_all(fd, memoryview(data), offset)
        os.ftruncate(fd, change.size)
        os.fsync(fd)
    forget(path)


def forget(path: Path) -> None:
    """Delete the journal of a file that is as it should be, or gone."""
    if journal_path(path).exists():
        journal_path(path).unlink(missing_ok=True)
        files.sync_folder(path.parent)


def _check(head: dict[str, object], data: bytes) -> str:
    described = canonical_json({name: head[name] for name in ("file", "size", "writes")})
    return xxhash.xxh3_128_hexdigest(described.encode() + data)
