"""Splits by name: what folders and columns call them, what they are called here, their order."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.errors import SourceError, some

SPLIT_NAMES = {  # folder or CSV value, in any case → the split's name here
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
MOST_SPLITS = 256  # a cache keeps a row's split in one byte
SPLIT_ORDER = ("train", "val", "test")


def normal_split(name: str) -> str:
    """`validation`, `Training`, … → the names used here; other names stay as they are."""
    return SPLIT_NAMES.get(name.casefold(), name)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Each once, in order of appearance, but train, val and test first."""
    seen = dict.fromkeys(names)
    return (*(n for n in SPLIT_ORDER if n in seen), *(n for n in seen if n not in SPLIT_ORDER))


def select_splits(
    present: Iterable[str], wanted: tuple[str, ...] | None, where: str
) -> tuple[str, ...]:
    """The splits to keep, in order; all that are `present` where `wanted` is None.

    Raises SourceError, which begins with `where` and lists what is there, if a wanted one is not.
    """
    there = in_order(present)
    if wanted is None:
        return there
    kept = {normal_split(name) for name in wanted}
    unknown = sorted(kept - set(there))
    if unknown:
        raise SourceError(f"{where}: no split {some(unknown)}; there is {some(there)}")
    return tuple(name for name in there if name in kept)
