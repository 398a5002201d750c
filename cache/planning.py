"""Whether a cache that is there is that of this job; its creation, and the room it needs."""

import errno
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from cache.containers.container import Container
from cache.containers.document import arrays_of, below, labelling_tables, make_document
from cache.documents import ABSENT, differences
from cache.encoding import decode_keys
from cache.errors import CacheError, CacheLocked, IdentityMismatch, NoSpace, NotWritable
from cache.labelling import FIRST, Labelling
from cache.location import Location
from cache.manifest import Manifest
from cache.stores.store import Lock
from cache.tables import check_tables, plain, read_table


class Plan:
    """What a cache is to be: checked, and ready to be laid out.

    `tables` are those of the features and of the labelling, by their own names. `digest` is that of
    the labelling. Raises ValueError for a table that does not fit.
    """

    def __init__(
        self, manifest: Manifest, labelling: Labelling, tables: Mapping[str, np.ndarray]
    ) -> None:
        if len(manifest.parts) != 1:
            raise ValueError(f"a new cache has one part, received parts={manifest.parts}")
        asked = {*labelling.tables, *(f"groups/{group}" for group in labelling.groups), "slots"}
        features = {name: table for name, table in tables.items() if name not in asked}
        self.manifest, self.features = manifest, check_tables(manifest, features)
        self.labels = checked_labels(manifest, labelling, tables, asked)
        keys, digests = decode_keys(self.features["keys"]), self.features.get("source_sha256")
        slots = self.labels.get("slots", np.arange(labelling.rows))
        self.digest = labelling.digest(
            [keys[slot] for slot in slots.tolist()],
            None if digests is None else digests[slots],
            self.labels,
        )
        self.labelling = replace(labelling, history=(self.digest,))

    @property
    def document(self) -> dict[str, Any]:
        """The document of the new cache."""
        return make_document(self.manifest, self.labelling, self.digest, self.tables)

    @property
    def tables(self) -> dict[str, np.ndarray]:
        """All tables by the names under which they are stored."""
        return {**self.features, **{below(FIRST, n): table for n, table in self.labels.items()}}

    @property
    def nbytes(self) -> int:
        """Bytes that the cache will take, metadata left out."""
        return sum(
            math.prod(shape) * dtype.itemsize for _, shape, dtype in arrays_of(self.document)
        )

    def differences(self, container: Container) -> list[tuple[str, Any, Any]]:
        """Where the features of a cache are not these: identity, layout, inputs."""
        there, wanted = container.manifest.to_dict(), self.manifest.to_dict()
        found = differences(there["identity"], wanted["identity"])
        if not found:  # the rest follows from the identity, and would only repeat it
            for name in ("storage", "parts", "views", "stacks", "final_norm", "blocks"):
                found += differences(there[name], wanted[name], name)
        if found:
            return found
        labels = set(labelling_tables(container.document)) | set(container.document["former"])
        kept = container.document["tables"].keys() - labels
        for name in sorted(kept ^ self.features.keys()):
            there_now = ("there", ABSENT) if name in kept else (ABSENT, "there")
            found.append((f"table {name}", *there_now))
        for name in sorted(kept & self.features.keys()):
            if read_table(container, name).tobytes() != self.features[name].tobytes():
                found.append((f"table {name}", "other contents", "these contents"))
        return found

    def refuse_differences(self, container: Container) -> None:
        """Resuming is for the same job. Raises IdentityMismatch naming every field."""
        if found := self.differences(container):
            lines = "".join(
                f"\n  {field}: {_short(a)} in the cache, {_short(b)} now" for field, a, b in found
            )
            raise IdentityMismatch(
                f"{container.where} was made from something else:{lines}\n"
                "choose another --out, or replace it with --overwrite",
                found,
            )


def checked_labels(
    manifest: Manifest,
    labelling: Labelling,
    tables: Mapping[str, np.ndarray],
    names: Collection[str],
) -> dict[str, np.ndarray]:
    """Those tables that a labelling asks for, as they are stored."""
    asked = {name: table for name, table in tables.items() if name in names}
    checked = labelling.check(asked, manifest.slots)
    return {name: plain(table) for name, table in checked.items()}


def create_or_lock(location: Location, plan: Plan, *, overwrite: bool, shared: bool) -> Lock:
    """The lock of the cache, which exists afterwards.

    What is there is replaced only if `overwrite` says so and it holds other features: of several
    workers that were all told to overwrite, one does, and the others use its cache.
    """

    def same() -> bool:
        try:
            return not plan.differences(location.open())
        except CacheError:
            return False

    while location.is_there():
        if not overwrite or same():
            return location.lock(shared=shared)
        refuse_full_disk(location, plan.nbytes, location.store.used_bytes(location.name))
        try:
            location.remove(unless=same)
        except CacheLocked:
            if not same():  # else another worker has just replaced it
                raise
        except FileNotFoundError:
            continue  # another worker has just removed it
    refuse_full_disk(location, plan.nbytes)
    try:
        return location.create(plan.document, plan.tables, shared=shared)
    except FileExistsError:  # another worker was faster: use its plan
        return location.lock(shared=shared)


def refuse_full_disk(location: Location, needed: int, reclaimed: int = 0) -> None:
    """Raise NoSpace if `needed` bytes do not fit on the disk, when so many are given back."""
    free = location.store.free_bytes() + reclaimed
    if needed > free:
        raise NoSpace(
            f"{location}: {needed:,} bytes are still to be written and {free:,} are free: "
            "make room, choose another disk, or keep fewer taps, tokens or a smaller storage type"
        )


def _short(value: object) -> str:
    """A value for a message; of a digest its first twelve digits."""
    is_digest = isinstance(value, str) and len(value) == 64
    return f"{value[:12]}…" if is_digest else repr(value)  # type: ignore[index]


@contextmanager
def disk_explained(location: Location) -> Iterator[None]:
    """Say what a full disk, or one that this user may not write, means: NoSpace, NotWritable."""
    try:
        yield
    except CacheError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(
                f"{location}: the disk is full. Finished shards are kept: make room and run the "
                "same command again, it continues from there"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise NotWritable(
                f"{location} cannot be written ({error}): expected a place where this user may "
                "write; choose another --out, or change the rights"
            ) from error
        raise
