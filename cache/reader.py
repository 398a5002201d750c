"""Reading a cache: rows straight from the file into memory that the caller owns.

A read resolves rows to places in files, sorts them, and fills the caller's buffer with as few
`preadv` calls as there are runs of neighbours. Nothing is copied on the way, the interpreter lock
is released while the kernel works, and no call depends on another, so many threads may read at
once. A reader may be pickled and forked: it reopens its files where it finds itself.
"""

import functools
import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from cache import files
from cache.backend import ShardExtents
from cache.encoding import decode_keys
from cache.errors import CacheDamaged, CacheIncomplete, NameMissing, TapMissing
from cache.ledger import Error, Record, read_record
from cache.location import open_backend
from cache.manifest import Stack, Target, canonical_json
from cache.tables import read_table

Rows = Sequence[int] | np.ndarray | range


class Reader:
    """A cache opened for reading; a context manager.

    allow_incomplete: open a cache whose extraction has not finished; only the rows of finished
    shards can then be read.

    Besides what follows: `location` (absolute), `manifest`, `fingerprint`, `skipped` (reason per
    row that has no features), `errors` (per stack, what rounding lost in each shard where that was
    measured, see docs/format.md), `seconds` (wall time that the finished shards took, all legs and
    workers together; None where no record says) and `backend` (the layout, for `cache` itself).

    Raises: LocationError, CacheNotFound, CacheIncomplete, CacheDamaged, FormatVersionError.
    """

    def __init__(self, location: str | Path, *, allow_incomplete: bool = False) -> None:
        self.backend = open_backend(location)
        self.location = self.backend.path
        self.manifest = self.backend.manifest
        self.fingerprint = self.manifest.fingerprint
        self.skipped: dict[int, str] = {}
        self.errors: dict[str, list[Error]] = {}
        self._done = np.zeros(self.manifest.shards, bool)
        seconds: list[float] = []
        for shard, record in self._records():
            if record is None:
                continue
            self._done[shard] = True
            self.skipped |= record.skipped
            for stack, error in record.error.items():
                self.errors.setdefault(stack, []).append(error)
            if record.seconds is not None:
                seconds.append(record.seconds)
        self.seconds = round(math.fsum(seconds), 3) if seconds else None
        if not self.complete and not allow_incomplete:
            raise CacheIncomplete(
                f"{location}: {self.rows_done} of {self.manifest.rows} rows are done: "
                "run the same extract command again, it continues where it stopped"
            )
        self._extents: dict[tuple[str, int], ShardExtents] = {}
        self._files, self._pid = files.OpenFiles(), os.getpid()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_files"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _files=files.OpenFiles(), _pid=os.getpid())

    def close(self) -> None:
        """Close the files that are open; a later read opens them again."""
        self._files.close()

    @property
    def complete(self) -> bool:
        """Whether every shard has a ledger record."""
        return bool(self._done.all())

    @property
    def rows_done(self) -> int:
        """Rows of the finished shards."""
        return sum(len(self.manifest.shard_rows(int(s))) for s in np.flatnonzero(self._done))

    @functools.cached_property
    def keys(self) -> list[str]:
        """One key per row."""
        return decode_keys(self.table("keys"))

    def target(self, name: str | None = None) -> Target:
        """The target of that name; None: the first. Raises NameMissing listing those there are."""
        targets = self.manifest.targets
        for target in targets:
            if name in (None, target.name):
                return target
        names = _listed([target.name for target in targets])
        asked = "" if name is None else f" {name!r}"
        raise NameMissing(f"no target{asked} in {self.location}: it holds {names}")

    def labels(self, target: str | None = None) -> np.ndarray:
        """What is to be predicted for every row, as `Target` says; None: of the first target.

        Raises NameMissing.
        """
        return self.table(f"labels/{self.target(target).name}")

    def split_rows(self, *names: str) -> np.ndarray:
        """Rows of the named splits, int64, in row order, skipped ones left out; no name: all rows.

        Raises NameMissing listing the splits there are.
        """
        splits = self.manifest.splits
        for name in names:
            if name not in splits:
                raise NameMissing(
                    f"no split {name!r} in {self.location}: it holds {_listed(splits)}"
                )
        keep = np.ones(self.manifest.rows, bool)
        if names:
            keep = np.isin(self.table("split"), [splits.index(name) for name in names])
        keep[list(self.skipped)] = False
        return np.flatnonzero(keep).astype(np.int64)

    @functools.cached_property
    def final_norm(self) -> dict[str, Any]:
        """The backbone's last norm: kind, eps, weight, bias (float32); empty if not kept."""
        return {**self.manifest.final_norm, **self.tables_below("final_norm")}

    @property
    def source_sha256(self) -> np.ndarray:
        """Digest of each row's source file, uint8 (rows, 32). Raises NameMissing if not kept."""
        return self.table("source_sha256")

    def table(self, name: str) -> np.ndarray:
        """A fresh copy of one table. Raises NameMissing, CacheDamaged."""
        return read_table(self.backend, name)

    def tables_below(self, prefix: str) -> dict[str, np.ndarray]:
        """Fresh copies of the tables `<prefix>/<rest>`, by `<rest>`; empty if there are none.

        Raises CacheDamaged.
        """
        above = f"{prefix}/"
        names = [name for name in self.backend.document["tables"] if name.startswith(above)]
        return {name.removeprefix(above): self.table(name) for name in names}

    def read(
        self, rows: Rows, *, stack: str = "tokens", taps: slice | None = None, view: int = 0
    ) -> np.ndarray:
        """The rows as a new array `(n, taps, tokens, stored width)` in the storage dtype."""
        _, *token_shape = self.manifest.stored_shape(stack)
        shape = (len(rows), len(_tap_range(self.manifest.stack(stack), taps)), *token_shape)
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
        _, tokens, width = self.manifest.stored_shape(stack)
        chosen = _tap_range(self.manifest.stack(stack), taps)
        indices = self._check_rows(rows, view)
        self._check_out(out, (len(indices), len(chosen), tokens, width))
        tap_bytes = tokens * width * out.itemsize
        length = len(chosen) * tap_bytes
        memory = out.reshape(-1).view(np.uint8).data
        order = np.argsort(indices, kind="stable")
        indices = indices[order]
        for shard, part in _groups(indices // self.manifest.rows_per_shard):
            extents = self._shard_extents(stack, shard)
            first = self.manifest.shard_rows(shard).start
            places = extents.offsets[indices[part] - first, view]
            starts = np.where(places < 0, -1, places + chosen.start * tap_bytes)
            buffers = [memory[i * length : (i + 1) * length] for i in order[part].tolist()]
            self._fill(extents.path, starts, buffers, indices[part])

    @functools.cached_property
    def content(self) -> str:
        """SHA-256 of the numbers, in hex: the same for every format, path and shard size.

        Covers stack names and shapes, storage type, row digests in row order, skipped rows, keys,
        targets with labels, and splits. Raises CacheIncomplete while rows are missing.
        """
        if not self.complete:
            raise CacheIncomplete(
                f"{self.location}: the content is not known before it is complete"
            )
        document = self.manifest.to_dict()
        layout = ("storage", "rows", "views", "stacks", "targets", "splits")
        head = {name: document[name] for name in layout} | {"skipped": sorted(self.skipped)}
        digest = hashlib.sha256(canonical_json(head).encode())
        names = ["keys", *(f"labels/{target.name}" for target in self.manifest.targets)]
        for name in [*names, "split"] if self.manifest.splits else names:
            digest.update(self.table(name).data)
        for stack in self.manifest.stacks:
            for shard, record in self._records():
                if record is None:
                    raise CacheDamaged(f"{self.location}: the record of shard {shard} is gone")
                digest.update("".join(record.digests[stack.name]).encode())
        return digest.hexdigest()

    def _records(self) -> Iterator[tuple[int, Record | None]]:
        for shard in range(self.manifest.shards):
            yield shard, read_record(self.backend.record(shard), self.manifest, shard)

    def _check_rows(self, rows: Rows, view: int) -> np.ndarray:
        indices = np.asarray(rows)
        if indices.ndim != 1 or (len(indices) and indices.dtype.kind not in "iu"):
            raise ValueError(f"rows: expected a list of integers, received {indices.dtype}")
        outside = (indices < 0) | (indices >= self.manifest.rows)
        if outside.any():
            raise IndexError(
                f"row {indices[outside.argmax()]} is outside the cache, "
                f"which has rows 0 to {self.manifest.rows - 1}"
            )
        if not 0 <= view < self.manifest.views:
            raise IndexError(f"view {view} is outside the cache: it has {self.manifest.views}")
        return indices.astype(np.int64)

    def _check_out(self, out: np.ndarray, shape: tuple[int, ...]) -> None:
        dtypes = [self.manifest.dtype]
        if self.manifest.storage == "bfloat16":
            dtypes.append(np.dtype("<i2"))
        if out.shape != shape or out.dtype not in dtypes:
            raise ValueError(
                f"out: expected {self.manifest.dtype} {shape}, received {out.dtype} {out.shape}"
            )
        if not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError("out: expected a writeable, C contiguous array")

    def _shard_extents(self, stack: str, shard: int) -> ShardExtents:
        extents = self._extents.get((stack, shard))
        if extents is None:
            if not self._done[shard]:
                rows = self.manifest.shard_rows(shard)
                raise CacheIncomplete(
                    f"{self.location}: rows {rows.start} to {rows.stop - 1} are not done yet"
                )
            extents = self._extents[stack, shard] = self.backend.rows(stack, shard)
        return extents

    def _fill(
        self, path: Path, starts: np.ndarray, buffers: list[memoryview], rows: np.ndarray
    ) -> None:
        """Fill each buffer from its place; neighbours in the file share one read."""
        length = buffers[0].nbytes
        breaks = np.flatnonzero(np.diff(starts) != length) + 1
        try:
            with self._open_files().use(path) as fd:
                for run in np.split(np.arange(len(buffers)), breaks):
                    first, end = int(run[0]), int(run[-1]) + 1
                    if starts[first] < 0:
                        buffers[first][:] = bytes(length)  # stored nowhere: zeros
                        continue
                    got = files.read_exactly(fd, buffers[first:end], int(starts[first]))
                    if got < (end - first) * length:
                        row = rows[first + got // length]
                        raise CacheDamaged(f"{path} ends before row {row}: it was cut short", path)
        except FileNotFoundError as error:
            raise CacheDamaged(
                f"{path} is missing, the ledger says it was written", path
            ) from error

    def _open_files(self) -> files.OpenFiles:
        if self._pid != os.getpid():  # forked: another thread may have held the pool's lock
            self._files, self._pid = files.OpenFiles(), os.getpid()
        return self._files


def _groups(values: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Runs of equal values of a sorted array: (value, where)."""
    bounds = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    for first, end in itertools.pairwise(bounds):
        if end > first:
            yield int(values[first]), slice(first, end)


def _tap_range(stack: Stack, taps: slice | None) -> range:
    if taps is None:
        return range(len(stack.taps))
    first, end = taps.start or 0, len(stack.taps) if taps.stop is None else taps.stop
    if taps.step not in (None, 1) or not 0 <= first < end <= len(stack.taps):
        raise TapMissing(
            f"taps {first} to {end - 1} (step {taps.step or 1}) are not a contiguous range of "
            f"stack {stack.name!r}, which has {len(stack.taps)}: {', '.join(stack.taps)}"
        )
    return range(first, end)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
