"""Stored tokens of a cache on a device, read ahead by threads.

A row is about a megabyte in one piece, so random reads run at nearly sequential speed. A GPU is
never waited for: memory that a copy to it reads from is used again only after that copy's event.
What this file does not know: side networks and what they make of the tokens.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from cache import Reader
from pipeline.device import record_event
from pipeline.features.casting import HostBuffer, host_buffer, restore

READERS = 4  # threads


class StoredTokens:
    """The tokens of some taps, a tensor (B, span, T, stored width) a stack: `span` is the shortest
    run of the stack's taps that holds those in use.

    Call `narrow` first. `bytes_read` counts what was read from the cache so far.
    """

    def __init__(self, reader: Reader, device: torch.device) -> None:
        self.reader, self.device = reader, device
        self.bytes_read = 0
        self._spans: dict[str, slice] = {}

    @property
    def taps(self) -> list[str]:
        """All that the cache holds, in order."""
        return [tap for stack in self.reader.manifest.stacks for tap in stack.taps]

    def narrow(self, wanted: Container[str]) -> None:
        """Read the taps `wanted` alone from now on."""
        self._spans = {}
        for stack in self.reader.manifest.stacks:
            if used := [place for place, tap in enumerate(stack.taps) if tap in wanted]:
                self._spans[stack.name] = slice(used[0], used[-1] + 1)

    @property
    def row_bytes(self) -> int:
        """Bytes that are read for one row."""
        size = self.reader.manifest.dtype.itemsize
        return sum(math.prod(shape) * size for shape in self._shapes(1).values())

    def zeros(self) -> dict[str, Tensor]:
        """One row of zeros, per stack."""
        return {n: buffer.tensor.zero_().to(self.device) for n, buffer in self._buffers(1).items()}

    def features(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored tokens per stack → those of each tap, (B, T, D)."""
        features: dict[str, Tensor] = {}
        for name, values in stored.items():
            stack = self.reader.manifest.stack(name)
            tokens = restore(values, stack.dim)
            features |= zip(stack.taps[self._spans[name]], tokens.unbind(1), strict=True)
        return features

    def read_ahead(self, blocks: Sequence[np.ndarray]) -> Iterator[dict[str, Tensor]]:
        """Each block's stored tokens per stack on the device, in order.

        On a CPU a block's memory is used again for a later one: it is valid until the next is
        asked for.
        """
        largest = max(map(len, blocks))
        free = deque(self._buffers(largest) for _ in range(min(READERS + 1, len(blocks))))
        waiting: deque[tuple[Future[None], dict[str, HostBuffer], int]] = deque()
        pool = ThreadPoolExecutor(READERS, thread_name_prefix="sidecache-read")

        def submit(rows: np.ndarray) -> None:
            buffers = free.popleft()
            waiting.append((pool.submit(self._read, rows, buffers), buffers, len(rows)))

        try:
            ahead = iter(blocks)
            for rows in islice(ahead, len(free)):
                submit(rows)
            while waiting:
                future, buffers, size = waiting.popleft()
                future.result()
                self.bytes_read += size * self.row_bytes
                block = {
                    name: buffer.tensor[:size].to(self.device, non_blocking=True)
                    for name, buffer in buffers.items()
                }
                copied = record_event(self.device)  # before the step that is made of the block
                yield block
                if copied is not None:
                    copied.synchronize()
                free.append(buffers)
                for rows in islice(ahead, 1):
                    submit(rows)
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, rows: np.ndarray, buffers: dict[str, HostBuffer]) -> None:
        for name, buffer in buffers.items():
            into = buffer.array[: len(rows)]
            self.reader.read_into(rows, into, stack=name, taps=self._spans[name])

    def _buffers(self, rows: int) -> dict[str, HostBuffer]:
        """Room for `rows` rows of the taps in use, per stack."""
        storage, pinned = self.reader.manifest.storage, self.device.type == "cuda"
        shapes = self._shapes(rows)
        return {n: host_buffer(shape, storage, pinned=pinned) for n, shape in shapes.items()}

    def _shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """(rows, span, T, stored width) of each stack in use."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, span in self._spans.items():
            _, tokens, width = self.reader.manifest.stored_shape(name)
            shapes[name] = (rows, span.stop - span.start, tokens, width)
        return shapes
