"""Inspect a cache: what it is and how far it has come, without reading its data."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache.ledger import Error, add_errors
from cache.manifest import Target
from cache.reader import Reader


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What is known of a cache; `content` is None while rows are missing.

    bytes: of all rows, once complete. splits: number of rows in each.
    targets: per target, the number of rows of each class; of a regression, the `rows` with a value
        and their `min`, `mean` and `max` (None where no row has one). kinds: what each target is.
    seconds: wall time that the finished shards took, over all legs; None where it is not known.
    error: per stack, what rounding to the storage type lost where it was measured: `relative`, the
        norm of all errors over the norm of the values, and `worst_token`, the same of the token
        where it is largest. Empty when nothing was measured.
    """

    location: str
    format: str
    rows: int
    rows_done: int
    bytes: int
    complete: bool
    fingerprint: str
    content: str | None
    identity: dict[str, Any]
    storage: str
    views: int
    rows_per_shard: int
    stacks: list[dict[str, Any]]
    splits: dict[str, int]
    targets: dict[str, dict[str, int | float | None]]
    kinds: dict[str, str]
    skipped: dict[int, str]
    seconds: float | None
    error: dict[str, dict[str, float]]
    notes: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {**vars(self), "skipped": {str(row): why for row, why in self.skipped.items()}}


def inspect(location: str | Path) -> Inspection:
    """Describe the cache at a location, finished or not.

    Raises: LocationError, CacheNotFound, CacheDamaged, FormatVersionError.
    """
    with Reader(location, allow_incomplete=True) as reader:
        manifest = reader.manifest
        return Inspection(
            location=str(location),
            format=reader.backend.suffix.removeprefix("."),
            rows=manifest.rows,
            rows_done=reader.rows_done,
            bytes=manifest.nbytes,
            complete=reader.complete,
            fingerprint=manifest.fingerprint,
            content=reader.content if reader.complete else None,
            identity=dict(manifest.identity),
            storage=manifest.storage,
            views=manifest.views,
            rows_per_shard=manifest.rows_per_shard,
            stacks=manifest.to_dict()["stacks"],
            splits=_counts(reader.table("split"), manifest.splits) if manifest.splits else {},
            targets={
                target.name: _described(target, reader.labels(target.name))
                for target in manifest.targets
            },
            kinds={target.name: target.kind for target in manifest.targets},
            skipped=reader.skipped,
            seconds=reader.seconds,
            error={stack: _relative(add_errors(parts)) for stack, parts in reader.errors.items()},
            notes=dict(manifest.notes),
        )


def _relative(error: Error) -> dict[str, float]:
    squares, exact, worst = error
    return {"relative": math.sqrt(squares / exact) if exact else 0.0, "worst_token": worst}


def _described(target: Target, labels: np.ndarray) -> dict[str, int | float | None]:
    match target.kind:
        case "class":
            return {**_counts(labels, target.classes)}
        case "multilabel":
            counts = (labels == 1).sum(axis=0).tolist()
            return dict(zip(target.classes, counts, strict=True))
        case _:
            known = labels[~np.isnan(labels)].astype(np.float64)
            if not len(known):
                return {"rows": 0, "min": None, "mean": None, "max": None}
            least, mean, most = float(known.min()), float(known.mean()), float(known.max())
            return {"rows": len(known), "min": least, "mean": mean, "max": most}


def _counts(indices: np.ndarray, names: tuple[str, ...]) -> dict[str, int]:
    counts = np.bincount(indices[indices >= 0], minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True)}
