"""Batches of operands from a cache: the only reader of `cache` in stage two.

Features are constants, so what is kept during training is not the features but the operands that
the networks make of them, computed once per row where they stay resident:

    device   on the GPU                      ram   in memory
    disk     read and computed anew each epoch, the next batches prefetched by threads

All three give the same batches in the same order: a random permutation of all rows per epoch. A
row is about a megabyte in one piece, so random reads run at nearly sequential speed.

A GPU is never waited for within an epoch: the order of rows is sent once, memory that a copy to it
reads from is used again only after that copy's event.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from cache import Reader, Stack, Target
from pipeline.device import record_event
from pipeline.errors import SettingError
from pipeline.features.memory import free_memory
from pipeline.features.taps import HostBuffer, choose_taps, host_buffer, restore
from pipeline.side import FeatureSpec, Operands, SideNetwork, TokenShape
from pipeline.tasks.metrics import Task

READERS = 4  # threads
SPARE = 0.8  # of the free memory may be filled with features
_CHUNK_BYTES = 8 * 2**20  # of features, turned into operands at a time: stays in the cache


@dataclass(frozen=True)
class Batch:
    """B rows: the operands of each network by its number (networks alike share theirs), and each
    task's labels."""

    operands: Mapping[int, Operands]
    labels: dict[str, Tensor]


@dataclass(frozen=True)
class LabelledRows:
    """Row numbers of a cache, and for each task its labels of them (`pipeline.tasks.metrics`).

    `left_out` counts the rows that have no label for any target of the cache.
    """

    rows: np.ndarray
    labels: Mapping[str, np.ndarray]
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.rows)


def feature_spec(reader: Reader, outputs: int, taps: str = "all") -> FeatureSpec:
    """What the cache tells a side network; of its taps those that `taps` chooses.

    Raises SettingError if `taps` chooses none, or one that the cache lacks.
    """
    shapes = {
        tap: TokenShape(tokens=stack.tokens, prefix_tokens=stack.prefix_tokens, dim=stack.dim)
        for stack in reader.manifest.stacks
        for tap in stack.taps
    }
    norm = reader.final_norm
    return FeatureSpec(
        taps={tap: shapes[tap] for tap in choose_taps(taps, tuple(shapes))},
        classes=outputs,
        norm=norm["kind"],
        norm_eps=norm["eps"],
        norm_weight=_tensor(norm.get("weight")),
        norm_bias=_tensor(norm.get("bias")),
        blocks=tuple(reader.manifest.blocks),
    )


def initial_weights(reader: Reader) -> dict[str, Tensor]:
    """What the cache offers side networks to start from: LST's pruned weights, if it has them."""
    tables = reader.tables_below("ladder")
    return {name: torch.from_numpy(table) for name, table in tables.items()}


def labelled_rows(reader: Reader, splits: Sequence[str], tasks: Sequence[str]) -> LabelledRows:
    """Rows of the splits that have a label for some target of the cache, with those of `tasks`.

    Which rows does not depend on `tasks`: members share the batches, whatever they learn. Raises
    SettingError if a task has no label there.
    """
    if not splits:
        return LabelledRows(np.empty(0, np.int64), {})
    found = reader.split_rows(*splits)
    tables = {target.name: reader.labels(target.name)[found] for target in reader.labelling.targets}
    known = {
        target.name: Task(name=target.name, kind=target.kind)
        .known(torch.from_numpy(tables[target.name]))
        .numpy()
        for target in reader.labelling.targets
    }
    named = " + ".join(splits)
    if len(found) == 0:
        raise SettingError(f"split {named}: it has no rows")
    for task in tasks:
        if not known[task].any():
            raise SettingError(f"split {named}: none of its {len(found):,} rows has a {task}")
    kept = np.any(list(known.values()), axis=0)
    return LabelledRows(
        rows=found[kept],
        labels={task: tables[task][kept] for task in tasks},
        left_out=int((~kept).sum()),
    )


def make_task(target: Target, train: LabelledRows) -> Task:
    """A target as members learn it; a regression is standardised by the training rows."""
    task = Task(name=target.name, kind=target.kind, classes=target.classes)
    if target.kind != "regression":
        return task
    values = train.labels[target.name].astype(np.float64)
    return replace(task, centre=float(np.nanmean(values)), scale=float(np.nanstd(values)) or 1.0)


