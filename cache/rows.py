"""Reading rows of a stack: straight from the store into memory that the caller owns.

A read resolves rows to places, sorts them, and fills the caller's buffer with as few reads as there
are runs of neighbours. Nothing is copied on the way, the interpreter lock is released while the
kernel works, and no call depends on another, so many threads may read at once.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from cache.containers.container import Container, ShardExtents
from cache.encoding import bytes_of
from cache.errors import CacheDamaged, CacheIncomplete, TapMissing
from cache.manifest import Manifest, Stack


class RowReader:
    """Reads the rows of a container that lie in `slots`, int64 (rows,), as far as their shards are
    `done`, bool (shards,)."""

    def __init__(self, container: Container, slots: np.ndarray, done: np.ndarray) -> None:
        self._container, self._slots, self._done = container, slots, done
        self._extents: dict[tuple[str, int], ShardExtents] = {}

    def read_into(
        self, rows: np.ndarray, out: np.ndarray, *, stack: str, taps: range, view: int
    ) -> None:
        """Fill out[i] (taps, tokens, stored width) with rows[i]. Raises CacheIncomplete,
        CacheDamaged."""
        manifest = self._container.manifest
        length = out.nbytes // max(1, len(out))
        tap_bytes = length // len(taps)
        memory, slots = bytes_of(out), self._slots[rows]
        order = np.argsort(slots, kind="stable")
        slots, rows = slots[order], rows[order]
        for shard, part in _groups(manifest.shards_of(slots)):
            extents = self._of_shard(stack, shard)
            first = manifest.shard_slots(shard).start
            places = extents.offsets[slots[part] - first, view]
            starts = np.where(places < 0, -1, places + taps.start * tap_bytes)
            buffers = [memory[i * length : (i + 1) * length] for i in order[part].tolist()]
            self._fill(extents.name, starts, buffers, rows[part])

    def _of_shard(self, stack: str, shard: int) -> ShardExtents:
        extents = self._extents.get((stack, shard))
        if extents is None:
            if not self._done[shard]:
                slots = self._container.manifest.shard_slots(shard)
                rows = np.flatnonzero((self._slots >= slots.start) & (self._slots < slots.stop))
                raise CacheIncomplete(
                    f"{self._container.where}: rows {rows[0]} to {rows[-1]} are not done yet"
                )
            extents = self._extents[stack, shard] = self._container.slots(stack, shard)
        return extents

    def _fill(
        self, name: str, starts: np.ndarray, buffers: list[memoryview], rows: np.ndarray
    ) -> None:
        """Fill each buffer from its place; neighbours share one read."""
        length = buffers[0].nbytes
        breaks = np.flatnonzero(np.diff(starts) != length) + 1
        bounds = [0, *breaks.tolist(), len(buffers)]
        runs, firsts = [], []
        for first, end in itertools.pairwise(bounds):
            if starts[first] < 0:
                for buffer in buffers[first:end]:
                    buffer[:] = bytes(length)  # stored nowhere: zeros
            else:
                runs.append((int(starts[first]), buffers[first:end]))
                firsts.append(first)
        where = self._container.store.where(name)
        try:
            received = self._container.store.read_runs(name, runs)
        except FileNotFoundError as error:
            raise CacheDamaged(
                f"{where} is missing, the ledger says it was written", where
            ) from error
        for first, (_, wanted), got in zip(firsts, runs, received, strict=True):
            if got < len(wanted) * length:
                row = rows[first + got // length]
                raise CacheDamaged(f"{where} ends before row {row}: it was cut short", where)


def check_out(manifest: Manifest, out: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless values of that shape can be read straight into `out`."""
    dtypes = [manifest.dtype]
    if manifest.storage == "bfloat16":
        dtypes.append(np.dtype("<i2"))
    if out.shape != shape or out.dtype not in dtypes:
        raise ValueError(
            f"out: expected {manifest.dtype} {shape}, received {out.dtype} {out.shape}"
        )
    if not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError("out: expected a writeable, C contiguous array")


def tap_range(stack: Stack, taps: slice | None) -> range:
    """The positions of the taps; None: all. Raises TapMissing."""
    if taps is None:
        return range(len(stack.taps))
    first, end = taps.start or 0, len(stack.taps) if taps.stop is None else taps.stop
    if taps.step not in (None, 1) or not 0 <= first < end <= len(stack.taps):
        raise TapMissing(
            f"taps {first} to {end - 1} (step {taps.step or 1}) are not a contiguous range of "
            f"stack {stack.name!r}, which has {len(stack.taps)}: {', '.join(stack.taps)}"
        )
    return range(first, end)


def _groups(values: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Runs of equal values of a sorted array: (value, where)."""
    bounds = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    for first, end in itertools.pairwise(bounds):
        if end > first:
            yield int(values[first]), slice(first, end)
