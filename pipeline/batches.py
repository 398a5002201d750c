"""Batches of operands from a cache: the only reader of `cache` in stage two.

Features are constants, so what is kept during training is not the features but the operands that
the networks make of them, computed once per row where they stay resident:

    device   on the GPU                      ram   in memory
    disk     read and computed anew each epoch, the next batches prefetched by threads

All three give the same batches in the same order: a random permutation of all rows per epoch. A
row is about a megabyte in one piece, so random reads run at nearly sequential speed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import psutil
import torch
from torch import Tensor

from cache import Reader
from pipeline.errors import SettingError
from pipeline.side import FeatureSpec, Operands, SideNetwork
from pipeline.taps import host_buffer

READERS = 4  # threads
SPARE = 0.8  # of the free memory may be filled with features
_CHUNK_BYTES = 8 * 2**20  # of features, turned into operands at a time: stays in the cache


@dataclass(frozen=True)
class Batch:
    """B rows: the operands of each network (networks alike share theirs), and the labels (B,)."""

    operands: list[Operands]
    labels: Tensor


def feature_spec(reader: Reader, classes: int) -> FeatureSpec:
    """What the cache's first stack and final norm tell a side network."""
    stack, norm = reader.manifest.stacks[0], reader.final_norm
    return FeatureSpec(
        taps=stack.taps,
        tokens=stack.tokens,
        prefix_tokens=stack.prefix_tokens,
        dim=stack.dim,
        classes=classes,
        norm=norm["kind"],
        norm_eps=norm["eps"],
        norm_weight=_tensor(norm["weight"]),
        norm_bias=_tensor(norm["bias"]),
    )


