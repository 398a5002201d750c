"""Tables of rows, CSV or TSV with a header: what a list says of each row.

    path      a file, relative to the table's folder; where no file is opened, `key` may stand in
              its place: a row's name in a cache
    label     a class; or, for several targets, any of `label:NAME` (a class), `labels:NAME` (any
              number of classes, `cat;indoors`; `-` where none applies) and `value:NAME` (a number).
              An empty cell of these: this row has no label for this target
    split     train, val, test, or any other name
    others    are kept as text, by their titles

`read_table` reads a list and opens none of its files; `open_table` makes a source of it. Every
complaint names the line. What this file does not know: images, caches.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import SourceError, some
from pipeline.sources.source import FileSource, Row, TargetColumn
from pipeline.sources.splits import normal_split, select_splits
from pipeline.tasks import KINDS

COMMA = (",", "comma")
SEPARATORS = {".csv": COMMA, ".tsv": ("\t", "tab")}  # by the file's suffix
TARGET_NAME = re.compile(r"[a-z][a-z0-9_]*")  # as in a cache

Classes = Mapping[str, tuple[str, ...]]  # target → its classes, where they are given


# ---- what a list says ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class TableRows:
    """What a list says of its N rows, in its own order; no row occurs twice.

    folder: what relative paths are relative to.
    names: the cell `path` or `key` of each row, as it is written.
    keys: each row as a cache names it: a path is relative to `folder` if it lies inside.
    places: each row as messages name it: "list.csv, line 3".
    splits: that of each row; None where no column says.
    targets: one for each label column.
    others: title → N texts, for each further column (a title that occurs twice is left out).
    """

    description: str
    folder: Path
    names: tuple[str, ...]
    keys: tuple[str, ...]
    places: tuple[str, ...]
    splits: tuple[str, ...] | None
    targets: tuple[TargetColumn, ...]
    others: Mapping[str, tuple[str, ...]]

    def column(self, title: str) -> tuple[str, ...]:
        """The N texts of a further column. Raises SourceError listing those there are."""
        if title not in self.others:
            there = some(list(self.others), 10)
            raise SourceError(
                f"{self.description}: expected one column {title!r}; beside the row's name, split "
                f"and labels there is {there}"
            )
        return self.others[title]


class Column(NamedTuple):
    """A column that holds a target."""

    title: str  # "label:species", or "label" alone
    name: str
    kind: str


class Line(NamedTuple):
    """One row of a list, its cells not yet understood."""

    name: str
    cells: tuple[str, ...]  # one for each target column
    split: str | None
    place: str
    others: tuple[str, ...] = ()


LABEL = Column("label", "label", "class")


def table_rows(
    lines: Sequence[Line],
    columns: Sequence[Column],
    *,
    description: str,
    folder: Path,
    classes: Classes,
    by_key: bool = False,
    titles: Sequence[str] = (),
) -> TableRows:
    """Understand the lines: target columns, keys, further columns called `titles`.

    `by_key`: a line's name is a key already, no path. Raises SourceError, with the line, for cells
    that are no labels and for a row that is listed twice.
    """
    targets = tuple(
        _target(column, number, lines, classes.get(column.name) or None)
        for number, column in enumerate(columns)
    )
    place_of: dict[str, str] = {}
    root = folder.absolute()
    for line in lines:
        same = line.name if by_key else os.path.normpath(root / line.name)
        if same in place_of:
            raise SourceError(
                f"{line.place}: {line.name} is listed already: {place_of[same]}; keep one"
            )
        place_of[same] = line.place
    splits = tuple(line.split for line in lines if line.split is not None)
    return TableRows(
        description=description,
        folder=folder,
        names=tuple(line.name for line in lines),
        keys=tuple(line.name if by_key else _key(line.name, root) for line in lines),
        places=tuple(line.place for line in lines),
        splits=splits if len(splits) == len(lines) else None,
        targets=targets,
        others={
            title: tuple(line.others[number] for line in lines)
            for number, title in enumerate(titles)
            if titles.count(title) == 1
        },
    )


def _key(path: str, root: Path) -> str:
    """Relative to the root, so that data can move; absolute only if listed so and outside."""
    if Path(path).is_absolute() and Path(path).is_relative_to(root):
        path = str(Path(path).relative_to(root))
    return Path(os.path.normpath(path)).as_posix()


def listed_files(table: TableRows, wanted: tuple[str, ...] | None) -> FileSource:
    """The files that a list names, of the `wanted` splits; without a column they are all "train".

    Raises SourceError for a split that is not there and for files that are missing.
    """
    splits = table.splits or ("train",) * len(table.names)
    kept = select_splits(splits, wanted, table.description)
    numbers = [number for number, split in enumerate(splits) if split in kept]
    paths = [os.path.normpath(table.folder / table.names[number]) for number in numbers]
    missing = [
        f"{table.names[number]} ({table.places[number]})"
        for number, path in zip(numbers, paths, strict=True)
        if not Path(path).is_file()
    ]
    if missing:
        raise SourceError(
            f"{table.description}: {len(missing)} of {len(numbers)} files are missing: "
            f"{some(missing)}; paths are relative to {table.folder.absolute()}"
        )
    return FileSource(
        rows=[Row(key=table.keys[number], split=splits[number]) for number in numbers],
        targets=tuple(target.take(numbers) for target in table.targets),
        description=table.description,
        paths=paths,
    )


# ---- CSV and TSV ---------------------------------------------------------------------------------


def read_table(path: str | Path, *, classes: Classes | None = None) -> TableRows:
    """What a .csv or .tsv says of rows, by `key` or else by `path`; labels may be left out.

    `classes` are those of a cache, by target: labels are then numbered by them, others refused.
    Raises SourceError, with the line, for a file, a header or a cell that is not as expected.
    """
    return _read(Path(path), classes or {}, files=False)


def open_table(path: Path, splits: tuple[str, ...] | None, classes: Classes) -> FileSource:
    """The files that a .csv or .tsv lists by `path`, with one target or several; see read_table."""
    return listed_files(_read(path, classes, files=True), splits)


def _read(path: Path, classes: Classes, *, files: bool) -> TableRows:
    try:
        file = path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
    separator, _ = SEPARATORS.get(path.suffix.lower(), COMMA)
    with file:
        rows = csv.reader(file, delimiter=separator, strict=True)
        try:
            header = _Header.read(path, [title.strip() for title in next(rows, [])], files)
            lines = [header.line(cells, f"{path}, line {rows.line_num}") for cells in rows if cells]
        except csv.Error as error:
            raise SourceError(f"{path}, line {rows.line_num}: not a CSV line: {error}") from error
        except UnicodeDecodeError as error:
            raise SourceError(
                f"{path}: not UTF-8 (byte {error.start} of a block read after line "
                f"{rows.line_num}); save it as UTF-8"
            ) from error
    return table_rows(
        lines,
        header.columns,
        description=f"{(path.suffix[1:] or 'CSV').upper()} file {path}",
        folder=path.parent,
        classes=classes,
        by_key=header.name == "key",
        titles=header.others,
    )


@dataclass(frozen=True)
class _Header:
    """The first line, understood: `titles` of all columns, `name` of the one that names rows."""

    titles: list[str]
    name: str
    columns: list[Column]
    others: list[str]
    separator: str  # its word: "comma"

    @classmethod
    def read(cls, path: Path, titles: list[str], files: bool) -> _Header:
        """`files`: rows are named by `path` and have a label. SourceError if it is not so."""
        place, separator = f"{path}, line 1", SEPARATORS.get(path.suffix.lower(), COMMA)[1]
        columns = _target_columns(titles, place)
        name = "key" if "key" in titles and not files else "path"
        needed = [name] if columns or not files else [name, "label"]
        wrong = [title for title in needed if titles.count(title) != 1]
        wrong += [title for title in ("label", "split") if titles.count(title) > 1]
        if wrong:
            wanted = "path' or 'key" if wrong[0] == "path" and not files else wrong[0]
            raise SourceError(
                f"{place}: expected the header path,label[,split] with one column '{wanted}', "
                f"separated by {separator}s (in place of label, for other targets: label:NAME, "
                f"labels:NAME, value:NAME); found {','.join(titles) or 'nothing'}"
            )
        columns = columns or [LABEL] * titles.count("label")
        used = {name, "split", *(column.title for column in columns)}
        return cls(titles, name, columns, [t for t in titles if t not in used], separator)

    def line(self, cells: list[str], place: str) -> Line:
        """One row; SourceError for cells too many or too few, or an empty one that may not be."""
        if len(cells) != len(self.titles):
            raise SourceError(
                f"{place}: {len(cells)} fields, the header has {len(self.titles)}; quote a field "
                f"that holds a {self.separator}"
            )
        texts = [text.strip() for text in cells]
        cell = dict(zip(self.titles, texts, strict=True))
        empty = [title for title in (self.name, "label", "split") if cell.get(title) == ""]
        if empty:
            raise SourceError(f"{place}: {empty[0]} is empty")
        return Line(
            name=cell[self.name],
            cells=tuple(cell[column.title] for column in self.columns),
            split=normal_split(cell["split"]) if "split" in cell else None,
            place=place,
            others=tuple(cell[title] for title in self.others),
        )


def _target_columns(titles: list[str], place: str) -> list[Column]:
    """The columns with a name of their own, in order. SourceError if one is not as expected."""
    columns: list[Column] = []
    kinds = {task.column: kind for kind, task in KINDS.items()}
    meant = {prefix.rstrip("s") for prefix in kinds}
    for title in titles:
        prefix, colon, name = title.partition(":")
        if not colon or prefix.strip().casefold().rstrip("s") not in meant:
            continue
        if prefix not in kinds:
            *others, last = (f"{task.column}:NAME ({task.cell})" for task in KINDS.values())
            raise SourceError(f"{place}: column {title!r}; expected {', '.join(others)} or {last}")
        if not TARGET_NAME.fullmatch(name):
            raise SourceError(
                f"{place}: column {title!r}: expected a name of lower-case letters, digits and _ "
                f"that begins with a letter, such as {prefix}:sea_level"
            )
        if name in [column.name for column in columns]:
            raise SourceError(f"{place}: two columns for the target {name!r}; rename one of them")
        columns.append(Column(title, name, kinds[prefix]))
    if columns and "label" in titles:
        raise SourceError(
            f"{place}: a column 'label' beside {some([column.title for column in columns])}; "
            "give it a name too, such as label:species"
        )
    return columns


def _target(
    column: Column, number: int, lines: Sequence[Line], known: tuple[str, ...] | None
) -> TargetColumn:
    """The target that a column holds; `known` are its classes where they are given."""
    cells = [line.cells[number] for line in lines]
    if cells and not any(cells):
        raise SourceError(
            f"{lines[0].place} to the end: {column.title} is empty; fill it, or remove the column"
        )

    def where(row: int) -> str:
        place = lines[row].place
        return place if column is LABEL else f"{place}, {column.title}"

    classes, values = KINDS[column.kind].parse(cells, known, where)
    return TargetColumn(name=column.name, kind=column.kind, classes=classes, values=values)
