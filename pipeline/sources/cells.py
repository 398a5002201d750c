"""The cells of label columns, one function a kind of target: texts → classes and values.

Pure: N texts in, arrays of N out; `where(i)` names the place of text i in complaints. Labels that
are no cells (names of folders, what data sets list) are numbered by the same `number_labels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from pipeline.errors import SourceError, some

NO_NAME = "-"  # in a cell of several labels: known, and none applies

Where = Callable[[int], str]  # the number of a text → its place, as messages name it
Parsed = tuple[tuple[str, ...], np.ndarray]  # the classes, and a value or row of values a cell


def class_cells(cells: Sequence[str], known: tuple[str, ...] | None, where: Where) -> Parsed:
    """Names or numbers of classes, "" or "-1" where unknown → int64 (N,), -1 where unknown."""
    return number_labels([cell or "-1" for cell in cells], known, where=where)


def multilabel_cells(cells: Sequence[str], known: tuple[str, ...] | None, where: Where) -> Parsed:
    """Names separated by `;`, `-` for none of them, "" where unknown → int8 (N, C), -1 throughout
    where unknown. Each name counts as a label of its own does in a class target."""
    rows: list[int] = []
    names: list[str] = []
    for row, cell in enumerate(cells):
        if cell in ("", NO_NAME):
            continue
        parts = [part.strip() for part in cell.split(";")]
        if not {"", NO_NAME, "-1"}.isdisjoint(parts):
            raise SourceError(
                f"{where(row)}: expected names separated by `;` (or `{NO_NAME}` alone where none "
                f"applies, or nothing where that is not known), found {cell!r}"
            )
        rows += [row] * len(parts)
        names += parts
    classes, numbers = number_labels(names, known, where=lambda name: where(rows[name]))
    if cells and not classes:
        raise SourceError(f"{where(0)} and all after it: no name; remove the column")
    values = np.zeros((len(cells), len(classes)), np.int8)
    values[np.array([not cell for cell in cells], bool)] = -1
    values[np.array(rows, np.int64), numbers] = 1
    return classes, values


def regression_cells(cells: Sequence[str], known: tuple[str, ...] | None, where: Where) -> Parsed:
    """Finite numbers, "" where unknown → float32 (N,), NaN where unknown; there are no classes."""
    values = np.full(len(cells), np.nan, np.float32)
    for row, cell in enumerate(cells):
        if not cell:
            continue
        try:
            number = float(cell)
        except ValueError:
            number = math.nan
        if not abs(number) <= float(np.finfo(np.float32).max):
            raise SourceError(
                f"{where(row)}: expected a finite number in float32's range, such as -1.5 (or "
                f"nothing where it is not known), found {cell!r}"
            )
        values[row] = number
    return (), values


CELLS = {"class": class_cells, "multilabel": multilabel_cells, "regression": regression_cells}


def number_labels(
    labels: Sequence[str],
    known: tuple[str, ...] | None,
    *,
    where: Where,
    integers: bool = True,
) -> Parsed:
    """Label texts → the classes they count by, and class numbers, int64 (N,), -1 where unknown.

    With `known` classes, a label is a class name, or, if `integers` and no class is itself named by
    a number, a class number. Without, labels that are all integers are numbers in "0" … "C-1", and
    others are names, sorted. -1 is an unknown label. Raises SourceError, with the place of the
    label, for one that is none of the known.
    """
    classes = known
    if classes is None:
        if not (integers and all(map(is_integer, labels))):
            classes = tuple(sorted(set(labels) - {"-1"}))
            integers = False
        else:
            highest = max(map(int, labels), default=-1)
            classes = tuple(str(number) for number in range(highest + 1))
    number_of = {name: number for number, name in enumerate(classes)}
    number_of.setdefault("-1", -1)
    if integers and not any(map(is_integer, classes)):
        number_of |= {str(number): number for number in range(len(classes))}
    for position, label in enumerate(labels):
        if label not in number_of:
            raise SourceError(
                f"{where(position)}: the label {label!r} is none of the {len(classes)} known "
                f"classes: {some(classes, 10)}"
            )
    return classes, np.array([number_of[label] for label in labels], np.int64)


def is_integer(text: str) -> bool:
    """-1, 0, 1, … as Python prints them: 007 and 1.0 are names."""
    return text == "-1" or (text.isascii() and text.isdigit() and str(int(text)) == text)