def labelled_rows(reader: Reader, splits: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the splits and their labels. SettingError if there are none, or unlabelled ones."""
    if not splits:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    rows = reader.split_rows(*splits)
    labels = reader.labels()[rows]
    named = " + ".join(splits)
    if len(rows) == 0:
        raise SettingError(f"split {named}: it has no rows")
    if (labels < 0).any():
        key = reader.keys[int(rows[int(np.argmax(labels < 0))])]
        raise SettingError(
            f"split {named}: {int((labels < 0).sum())} rows have no label, first {key}"
        )
    return rows, labels


class Batches:
    """Rows of a cache as batches of operands for some networks.

    `rows` are row numbers of the cache, `labels` theirs. Networks whose operands are equal
    (`operand_key`) share one copy. Call `load` once, then `epoch` as often as wanted.
    """

    def __init__(
        self,
        reader: Reader,
        rows: np.ndarray,
        labels: np.ndarray,
        networks: Sequence[SideNetwork],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.reader, self.rows, self.device, self.dtype = reader, rows, device, dtype
        self.labels = torch.from_numpy(np.ascontiguousarray(labels)).to(device)
        self.stack = reader.manifest.stacks[0]
        keys = [network.operand_key for network in networks]
        self._source_of = [keys.index(key) for key in keys]
        self._makers = {i: networks[i] for i in sorted(set(self._source_of))}
        taps = self.stack.taps
        read = {i: network.taps(network.settings, taps) for i, network in self._makers.items()}
        used = sorted({taps.index(tap) for names in read.values() for tap in names})
        self._span = slice(used[0], used[-1] + 1)
        self._positions = {  # within the span
            i: [taps.index(tap) - used[0] for tap in names] for i, names in read.items()
        }
        self._resident: dict[int, Operands] | None = None
        self.row_bytes = sum(
            tensor.numel() * tensor.element_size()
            for operands in self._make(self._buffer(1)[0].zero_()).values()
            for tensor in operands.values()
        )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows' operands, resident or not."""
        return self.row_bytes * len(self.rows)

    def load(self, place: torch.device, loaded: Callable[[int], None] = lambda _: None) -> None:
        """Compute all operands once and keep them on `place`; `loaded` counts rows."""
        size = max(1, _CHUNK_BYTES // self._row_read_bytes)
        chunks = [self.rows[i : i + size] for i in range(0, len(self.rows), size)]
        resident: dict[int, Operands] = {}
        begin = 0
        for features in self._prefetched(chunks):
            for i, operands in self._make(features.to(self.device)).items():
                for name, values in operands.items():
                    room = resident.setdefault(i, {})
                    if name not in room:
                        shape = (len(self.rows), *values.shape[1:])
                        room[name] = torch.empty(shape, dtype=values.dtype, device=place)
                    room[name][begin : begin + len(values)] = values
            begin += len(features)
            loaded(begin)
        self._resident = resident

    def epoch(self, batch_size: int, order: Tensor | None = None) -> Iterator[Batch]:
        """All rows once, in `order` (positions within `rows`), or as they lie."""
        if order is None:
            order = torch.arange(len(self.rows))
        places = order.split(batch_size)
        if self._resident is None:
            features = self._prefetched([self.rows[place.numpy()] for place in places])
            for place, block in zip(places, features, strict=True):
                yield self._batch(self._make(block.to(self.device, non_blocking=True)), place)
            return
        for place in places:
            chosen = {i: self._select(room, place) for i, room in self._resident.items()}
            yield self._batch(chosen, place)

    def _select(self, room: Operands, place: Tensor) -> Operands:
        out: Operands = {}
        for name, values in room.items():
            if values.device != self.device:
                block = values.new_empty((len(place), *values.shape[1:]), pin_memory=True)
                torch.index_select(values, 0, place, out=block)
                out[name] = block.to(self.device, non_blocking=True)
            else:
                out[name] = values.index_select(0, place.to(values.device))
        return out

    def _batch(self, made: dict[int, Operands], place: Tensor) -> Batch:
        labels = self.labels[place.to(self.device)]
        return Batch([made[i] for i in self._source_of], labels)

    def _make(self, features: Tensor) -> dict[int, Operands]:
        """Features (B, span, T, D) → the operands of each distinct network."""
        made: dict[int, Operands] = {}
        for i, network in self._makers.items():
            positions = self._positions[i]
            whole = positions == list(range(features.shape[1]))
            mine = features if whole else features[:, positions]
            with torch.no_grad():
                made[i] = network.operands(mine, self.dtype)
        return made

    @property
    def _row_read_bytes(self) -> int:
        taps = self._span.stop - self._span.start
        return self.reader.manifest.row_nbytes * taps // len(self.stack.taps)

    def _buffer(self, rows: int) -> tuple[Tensor, np.ndarray]:
        taps = self._span.stop - self._span.start
        shape = (rows, taps, self.stack.tokens, self.stack.dim)
        pinned = self.device.type == "cuda"
        return host_buffer(shape, self.reader.manifest.storage, pinned=pinned)

    def _prefetched(self, blocks: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """Each block's features in order, read ahead by threads.

        A block's memory is used again for a later one: it is valid until the next is asked for.
        """
        largest = max(map(len, blocks))
        free = deque(self._buffer(largest) for _ in range(min(READERS + 1, len(blocks))))
        waiting: deque[tuple[Future[None], tuple[Tensor, np.ndarray], int]] = deque()
        pool = ThreadPoolExecutor(READERS, thread_name_prefix="sidecache-read")

        def submit(rows: np.ndarray) -> None:
            buffer = free.popleft()
            part = buffer[1][: len(rows)]
            read = partial(self.reader.read_into, stack=self.stack.name, taps=self._span)
            waiting.append((pool.submit(read, rows, part), buffer, len(rows)))

        try:
            ahead = iter(blocks)
            for rows in islice(ahead, len(free)):
                submit(rows)
            while waiting:
                future, buffer, size = waiting.popleft()
                future.result()
                yield buffer[0][:size]
                if self.device.type == "cuda":
                    torch.cuda.current_stream(self.device).synchronize()  # its copy has ended
                free.append(buffer)
                for rows in islice(ahead, 1):
                    submit(rows)
        finally:
            pool.shutdown(cancel_futures=True)


def choose_resident(wanted: str, nbytes: int, device: torch.device) -> str:
    """`device`, `ram` or `disk`: what was asked for if it fits, else the fastest that does.

    Raises SettingError if `device` or `ram` was asked for and `nbytes` do not fit.
    """
    room = {"ram": int(psutil.virtual_memory().available * SPARE)}
    if device.type == "cuda":
        room = {"device": int(torch.cuda.mem_get_info(device)[0] * SPARE), **room}
    elif wanted == "device":
        wanted = "ram"  # on the CPU they are the same memory
    if wanted == "disk":
        return "disk"
    if wanted == "auto":
        return next((place for place, free in room.items() if nbytes <= free), "disk")
    if nbytes > room[wanted]:
        raise SettingError(
            f"--resident {wanted}: the features take {nbytes / 1e9:.2f} GB there, "
            f"{room[wanted] / 1e9:.2f} GB are free. --resident auto or disk reads them as needed."
        )
    return wanted


def _tensor(array: np.ndarray | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(np.array(array))
