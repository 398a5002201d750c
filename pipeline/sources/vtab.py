"""A VTAB-1K task folder as a source: a list a split, lines `path label`.

NOAH's layout (https://github.com/ZhangYuanhan-AI/NOAH). train800val200.txt is train and val
together: checked, not loaded again; where it stands without those two, it is "train". NOAH's own
script writes it with copies of the images, in images/train800val200/. Names of classes, one a line,
may stand in classes.txt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import SourceError
from pipeline.sources.source import FileSource
from pipeline.sources.tables import LABEL, Line, listed_files, table_rows
from pipeline.tasks.classes import is_integer

LISTS = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
UNION = "train800val200.txt"


def is_vtab(folder: Path) -> bool:
    """Whether a folder holds a list of training or validation images."""
    return any((folder / name).is_file() for name in (LISTS["train"], LISTS["val"], UNION))


def open_vtab(
    root: Path, splits: tuple[str, ...] | None, classes: tuple[str, ...] | None
) -> FileSource:
    """The images that the lists in `root` name; `classes` number the labels where they are given.

    Raises SourceError, with the line, for what is no `path label`, a label without a class, a file
    that is missing or listed twice, and a union that is none.
    """
    lists = {split: name for split, name in LISTS.items() if (root / name).is_file()}
    union = root / UNION
    if union.is_file() and not lists.keys() & {"train", "val"}:
        lists = {"train": UNION} | lists
    lines = [line for split, name in lists.items() for line in _read(root / name, split)]
    if union.is_file() and lists["train"] != UNION:
        _check_union(union, lines)
    names_file = root / "classes.txt"
    if names_file.is_file():
        names = tuple(_texts(names_file))
        lines = [_named(line, names, names_file) for line in lines]
        classes = classes or names
    table = table_rows(
        lines,
        [LABEL],
        description=f"VTAB-1K task folder {root}",
        folder=root,
        classes={LABEL.name: classes} if classes else {},
    )
    return listed_files(table, splits)


def _read(path: Path, split: str) -> Iterator[Line]:
    for number, text in enumerate(_texts(path), start=1):
        if not text:
            continue
        place = f"{path}, line {number}"
        fields = text.rsplit(maxsplit=1)
        if len(fields) != 2 or not is_integer(fields[1]):
            raise SourceError(f"{place}: expected `path label`, the label an integer; found {text}")
        yield Line(fields[0], (fields[1],), split, place)


def _check_union(union: Path, lines: list[Line]) -> None:
    """By path and label; where the union has copies of its own, by how often each label occurs."""
    split = [line for line in lines if line.split in ("train", "val")]
    together = list(_read(union, "train"))
    if {line.name for line in split}.isdisjoint(line.name for line in together):
        both, listed = _counted(split), _counted(together)
    else:
        both = {f"{line.name} {line.cells[0]}" for line in split}
        listed = {f"{line.name} {line.cells[0]}" for line in together}
    if both != listed:
        raise SourceError(
            f"{union}: not the union of {LISTS['train']} and {LISTS['val']}: "
            f"{len(listed - both)} lines are here alone, {len(both - listed)} there alone, such as "
            f"`{min(both ^ listed)}`; restore the lists, or remove this one"
        )


def _counted(lines: list[Line]) -> set[str]:
    labels = Counter(line.cells[0] for line in lines)
    return {f"label {label}, {count} times" for label, count in labels.items()}


def _named(line: Line, names: tuple[str, ...], file: Path) -> Line:
    number = int(line.cells[0])
    if not 0 <= number < len(names):
        raise SourceError(f"{line.place}: label {number}, but {file} has {len(names)} names")
    return line._replace(cells=(names[number],))


def _texts(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
