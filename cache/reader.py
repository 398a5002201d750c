"""Reading a cache: rows straight from the file into memory that the caller owns.

What lies in which slot is the reader's business, and how it is read that of `RowReader`. A reader
may be pickled and forked: it reopens its files where it finds itself.
"""

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np

from cache.containers.container import Container
from cache.containers.document import below, in_part, labelling_tables
from cache.documents import canonical_json
from cache.encoding import decode_keys
from cache.errors import CacheDamaged, CacheIncomplete, NameMissing
from cache.labelling import Target
from cache.ledger import Error, Record, read_record
from cache.location import Where, open_container
from cache.rows import RowReader, check_out, tap_range
from cache.tables import (
    labelling_digest,
    read_labelling_table,
    read_table,
    read_table_rows,
)

Rows = Sequence[int] | np.ndarray | range


class Reader:
    """A cache opened for reading; a context manager.

    Rows are those of the labelling: the inputs of today, in their order. What lies in which slot is
    the reader's business.

    allow_incomplete: open a cache whose extraction has not finished; only the rows of finished
    shards can then be read.

    Besides what follows: `location` (the full path or URL), `manifest`, `labelling`, `fingerprint`,
    `slots` (int64 (rows,), where each row's features lie), `skipped` (reason per row without),
    `errors` (per stack, what rounding to the storage type lost in each shard where that was
    measured, see docs/format.md), `seconds` (wall time that the finished shards took, all legs and
    workers together; None where no record says) and `container` (the layout, for `cache` itself).

    Raises: LocationError, CacheNotFound, CacheIncomplete, CacheDamaged, FormatVersionError,
    CacheLocked while an HDF5 file is being changed.
    """

    def __init__(self, location: Where, *, allow_incomplete: bool = False) -> None:
        self.container, self.slots = _opened(location)
        self.location = self.container.where
        self.manifest, self.labelling = self.container.manifest, self.container.labelling
        self.fingerprint = self.manifest.fingerprint
        self.errors: dict[str, list[Error]] = {}
        self._done = np.zeros(self.manifest.shards, bool)
        skipped: dict[int, str] = {}
        seconds: list[float] = []
        for shard, record in self._records():
            if record is None:
                continue
            self._done[shard] = True
            skipped |= record.skipped
            for stack, error in record.error.items():
                self.errors.setdefault(stack, []).append(error)
            if record.seconds is not None:
                seconds.append(record.seconds)
        self.seconds = round(math.fsum(seconds), 3) if seconds else None
        self.skipped = (
            {row: skipped[slot] for row, slot in enumerate(self.slots.tolist()) if slot in skipped}
            if skipped
            else {}
        )
        if not self.complete and not allow_incomplete:
            raise CacheIncomplete(
                f"{location}: {self.rows_done} of {self.rows} rows are done: "
                "run the same extract command again, it continues where it stopped"
            )
        self._rows = RowReader(self.container, self.slots, self._done)

    @property
    def _row_tables(self) -> set[str]:
        """Names of the labelling's tables, as they are stored; version 1 has them at the root."""
        return set(labelling_tables(self.container.document))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files that are open; a later read opens them again."""
        self.container.store.close()

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.labelling.rows

    @property
    def nbytes(self) -> int:
        """Bytes of the rows of all stacks; slots that no row has any more are not counted."""
        return self.rows * self.manifest.slot_nbytes

    @property
    def complete(self) -> bool:
        """Whether the shards of all rows have a ledger record."""
        return self.rows_done == self.rows

    @functools.cached_property
    def rows_done(self) -> int:
        """Rows whose shards are finished."""
        return int(self._done[self.manifest.shards_of(self.slots)].sum())

    @property
    def slots_pending(self) -> int:
        """Slots whose shards are not finished: of an extraction, or of an update of the rows."""
        shards = np.flatnonzero(~self._done)
        return sum(len(self.manifest.shard_slots(int(shard))) for shard in shards)

    def is_known_as(self, fingerprint: str) -> bool:
        """Whether a run that noted this fingerprint was trained on these features: by the name of
        today, or the one that format version 1 gave them."""
        return fingerprint in (self.fingerprint, self.manifest.formerly or self.fingerprint)

    def has(self, table: str) -> bool:
        """Whether the cache keeps a table of that name."""
        return table in self.container.document["tables"]

    @property
    def own_keys(self) -> np.ndarray | None:
        """The labelling's table of keys; None if each row's key is that of its slot."""
        if below(self.container.labelling_at, "keys") not in self._row_tables:
            return None
        return self.labelling_table("keys")

    @functools.cached_property
    def slot_keys(self) -> list[str]:
        """One key per slot, also of those that no row has."""
        parts = range(len(self.manifest.parts))
        return [key for part in parts for key in decode_keys(self.table(in_part(part, "keys")))]

    @functools.cached_property
    def keys(self) -> list[str]:
        """One key per row."""
        if (own := self.own_keys) is not None:
            return decode_keys(own)
        keys = self.slot_keys
        return [keys[slot] for slot in self.slots.tolist()]

    @property
    def slot_sha256(self) -> np.ndarray:
        """Digest of each slot's input, uint8 (slots, 32). Raises NameMissing if not kept."""
        return self._of_slots("source_sha256")

    @property
    def source_sha256(self) -> np.ndarray:
        """Digest of each row's input, uint8 (rows, 32). Raises NameMissing if not kept."""
        return self.slot_sha256[self.slots]

    def lengths(self, stack: str = "tokens") -> np.ndarray:
        """Tokens of each row, int32 (rows,); those behind are zeros and count nowhere.

        All tokens of the stack, where the cache does not say.
        """
        tokens = self.manifest.stack(stack).tokens
        if f"lengths/{stack}" not in self.container.document["tables"]:
            return np.full(self.rows, tokens, np.int32)
        return self._of_slots(f"lengths/{stack}")[self.slots]

    def target(self, name: str | None = None) -> Target:
        """The target of that name; None: the first. Raises NameMissing listing those there are."""
        targets = self.labelling.targets
        for target in targets:
            if name in (None, target.name):
                return target
        names = _listed([target.name for target in targets])
        asked = "" if name is None else f" {name!r}"
        raise NameMissing(f"no target{asked} in {self.location}: it holds {names}")

    def labels(self, target: str | None = None, rows: Rows | None = None) -> np.ndarray:
        """What is to be predicted for every row, as `Target` says; None: of the first target.

        `rows`: of these alone, in this order; the others are not read. Raises NameMissing.
        """
        name = f"labels/{self.target(target).name}"
        if rows is None:
            return self.labelling_table(name)
        stored = below(self.container.labelling_at, name)
        return read_table_rows(self.container, stored, np.asarray(rows, np.int64))

    def groups(self, name: str) -> list[str]:
        """The group that each row belongs to. Raises NameMissing listing those there are."""
        if name not in self.labelling.groups:
            names = _listed(self.labelling.groups)
            raise NameMissing(f"no group {name!r} in {self.location}: it holds {names}")
        return decode_keys(self.labelling_table(f"groups/{name}"))

    @property
    def folds(self) -> np.ndarray:
        """The fold of each row, int16 (rows,), -1 for none. Raises NameMissing without folds."""
        if not self.labelling.folds:
            raise NameMissing(f"{self.location} has no folds; `sidecache label --folds` draws them")
        return self.labelling_table("fold")

    @property
    def split(self) -> np.ndarray:
        """Each row's split as an index into `labelling.splits`, int16 (rows,), -1 for none."""
        if not self.labelling.splits:
            return np.full(self.rows, -1, np.int16)
        return self.labelling_table("split")

    def split_rows(self, *names: str) -> np.ndarray:
        """Rows of the named splits, int64, in row order, skipped ones left out; no name: all rows.

        Raises NameMissing listing the splits there are.
        """
        splits = self.labelling.splits
        for name in names:
            if name not in splits:
                raise NameMissing(
                    f"no split {name!r} in {self.location}: it holds {_listed(splits)}"
                )
        keep = np.ones(self.rows, bool)
        if names:
            keep = np.isin(self.split, [splits.index(name) for name in names])
        keep[list(self.skipped)] = False
        return np.flatnonzero(keep).astype(np.int64)

    def labelling_table(self, name: str) -> np.ndarray:
        """A fresh copy of one of the labelling's tables. Raises NameMissing, CacheDamaged."""
        return read_labelling_table(self.container, name)

    @property
    def place_tables(self) -> dict[str, np.ndarray]:
        """Those of the labelling's tables that say which slot each row has: a labelling of the same
        rows takes them over."""
        own = self.own_keys
        return {"slots": self.slots} | ({} if own is None else {"keys": own})

    @functools.cached_property
    def labelling_tables(self) -> dict[str, np.ndarray]:
        """All tables of the labelling by name, `slots` left out."""
        names = (*self.labelling.tables, *(f"groups/{group}" for group in self.labelling.groups))
        return {name: self.labelling_table(name) for name in names}

    @functools.cached_property
    def labelling_digest(self) -> str:
        """SHA-256, in hex, of what is asked of which inputs: the same for every format, and however
        the features are stored."""
        return labelling_digest(self.container)

    @functools.cached_property
    def final_norm(self) -> dict[str, Any]:
        """The backbone's last norm: kind, eps, weight, bias (float32); empty if not kept."""
        return {**self.manifest.final_norm, **self.tables_below("final_norm")}

    def table(self, name: str) -> np.ndarray:
        """A fresh copy of one table. Raises NameMissing, CacheDamaged."""
        return read_table(self.container, name)

    def tables_below(self, prefix: str) -> dict[str, np.ndarray]:
        """Fresh copies of the tables `<prefix>/<rest>`, by `<rest>`; empty if there are none.

        Raises CacheDamaged.
        """
        above = f"{prefix}/"
        names = [name for name in self.container.document["tables"] if name.startswith(above)]
        return {name.removeprefix(above): self.table(name) for name in names}

    def read(
        self, rows: Rows, *, stack: str = "tokens", taps: slice | None = None, view: int = 0
    ) -> np.ndarray:
        """The rows as a new array `(n, taps, tokens, stored width)` in the storage dtype."""
        _, *token_shape = self.manifest.stored_shape(stack)
        shape = (len(rows), len(tap_range(self.manifest.stack(stack), taps)), *token_shape)
        out = np.empty(shape, self.manifest.dtype)
        self.read_into(rows, out, stack=stack, taps=taps, view=view)
        return out

    def read_into(
        self,
        rows: Rows,
        out: np.ndarray,
        *,
        stack: str = "tokens",
        taps: slice | None = None,
        view: int = 0,
    ) -> None:
        """Read rows, in the order given, into `out` `(n, taps, tokens, stored width)`.

        out: C contiguous, in the storage dtype and of the width of `Manifest.stored_shape`;
        bfloat16 bits may also go into int16. It may be the memory of a pinned tensor.
        taps: a contiguous range of tap positions; None for all.

        Raises:
            IndexError: a row or the view is outside the cache.
            ValueError: `out` has another shape or dtype, or is not contiguous.
            TapMissing: `taps` reaches outside the stack, or is empty.
            CacheIncomplete: a row belongs to a shard that is not done.
            CacheDamaged: the file is missing or ends too early; names it and the row.
        """
        chosen = tap_range(self.manifest.stack(stack), taps)
        indices = self._check_rows(rows, view)
        _, *token_shape = self.manifest.stored_shape(stack)
        check_out(self.manifest, out, (len(indices), len(chosen), *token_shape))
        self._rows.read_into(indices, out, stack=stack, taps=chosen, view=view)

    @functools.cached_property
    def content(self) -> str:
        """SHA-256 of the features, in hex: the same for every format, path, shard size and history.

        Covers stack names and shapes, storage type, keys, row digests in row order and skipped
        rows; labels and splits are in `labelling_digest`. Raises CacheIncomplete while rows are
        missing.
        """
        if not self.complete:
            raise CacheIncomplete(
                f"{self.location}: the content is not known before it is complete"
            )
        described = self.manifest.to_dict()
        head = {name: described[name] for name in ("storage", "views", "stacks")}
        head |= {"rows": self.rows, "skipped": sorted(self.skipped), "keys": self.keys}
        digest = hashlib.sha256(canonical_json(head).encode())
        records = dict(self._records())
        shards = self.manifest.shards_of(self.slots).tolist()
        for stack in self.manifest.stacks:
            for shard, slot in zip(shards, self.slots.tolist(), strict=True):
                record = records[shard]
                if record is None:
                    raise CacheDamaged(f"{self.location}: the record of shard {shard} is gone")
                digest.update(record.digests[stack.name][slot - record.slots[0]].encode())
        return digest.hexdigest()

    def _records(self) -> Iterator[tuple[int, Record | None]]:
        for shard in range(self.manifest.shards):
            yield shard, read_record(self.container.record(shard), self.manifest, shard)

    def _of_slots(self, name: str) -> np.ndarray:
        """A table with a value a slot, of all parts."""
        parts = range(len(self.manifest.parts))
        return np.concatenate([self.table(in_part(part, name)) for part in parts])

    def _check_rows(self, rows: Rows, view: int) -> np.ndarray:
        indices = np.asarray(rows)
        if indices.ndim != 1 or (len(indices) and indices.dtype.kind not in "iu"):
            raise ValueError(f"rows: expected a list of integers, received {indices.dtype}")
        outside = (indices < 0) | (indices >= self.rows)
        if outside.any():
            raise IndexError(
                f"row {indices[outside.argmax()]} is outside the cache, "
                f"which has rows 0 to {self.rows - 1}"
            )
        if not 0 <= view < self.manifest.views:
            raise IndexError(f"view {view} is outside the cache: it has {self.manifest.views}")
        return indices.astype(np.int64)


def _opened(location: Where) -> tuple[Container, np.ndarray]:
    """The cache at a location, and the slot of each row."""
    while True:
        container = open_container(location)
        try:
            if below(container.labelling_at, "slots") in labelling_tables(container.document):
                return container, read_labelling_table(container, "slots")
            return container, np.arange(container.labelling.rows)
        except CacheDamaged:
            if open_container(location).document == container.document:
                raise  # else its labelling has been replaced twice meanwhile


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
