"""Batches of operands from a cache's tokens, which `reading.py` brings.

Features are constants, so what is kept during training is not the features but the operands that
the networks make of them, computed once per row where they stay resident:

    device   on the GPU                      ram   in memory
    disk     read and computed anew each epoch, the next batches prefetched by threads

All three give the same batches in the same order: a random permutation of all rows per epoch. A
GPU is never waited for within an epoch: the order of rows is sent once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cache import Reader
from pipeline.config import Question
from pipeline.features.labelled import LabelledRows
from pipeline.features.reading import StoredTokens
from pipeline.side.contract import Operands, SideNetwork

_CHUNK_BYTES = 8 * 2**20  # of features, turned into operands at a time: stays in the cache


@dataclass(frozen=True)
class Batch:
    """B rows: the operands of each network by its number (networks alike share theirs), and the
    labels of each question."""

    operands: Mapping[int, Operands]
    labels: dict[Question, Tensor]


class Batches:
    """Rows of a cache as batches of operands for some networks.

    Networks whose operands are equal (`operand_key`) share one copy. Call `load` once, then `epoch`
    as often as wanted; `narrow` when some networks need no more.
    """

    def __init__(
        self,
        reader: Reader,
        labelled: LabelledRows,
        networks: Sequence[SideNetwork],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.rows, self.folds = labelled.rows, labelled.folds
        self.device, self.dtype = device, dtype
        self.stored = StoredTokens(reader, device)
        self.labels = {
            question: torch.from_numpy(np.ascontiguousarray(labels)).to(device)
            for question, labels in labelled.labels.items()
        }
        self._resident: dict[Hashable, Operands] | None = None
        self._blank: dict[Hashable, Operands] = {}  # of one row of zeros
        self.narrow(dict(enumerate(networks)))
        self._blank = self._make(self.stored.zeros())

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def bytes_read(self) -> int:
        """From the cache so far."""
        return self.stored.bytes_read

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's operands."""
        tensors = [tensor for made in self._blank.values() for tensor in made.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows' operands, resident or not."""
        return self.row_bytes * len(self.rows)

    def narrow(self, networks: Mapping[int, SideNetwork]) -> None:
        """Serve these networks alone from now on, by their numbers in `operands`.

        What only others needed is read and made no more, and leaves the memory.
        """
        self._keys = {number: network.operand_key for number, network in networks.items()}
        self._makers = {self._keys[number]: network for number, network in networks.items()}
        there = self.stored.taps
        self.stored.narrow({t for made in self._makers.values() for t in made.sources(there)})
        self._blank = {key: self._blank[key] for key in self._makers if key in self._blank}
        if self._resident is not None:
            self._resident = {key: self._resident[key] for key in self._makers}

    def blank(self, size: int) -> Batch:
        """A batch of zeros with the labels of the first row: to try what a step takes."""
        operands = {
            key: {name: one.new_zeros(size, *one.shape[1:]) for name, one in made.items()}
            for key, made in self._blank.items()
        }
        labels = {question: values[:1].expand(size, *values.shape[1:]).clone()
                  for question, values in self.labels.items()}  # fmt: skip
        return Batch({number: operands[key] for number, key in self._keys.items()}, labels)

    def load(self, place: torch.device, loaded: Callable[[int], None] = lambda _: None) -> None:
        """Compute all operands once and keep them on `place`; `loaded` counts rows."""
        size = self._rows_at_once
        chunks = [self.rows[i : i + size] for i in range(0, len(self.rows), size)]
        resident: dict[Hashable, Operands] = {}
        begin = 0
        for block in self.stored.read_ahead(chunks):
            made = self._make(block)
            begin = _fill(resident, made, begin, of=len(self.rows), place=place)
            loaded(begin)
        self._resident = resident

    def epoch(self, batch_size: int, order: Tensor | None = None) -> Iterator[Batch]:
        """Batches of the rows in `order` (positions within `rows`); of all as they lie."""
        if order is None:
            order = torch.arange(len(self.rows))
        if len(order) == 0:
            return
        places = order.split(batch_size)
        sent = order.to(self.device).split(batch_size)  # once: each copy waits for the GPU
        if self._resident is None:
            blocks = self.stored.read_ahead([self.rows[place.numpy()] for place in places])
            for there, block in zip(sent, blocks, strict=True):
                yield self._batch(self._make_in_parts(block, len(there)), there)
            return
        for place, there in zip(places, sent, strict=True):
            chosen = {key: self._select(room, place, there) for key, room in self._resident.items()}
            yield self._batch(chosen, there)

    def _select(self, room: Operands, place: Tensor, there: Tensor) -> Operands:
        """Some rows of resident operands; `place` on the CPU, the same `there` on the device."""
        out: Operands = {}
        for name, values in room.items():
            if values.device == self.device:
                out[name] = values.index_select(0, there)
                continue
            block = values.new_empty((len(place), *values.shape[1:]), pin_memory=True)
            torch.index_select(values, 0, place, out=block)
            out[name] = block.to(self.device, non_blocking=True)  # torch keeps it until then
        return out

    def _batch(self, made: Mapping[Hashable, Operands], there: Tensor) -> Batch:
        labels = {question: values[there] for question, values in self.labels.items()}
        return Batch({number: made[key] for number, key in self._keys.items()}, labels)

    def _make(self, stored: Mapping[str, Tensor]) -> dict[Hashable, Operands]:
        """A block of stored tokens → the operands of each distinct network."""
        features = self.stored.features(stored)
        with torch.no_grad():
            return {
                key: network.operands(features, self.dtype) for key, network in self._makers.items()
            }

    def _make_in_parts(self, stored: Mapping[str, Tensor], rows: int) -> dict[Hashable, Operands]:
        """`_make`, on a CPU for a few rows at a time, whose sums then stay in its cache."""
        size = self._rows_at_once if self.device.type == "cpu" else rows
        if size >= rows:
            return self._make(stored)
        whole: dict[Hashable, Operands] = {}
        for i in range(0, rows, size):
            made = self._make({name: values[i : i + size] for name, values in stored.items()})
            _fill(whole, made, i, of=rows, place=self.device)
        return whole

    @property
    def _rows_at_once(self) -> int:
        return max(1, _CHUNK_BYTES // self.stored.row_bytes)


def _fill(
    rooms: dict[Hashable, Operands],
    made: Mapping[Hashable, Operands],
    begin: int,
    *,
    of: int,
    place: torch.device,
) -> int:
    """Put operands of some rows where they belong, from row `begin`, in rooms for `of` rows, which
    are made at the first call. Returns one past the last row filled."""
    end = begin
    for key, operands in made.items():
        for name, values in operands.items():
            room = rooms.setdefault(key, {})
            if name not in room:
                room[name] = values.new_empty((of, *values.shape[1:]), device=place)
            end = begin + len(values)
            room[name][begin:end] = values
    return end