class Batches:
    """Rows of a cache as batches of operands for some networks.

    Networks whose operands are equal (`operand_key`) share one copy. Call `load` once, then `epoch`
    as often as wanted; `narrow` when some networks need no more. `bytes_read` counts what was read
    from the cache so far.
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
        self.reader, self.rows, self.device, self.dtype = reader, labelled.rows, device, dtype
        self.labels = {
            task: torch.from_numpy(np.ascontiguousarray(labels)).to(device)
            for task, labels in labelled.labels.items()
        }
        self.bytes_read = 0
        self._resident: dict[Hashable, Operands] | None = None
        self._blank: dict[Hashable, Operands] = {}  # of one row of zeros
        self.narrow(dict(enumerate(networks)))
        zeros = {n: buffer.tensor.zero_().to(device) for n, buffer in self._buffers(1).items()}
        self._blank = self._make(zeros)

    def __len__(self) -> int:
        return len(self.rows)

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
        stacks = self.reader.manifest.stacks
        available = [tap for stack in stacks for tap in stack.taps]
        wanted = {tap for network in self._makers.values() for tap in network.sources(available)}
        self._spans = {
            stack.name: _span(stack, wanted) for stack in stacks if wanted.intersection(stack.taps)
        }
        self._blank = {key: self._blank[key] for key in self._makers if key in self._blank}
        if self._resident is not None:
            self._resident = {key: self._resident[key] for key in self._makers}

    def blank(self, size: int) -> Batch:
        """A batch of zeros with the labels of the first row: to try what a step takes."""
        operands = {
            key: {name: one.new_zeros(size, *one.shape[1:]) for name, one in made.items()}
            for key, made in self._blank.items()
        }
        labels = {task: values[:1].expand(size, *values.shape[1:]).clone()
                  for task, values in self.labels.items()}  # fmt: skip
        return Batch({number: operands[key] for number, key in self._keys.items()}, labels)

    def load(self, place: torch.device, loaded: Callable[[int], None] = lambda _: None) -> None:
        """Compute all operands once and keep them on `place`; `loaded` counts rows."""
        size = self._rows_at_once
        chunks = [self.rows[i : i + size] for i in range(0, len(self.rows), size)]
        resident: dict[Hashable, Operands] = {}
        begin = 0
        for features in self._prefetched(chunks):
            made = self._make(features)
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
            features = self._prefetched([self.rows[place.numpy()] for place in places])
            for there, block in zip(sent, features, strict=True):
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
        labels = {task: values[there] for task, values in self.labels.items()}
        return Batch({number: made[key] for number, key in self._keys.items()}, labels)

    def _make(self, stored: Mapping[str, Tensor]) -> dict[Hashable, Operands]:
        """Stored tokens of each stack (B, span, T, …) on the device → the operands of each distinct
        network."""
        features: dict[str, Tensor] = {}
        for name, values in stored.items():
            stack, span = self.reader.manifest.stack(name), self._spans[name]
            tokens = restore(values, stack.dim)
            features |= zip(stack.taps[span], tokens.unbind(1), strict=True)
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
        return max(1, _CHUNK_BYTES // self._row_read_bytes)

    @property
    def _row_read_bytes(self) -> int:
        size = self.reader.manifest.dtype.itemsize
        return sum(math.prod(shape) * size for shape in self._shapes(1).values())

    def _shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """(rows, span, T, stored width) of each stack in use."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, span in self._spans.items():
            _, tokens, width = self.reader.manifest.stored_shape(name)
            shapes[name] = (rows, span.stop - span.start, tokens, width)
        return shapes

    def _buffers(self, rows: int) -> dict[str, HostBuffer]:
        """Room for `rows` rows of the taps in use, per stack."""
        storage, pinned = self.reader.manifest.storage, self.device.type == "cuda"
        shapes = self._shapes(rows)
        return {n: host_buffer(shape, storage, pinned=pinned) for n, shape in shapes.items()}

    def _read(self, rows: np.ndarray, buffers: dict[str, HostBuffer]) -> None:
        for name, buffer in buffers.items():
            into = buffer.array[: len(rows)]
            self.reader.read_into(rows, into, stack=name, taps=self._spans[name])

    def _prefetched(self, blocks: Sequence[np.ndarray]) -> Iterator[dict[str, Tensor]]:
        """Each block's stored tokens per stack on the device, in order, read ahead by threads.

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
                self.bytes_read += size * self._row_read_bytes
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


def _span(stack: Stack, wanted: Container[str]) -> slice:
    """The shortest run of the stack's taps that holds the wanted ones."""
    used = [position for position, tap in enumerate(stack.taps) if tap in wanted]
    return slice(used[0], used[-1] + 1)


def choose_resident(wanted: str, nbytes: int, device: torch.device, step_bytes: int = 0) -> str:
    """`device`, `ram` or `disk`: what was asked for if it fits, else the fastest that does.

    A GPU's memory must hold `step_bytes` beside the features: what a training step of all members
    takes. Raises SettingError if `device` or `ram` was asked for and `nbytes` do not fit.
    """
    room = {"ram": int(free_memory() * SPARE)}
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] - step_bytes
        room = {"device": int(max(0, free) * SPARE), **room}
    elif wanted == "device":
        wanted = "ram"  # on the CPU they are the same memory
    if wanted == "disk":
        return "disk"
    if wanted == "auto":
        return next((place for place, free in room.items() if nbytes <= free), "disk")
    if nbytes > room[wanted]:
        beside = f" beside {step_bytes / 1e9:.2f} GB for a step" if step_bytes else ""
        raise SettingError(
            f"--resident {wanted}: the features take {nbytes / 1e9:.2f} GB there, "
            f"{room[wanted] / 1e9:.2f} GB are free{beside}. --resident auto or disk reads them as "
            f"needed."
        )
    return wanted


def _tensor(array: np.ndarray | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(np.array(array))
