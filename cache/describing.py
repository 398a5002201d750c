"""Inspect a cache: what it is and how far it has come, without reading its data."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cache.labelling import IGNORED, Target
from cache.ledger import Error, add_errors
from cache.location import Where
from cache.reader import Reader

_MASKS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What is known of a cache; `content` is None while rows are missing.

    format, format_version: `zarr` or `h5`, and the version that it was written in.
    slots: places of features, those that no row has any more among them; slots_pending: those that
        an extraction or an update has not filled yet. bytes: of all slots, once filled.
    splits: number of rows in each; folds, too, where there are. groups: number of groups in each
        group column. labelling: its digest.
    targets: per target, the number of rows (of a segmentation: pixels) of each class; of a
        regression, the `rows` with a value and their `min`, `mean` and `max` (None without any).
    kinds: what each target is.
    seconds: wall time that the finished shards took, over all legs; None where it is not known.
    error: per stack, what rounding to the storage type lost where it was measured: `relative`, the
        norm of all errors over the norm of the values, and `worst_token`, the same of the token
        where it is largest. Empty when nothing was measured.
    """

    location: str
    format: str
    format_version: int
    rows: int
    rows_done: int
    slots: int
    slots_pending: int
    bytes: int
    complete: bool
    fingerprint: str
    content: str | None
    labelling: str
    identity: dict[str, Any]
    storage: str
    views: int
    slots_per_shard: int
    stacks: list[dict[str, Any]]
    splits: dict[str, int]
    targets: dict[str, dict[str, int | float | None]]
    kinds: dict[str, str]
    folds: list[int]
    groups: dict[str, int]
    skipped: dict[int, str]
    seconds: float | None
    error: dict[str, dict[str, float]]
    notes: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {**vars(self), "skipped": {str(row): why for row, why in self.skipped.items()}}


def inspect(location: Where) -> Inspection:
    """Describe the cache at a location, finished or not.

    Raises: LocationError, CacheNotFound, CacheDamaged, FormatVersionError.
    """
    with Reader(location, allow_incomplete=True) as reader:
        manifest, labelling = reader.manifest, reader.labelling
        folds = reader.folds if labelling.folds else np.zeros(0, np.int16)
        return Inspection(
            location=str(location),
            format=reader.container.suffix.removeprefix("."),
            format_version=reader.container.format_version,
            rows=reader.rows,
            rows_done=reader.rows_done,
            slots=manifest.slots,
            slots_pending=reader.slots_pending,
            bytes=manifest.nbytes,
            complete=reader.complete,
            fingerprint=manifest.fingerprint,
            content=reader.content if reader.complete else None,
            labelling=reader.labelling_digest,
            identity=dict(manifest.identity),
            storage=manifest.storage,
            views=manifest.views,
            slots_per_shard=manifest.slots_per_shard,
            stacks=manifest.to_dict()["stacks"],
            splits=_counts(reader.split, labelling.splits) if labelling.splits else {},
            targets={target.name: _described(target, reader) for target in labelling.targets},
            kinds={target.name: target.kind for target in labelling.targets},
            folds=np.bincount(folds[folds >= 0], minlength=labelling.folds).tolist(),
            groups={name: len(set(reader.groups(name))) for name in labelling.groups},
            skipped=reader.skipped,
            seconds=reader.seconds,
            error={stack: _relative(add_errors(parts)) for stack, parts in reader.errors.items()},
            notes=dict(manifest.notes),
        )


def _relative(error: Error) -> dict[str, float]:
    squares, exact, worst = error
    return {"relative": math.sqrt(squares / exact) if exact else 0.0, "worst_token": worst}


def _described(target: Target, reader: Reader) -> dict[str, int | float | None]:
    if target.kind == "segmentation":
        return _pixels(target, reader)
    labels = reader.labels(target.name)
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


def _pixels(target: Target, reader: Reader) -> dict[str, int | float | None]:
    """Pixels of each class; the masks of some rows at a time, all may be larger than the memory."""
    pixels = np.zeros(IGNORED + 1, np.int64)
    for first in range(0, reader.rows, _MASKS_AT_ONCE):
        rows = range(first, min(reader.rows, first + _MASKS_AT_ONCE))
        masks = reader.labels(target.name, rows)
        pixels += np.bincount(masks.reshape(-1), minlength=IGNORED + 1)
    return {name: int(pixels[index]) for index, name in enumerate(target.classes)}


def _counts(indices: np.ndarray, names: tuple[str, ...]) -> dict[str, int]:
    counts = np.bincount(indices[indices >= 0], minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True)}
