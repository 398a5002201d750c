"""Decoding in worker processes: rows of a source → batches of pixels, in order.

Pixels are bytes: batches wait in shared memory, of which a container has 64 MB, and travel to the
device, where they are normalised.

Batches are a fixed partition of the rows (batch b holds rows b*size … (b+1)*size - 1), whatever is
still to be done: a resumed extraction therefore multiplies the same matrices as an uninterrupted
one and gives the same bits. Where rows were added later, the partition begins anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class ImageBatch:
    """Rows `start … start + B - 1`: images (B, 3, H, W) uint8, black where `failures` says why."""

    start: int
    images: Tensor
    failures: dict[int, str]

    def pin_memory(self) -> ImageBatch:
        """Called by the DataLoader where the images go to a GPU."""
        return ImageBatch(self.start, self.images.pin_memory(), self.failures)


class Images(Protocol):
    """Images by number: a source, or what stands in its place."""

    def __len__(self) -> int: ...

    def open(self, index: int, /) -> Image.Image:
        """One image, RGB. Raises ImageError."""


class _Rows(Dataset[tuple[int, Tensor | ImageError]]):
    def __init__(self, source: Images, transform: Callable[[Image.Image], Tensor]) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> tuple[int, Tensor | ImageError]:
        try:
            return row, self.transform(self.source.open(row))
        except ImageError as error:  # raised, or counted as skipped, by the process that knows
            return row, error


class _Collate:
    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, items: list[tuple[int, Any]]) -> ImageBatch:
        failures = {row: str(item) for row, item in items if isinstance(item, ImageError)}
        blank = torch.zeros(3, *self.size, dtype=torch.uint8)
        images = torch.stack([blank if row in failures else item for row, item in items])
        assert images.dtype == torch.uint8
        return ImageBatch(items[0][0], images, failures)


def image_batches(
    source: Images,
    transform: Callable[[Image.Image], Tensor],
    size: tuple[int, int],
    *,
    pending: Sequence[range],
    batch_size: int,
    starts: Sequence[int] = (0,),
    workers: int,
    pin_memory: bool = False,
) -> Iterator[ImageBatch]:
    """Every batch that holds a pending row, in order of rows; `transform` makes pixels, `size` is
    (H, W). The partition begins anew at each of `starts`."""
    bounds = [*starts, len(source)]
    partition = [
        range(first, min(first + batch_size, end))
        for start, end in itertools.pairwise(bounds)
        for first in range(start, end, batch_size)
    ]
    wanted = {row for run in pending for row in run}
    batches = [list(batch) for batch in partition if not wanted.isdisjoint(batch)]
    loader = DataLoader(
        _Rows(source, transform),
        batch_sampler=batches,
        num_workers=min(workers, len(batches)),
        collate_fn=_Collate(size),
        pin_memory=pin_memory,
        prefetch_factor=2 if workers and batches else None,
    )
    yield from loader
