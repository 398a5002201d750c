"""Decoding in worker processes: rows of a source → batches of pixels, in order.

Pixels are bytes: batches wait in shared memory, of which a container has 64 MB, and travel to the
device, where they are normalised.

Batches are a fixed partition of the rows (batch b holds rows b*size … (b+1)*size - 1), whatever is
still to be done: a resumed extraction therefore multiplies the same matrices as an uninterrupted
one and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.errors import ImageError
from pipeline.sources.source import Source


@dataclass(frozen=True)
class ImageBatch:
    """Rows `start … start + B - 1`: images (B, 3, H, W) uint8, black where `failures` says why."""

    start: int
    images: Tensor
    failures: dict[int, str]

    def pin_memory(self) -> ImageBatch:
        """Called by the DataLoader where the images go to a GPU."""
        return ImageBatch(self.start, self.images.pin_memory(), self.failures)


class _Rows(Dataset[tuple[int, Tensor | ImageError]]):
    def __init__(self, source: Source, transform: Callable[[Image.Image], Tensor]) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source.rows)

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
    source: Source,
    transform: Callable[[Image.Image], Tensor],
    size: tuple[int, int],
    *,
    pending: Sequence[range],
    batch_size: int,
    workers: int,
    pin_memory: bool = False,
) -> Iterator[ImageBatch]:
    """Every batch that holds a pending row, in order of rows; `transform` makes pixels, `size` is
    (H, W)."""
    rows = len(source.rows)
    touched = {row // batch_size for run in pending for row in run}
    batches = [
        list(range(batch * batch_size, min((batch + 1) * batch_size, rows)))
        for batch in sorted(touched)
    ]
    loader = DataLoader(
        _Rows(source, transform),
        batch_sampler=batches,
        num_workers=min(workers, len(batches)),
        collate_fn=_Collate(size),
        pin_memory=pin_memory,
        prefetch_factor=2 if workers and batches else None,
    )
    yield from loader
