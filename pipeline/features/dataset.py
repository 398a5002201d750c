"""A cache for people who write their own training loop: rows as numpy, splits as torch datasets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cache import Reader, decode
from pipeline.errors import MissingTaps

Rows = Sequence[int] | np.ndarray | range


class Features:
    """A complete cache, read row by row; a context manager. `reader` is the `cache.Reader` below.

    May be pickled, forked and used by threads. Raises cache errors when it is made.
    """

    def __init__(self, location: str | Path) -> None:
        self.reader = Reader(location)
        self._place = {
            tap: (stack.name, position)
            for stack in self.reader.manifest.stacks
            for position, tap in enumerate(stack.taps)
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self.reader.rows

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        self.reader.close()

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of all taps, in the backbone's order."""
        return tuple(self._place)

    @property
    def keys(self) -> list[str]:
        """One name per row."""
        return self.reader.keys

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of the first target; () without targets or classes."""
        targets = self.reader.labelling.targets
        return targets[0].classes if targets else ()

    def labels(self, target: str | None = None) -> np.ndarray:
        """What is to be predicted for every row, as `cache.Target` says; None: the first target."""
        return self.reader.labels(target)

    def rows(self, *splits: str) -> np.ndarray:
        """Row numbers of the splits, int64, unreadable images left out; of none named: all."""
        return self.reader.split_rows(*splits)

    def read(self, rows: Rows, *, stack: str | None = None) -> np.ndarray:
        """(n, taps, tokens, dim) float32 of one stack, rows in the order given; None: the first."""
        name = stack or self.reader.manifest.stacks[0].name
        return decode(self.reader.read(rows, stack=name), self.reader.manifest.storage)

    def tap(self, name: str, rows: Rows) -> np.ndarray:
        """(n, tokens, dim) float32 of one tap. Raises MissingTaps listing those there are."""
        if name not in self._place:
            raise MissingTaps(f"no tap {name!r} in {self.reader.location}: {', '.join(self.taps)}")
        stack, position = self._place[name]
        part = slice(position, position + 1)
        stored = self.reader.read(rows, stack=stack, taps=part)
        return decode(stored, self.reader.manifest.storage)[:, 0]

    def dataset(
        self, *splits: str, taps: Sequence[str] | None = None, target: str | None = None
    ) -> TokenDataset:
        """The rows of some splits for a `DataLoader`; all taps unless some are named.

        Raises NameMissing for a split or target, MissingTaps for a tap that is not there.
        """
        return TokenDataset(self, self.rows(*splits), tuple(taps or self.taps), target)


class TokenDataset(Dataset[tuple[dict[str, Tensor], Tensor]]):
    """Rows of a cache: ({tap: (tokens, dim) float32}, label), the label as `cache.Target` says.

    A cache without targets gives the row number in place of a label.
    """

    def __init__(
        self, features: Features, rows: np.ndarray, taps: tuple[str, ...], target: str | None
    ) -> None:
        for tap in taps:
            features.tap(tap, rows[:0])  # raises if it is not there
        self.features, self.rows, self.taps = features, rows, taps
        has_any = bool(features.reader.labelling.targets)
        self.labels: Any = features.labels(target)[rows] if target or has_any else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = [int(self.rows[index])]
        tokens = {tap: torch.from_numpy(self.features.tap(tap, row)[0]) for tap in self.taps}
        return tokens, torch.as_tensor(self.labels[index])
