"""What a data set lists, one sample a row, and the rows and the target that are made of it.

Shared by tars and timm's data sets, which have one class a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from pipeline.errors import SourceError
from pipeline.sources.source import Row, TargetColumn
from pipeline.tasks.classes import number_labels


class Sample(NamedTuple):
    """One row; `label` is the name of a class, or its number."""

    key: str
    label: str
    split: str
    place: Any  # whatever the source needs to find the image


def rows_and_target(
    samples: Sequence[Sample],
    names: tuple[str, ...] | None,
    classes: tuple[str, ...] | None,
    what: str,
) -> tuple[list[Row], tuple[TargetColumn]]:
    """N rows, and the target "label" of N values.

    `names` are the data set's own class names, where it has any; else labels are numbers. `classes`
    number the labels in their place where they are given: SourceError for others.
    """
    known, values = number_labels(
        [sample.label for sample in samples],
        classes or names,
        integers=names is None,
        where=lambda position: f"{what}, {samples[position].key}",
    )
    target = TargetColumn(name="label", kind="class", classes=known, values=values)
    return [Row(key=sample.key, split=sample.split) for sample in samples], (target,)


def names_in_order(class_to_idx: dict[str, int]) -> tuple[str, ...] | None:
    """Class names in the order of their numbers; None where there are none."""
    return tuple(sorted(class_to_idx, key=class_to_idx.__getitem__)) or None


def union(names: tuple[str, ...] | None, more: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Class names over splits: in the data set's order, or sorted where splits differ."""
    if names is None or more is None or names == more:
        return more or names
    return tuple(sorted({*names, *more}))


def label_text(label: Any, names: tuple[str, ...] | None) -> str:
    """A label as text: the name of class number `label` where there are names; -1 for None."""
    if isinstance(label, str):
        return label
    number = -1 if label is None else int(label)
    return names[number] if names is not None and 0 <= number < len(names) else str(number)


@contextmanager
def as_source_error(what: str) -> Iterator[None]:
    """timm, datasets, tensorflow and torchvision raise anything; say what was being opened."""
    try:
        yield
    except (SourceError, MemoryError):
        raise
    except Exception as error:
        raise SourceError(f"{what}: {type(error).__name__}: {error}") from error
