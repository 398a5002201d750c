"""Opening a source of images: what is there decides how it is read.

    a folder     class folders, or split folders above class folders (SPLIT_NAMES)
    a .csv       header `path,label[,split]`; paths relative to the file; rows in file order.
                 Several targets: in place of `label` any of `label:NAME` (a class), `labels:NAME`
                 (any number of classes, `cat;indoors`; `-` where none applies) and `value:NAME`
                 (a number). An empty cell there: this row has no label for this target
    a VTAB-1K    task folder in the NOAH layout: train800.txt, val200.txt, test.txt, …
    a .tar       of images, and timm dataset strings such as `hfds/…`: pipeline.sources.timm_sets

The idea to hold: opening a source finds every fault of the *list* (missing files, unknown labels,
empty classes) before the backbone runs; faults of one *image* come later, as ImageError, so that
`--on-error skip` can leave that row out. Rows without any split belong to "train". All kinds but
such a CSV have one target, the class "label".
"""

from __future__ import annotations

import csv
import math
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.errors import SourceError
from pipeline.sources.source import (
    SPLIT_NAMES,
    FileSource,
    Labels,
    Row,
    Source,
    images_under,
    index_labels,
    is_image,
    is_integer,
    normal_split,
    ordered,
    select_splits,
    some,
    suffixes_shown,
)

TIMM_PREFIXES = ("hfds", "hfids", "tfds", "torch", "wds")
VTAB_LISTS = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
VTAB_UNION = "train800val200.txt"
COLUMN_KINDS = {"label": "class", "labels": "multilabel", "value": "regression"}
TARGET_NAME = re.compile(r"[a-z][a-z0-9_]*")  # as in a cache
NO_NAME = "-"  # in a `labels:` column: known, and none applies


def open_source(
    images: str | Path,
    *,
    splits: tuple[str, ...] | None = None,
    classes: Mapping[str, tuple[str, ...]] | None = None,
    data_dir: str | None = None,
    input_key: str | None = None,
    target_key: str | None = None,
    download: bool = False,
) -> Source:
    """Open `images`; raise SourceError saying what was looked for and what was found.

    What is on the disk comes first: a folder `torch/cifar100` here hides timm's data set.

    splits: keep these alone. For timm dataset strings: the names to ask timm for, or `name=what`
        to ask for something else under a name of ours (`val=train[800:]`); ("train",) if None.
    classes: those of another cache, by target; its labels are then numbered by them, and others
        refused.
    data_dir, input_key, target_key, download: timm's `--data-dir`, `--input-key`, `--target-key`,
        `--dataset-download`; for timm dataset strings only.
    """
    path, text = Path(images), str(images)
    of_label = (classes or {}).get("label")
    if not path.exists() and text.partition("/")[0].lower() in TIMM_PREFIXES and "/" in text:
        from pipeline.sources.timm_sets import TimmOptions, open_timm

        options = TimmOptions(data_dir, input_key, target_key, download)
        return open_timm(text, splits=splits or ("train",), classes=of_label, options=options)
    if data_dir or input_key or target_key or download:
        raise SourceError(
            f"{text}: --data-dir, --input-key, --target-key and --dataset-download belong to timm "
            f"dataset strings ({', '.join(f'{prefix}/…' for prefix in TIMM_PREFIXES)}); leave them "
            "out, as this is none"
        )
    if path.is_dir():
        names = (VTAB_LISTS["train"], VTAB_LISTS["val"], VTAB_UNION)
        is_vtab = any((path / name).is_file() for name in names)
        return (_open_vtab if is_vtab else _open_folder)(path, splits, of_label)
    if path.is_file() and path.suffix.lower() == ".csv":
        return _open_csv(path, splits, classes or {})
    if path.is_file() and path.suffix.lower() == ".tar":
        from pipeline.sources.timm_sets import open_tar

        return open_tar(path, splits=splits, classes=of_label)
    raise SourceError(
        f"{text}: {'a file of another kind' if path.exists() else 'nothing there'}; expected a "
        "folder with a folder per class (or train/, val/, test/ above those), a .csv with "
        "path,label[,split], a VTAB-1K task folder, a .tar of images, or a timm dataset string: "
        + ", ".join(f"{prefix}/…" for prefix in TIMM_PREFIXES)
    )


def opener(
    images: str | None,
    *,
    data_dir: str | None = None,
    input_key: str | None = None,
    target_key: str | None = None,
) -> Callable[..., Source] | None:
    """`open_source` for `images`, to be called with what is known later; None if there are none."""
    if images is not None:
        return partial(
            open_source, images, data_dir=data_dir, input_key=input_key, target_key=target_key
        )
    if data_dir or input_key or target_key:
        raise SourceError(
            "--data-dir, --input-key and --target-key say how images are opened, and there are "
            "none here: name those too, or leave them out"
        )
    return None


# ---- folders ------------------------------------------------------------------------------------


def _open_folder(
    root: Path, splits: tuple[str, ...] | None, classes: tuple[str, ...] | None
) -> Source:
    folder_of = _split_folders(root) or {"train": ""}
    classes_of = {split: _class_folders(root / name) for split, name in folder_of.items()}
    union = tuple(sorted({name for names in classes_of.values() for name in names}))
    kept = select_splits(folder_of, splits, str(root))
    folders = [(split, name) for split in kept for name in classes_of[split]]
    places = [posixpath.join(folder_of[split], name) for split, name in folders]
    target = index_labels(
        [name for _, name in folders],
        classes or union,
        integers=False,
        where=lambda position: str(root / places[position]),
    )
    rows, paths = [], []
    folder_of_row: list[int] = []
    for number, ((split, _), place) in enumerate(zip(folders, places, strict=True)):
        files = sorted(images_under(root / place))
        if not files:
            raise SourceError(
                f"{root / place}: this class folder holds no image; fill it or remove it "
                f"(looked for {suffixes_shown()})"
            )
        rows += [Row(key=f"{place}/{file}", split=split) for file in files]
        paths += [str(root / place / file) for file in files]
        folder_of_row += [number] * len(files)
    targets = (target.take(folder_of_row),)
    return FileSource(rows=rows, targets=targets, description=f"folder {root}", paths=paths)


def _split_folders(root: Path) -> dict[str, str]:
    """Split → folder name; empty where `root` holds the class folders themselves.

    A folder may be called `test` because it is a split or because it is a class: it is a split if
    such folders hold folders, a class if they hold none and others stand beside them.
    """
    folders = _folders(root)
    named = [name for name in folders if name.casefold() in SPLIT_NAMES]
    others = [name for name in folders if name not in named]
    if not any(_folders(root / name) for name in named):
        if named and not others:
            raise SourceError(f"{root / named[0]}: no class folder; expected one per class")
        return {}
    classes = [name for name in others if next(images_under(root / name), None)]
    if classes:
        raise SourceError(
            f"{root}: {some(named)} look like splits, but {some(classes)} beside them hold "
            "images too; move one kind away, or list the images in a CSV with path,label,split"
        )
    result: dict[str, str] = {}
    for name in named:
        split = normal_split(name)
        if split in result:
            raise SourceError(f"{root}: {result[split]} and {name} both mean the split {split!r}")
        result[split] = name
    return {split: result[split] for split in ordered(result)}


def _class_folders(base: Path) -> list[str]:
    names = _folders(base)
    stray = sorted(
        entry.name for entry in os.scandir(base) if is_image(entry.name) and entry.is_file()
    )
    if stray:
        raise SourceError(
            f"{base}: {len(stray)} images lie outside any class folder: {some(stray)}; move them "
            "into a folder per class, or list them in a CSV with path,label[,split]"
        )
    if not names:
        found = sorted(path.name for path in base.iterdir())
        raise SourceError(
            f"{base}: no images; expected a folder per class, or train/, val/, test/ above those, "
            f"or the lists {', '.join(VTAB_LISTS.values())}; there is {some(found)}"
        )
    return names


def _folders(path: Path) -> list[str]:
    try:
        entries = list(os.scandir(path))
    except OSError as error:
        raise SourceError(f"{path}: cannot be listed: {error.strerror}") from error
    return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


# ---- lists of files: CSV and VTAB-1K ------------------------------------------------------------


class _Column(NamedTuple):
    title: str  # "label:species", or "label" alone
    name: str
    kind: str


class _Entry(NamedTuple):
    path: str
    cells: tuple[str, ...]  # one for each column
    split: str
    place: str  # "images.csv, line 3"


LABEL = _Column("label", "label", "class")


def _open_csv(
    path: Path, splits: tuple[str, ...] | None, classes: Mapping[str, tuple[str, ...]]
) -> Source:
    columns, entries = _read_csv(path)
    targets = [
        _read_column(column, number, entries, classes.get(column.name) or None)
        for number, column in enumerate(columns)
    ]
    return _from_list(entries, targets, path.parent, splits, f"CSV file {path}")


def _read_csv(path: Path) -> tuple[list[_Column], list[_Entry]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True)
        try:
            header = [name.strip() for name in next(lines, [])]
            columns = _columns(header, f"{path}, line 1")
            entries = [
                _csv_entry(header, columns, fields, f"{path}, line {lines.line_num}")
                for fields in lines
                if fields
            ]
        except csv.Error as error:
            raise SourceError(f"{path}, line {lines.line_num}: not a CSV line: {error}") from error
        except UnicodeDecodeError as error:
            raise SourceError(
                f"{path}: not UTF-8 (byte {error.start} of a block read after line "
                f"{lines.line_num}); save it as UTF-8"
            ) from error
    return columns, entries


def _columns(header: list[str], place: str) -> list[_Column]:
    """The target columns, in order; SourceError if they or `path` are not as expected."""
    columns: list[_Column] = []
    for title in header:
        prefix, colon, name = title.partition(":")
        if not colon or prefix.strip().casefold().rstrip("s") not in ("label", "value"):
            continue
        if prefix not in COLUMN_KINDS:
            raise SourceError(
                f"{place}: column {title!r}; expected label:NAME (a class), labels:NAME (classes "
                "separated by `;`) or value:NAME (a number)"
            )
        if not TARGET_NAME.fullmatch(name):
            raise SourceError(
                f"{place}: column {title!r}: expected a name of lower-case letters, digits and _ "
                f"that begins with a letter, such as {prefix}:sea_level"
            )
        if name in [column.name for column in columns]:
            raise SourceError(f"{place}: two columns for the target {name!r}; rename one of them")
        columns.append(_Column(title, name, COLUMN_KINDS[prefix]))
    if columns and "label" in header:
        raise SourceError(
            f"{place}: a column 'label' beside {some([column.title for column in columns])}; "
            "give it a name too, such as label:species"
        )
    for needed in ("path",) if columns else ("path", "label"):
        if header.count(needed) != 1:
            raise SourceError(
                f"{place}: expected the header path,label[,split] with one column {needed!r}, "
                "separated by commas (in place of label, for other targets: label:NAME, "
                f"labels:NAME, value:NAME); found {','.join(header) or 'nothing'}"
            )
    return columns or [LABEL]


def _csv_entry(
    header: list[str], columns: Sequence[_Column], fields: list[str], place: str
) -> _Entry:
    if len(fields) != len(header):
        raise SourceError(
            f"{place}: {len(fields)} fields, the header has {len(header)}; quote a field that "
            "holds a comma"
        )
    field = dict(zip(header, (text.strip() for text in fields), strict=True))
    empty = [name for name in ("path", "label", "split") if field.get(name) == ""]
    if empty:
        raise SourceError(f"{place}: {empty[0]} is empty")
    cells = tuple(field[column.title] for column in columns)
    return _Entry(field["path"], cells, normal_split(field.get("split", "train")), place)


def _read_column(
    column: _Column, number: int, entries: list[_Entry], known: tuple[str, ...] | None
) -> Labels:
    """The target that a column holds; `known` are its classes where they are given."""
    cells = [entry.cells[number] for entry in entries]
    if cells and not any(cells):
        raise SourceError(
            f"{entries[0].place} to the end: {column.title} is empty; fill it, or remove the column"
        )

    def where(row: int) -> str:
        place = entries[row].place
        return place if column is LABEL else f"{place}, {column.title}"

    match column.kind:
        case "class":
            labels = [cell or "-1" for cell in cells]
            return index_labels(labels, known, integers=True, where=where, name=column.name)
        case "multilabel":
            return _read_names(column.name, cells, known, where)
        case _:
            return _read_numbers(column.name, cells, where)


def _read_names(
    name: str, cells: list[str], known: tuple[str, ...] | None, where: Callable[[int], str]
) -> Labels:
    """A multilabel target; each name counts as a label of its own does in a class target."""
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
    found = index_labels(
        names, known, integers=True, where=lambda position: where(rows[position]), name=name
    )
    if cells and not found.classes:
        raise SourceError(f"{where(0)} and all after it: no name; remove the column")
    values = np.zeros((len(cells), len(found.classes)), np.int8)
    values[np.array([not cell for cell in cells], bool)] = -1
    values[np.array(rows, np.int64), found.values] = 1
    return replace(found, kind="multilabel", values=values)


def _read_numbers(name: str, cells: list[str], where: Callable[[int], str]) -> Labels:
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
    return Labels(name=name, kind="regression", classes=(), values=values)


def _open_vtab(
    root: Path, splits: tuple[str, ...] | None, classes: tuple[str, ...] | None
) -> Source:
    """NOAH's layout (https://github.com/ZhangYuanhan-AI/NOAH): a list a split, lines `path label`.

    train800val200.txt is train and val together: checked, not loaded again; where it stands
    without those two, it is "train". NOAH's own script writes it with copies of the images, in
    images/train800val200/. Names of classes, one a line, may stand in classes.txt.
    """
    lists = {split: name for split, name in VTAB_LISTS.items() if (root / name).is_file()}
    union = root / VTAB_UNION
    if union.is_file() and not lists.keys() & {"train", "val"}:
        lists = {"train": VTAB_UNION} | lists
    entries = [e for split, name in lists.items() for e in _read_vtab(root / name, split)]
    if union.is_file() and lists["train"] != VTAB_UNION:
        _check_union(union, entries)
    names_file = root / "classes.txt"
    if names_file.is_file():
        names = tuple(_lines(names_file))
        entries = [_named(entry, names, names_file) for entry in entries]
        classes = classes or names
    targets = [_read_column(LABEL, 0, entries, classes)]
    return _from_list(entries, targets, root, splits, f"VTAB-1K task folder {root}")


def _read_vtab(path: Path, split: str) -> Iterator[_Entry]:
    for number, line in enumerate(_lines(path), start=1):
        if not line:
            continue
        place = f"{path}, line {number}"
        fields = line.rsplit(maxsplit=1)
        if len(fields) != 2 or not is_integer(fields[1]):
            raise SourceError(f"{place}: expected `path label`, the label an integer; found {line}")
        yield _Entry(fields[0], (fields[1],), split, place)


def _check_union(union: Path, entries: list[_Entry]) -> None:
    """By path and label; where the union has copies of its own, by how often each label occurs."""
    split = [e for e in entries if e.split in ("train", "val")]
    together = list(_read_vtab(union, "train"))
    if {e.path for e in split}.isdisjoint(e.path for e in together):
        both = {f"label {k}, {n} times" for k, n in Counter(e.cells[0] for e in split).items()}
        listed = {f"label {k}, {n} times" for k, n in Counter(e.cells[0] for e in together).items()}
    else:
        both = {f"{e.path} {e.cells[0]}" for e in split}
        listed = {f"{e.path} {e.cells[0]}" for e in together}
    if both != listed:
        raise SourceError(
            f"{union}: not the union of {VTAB_LISTS['train']} and {VTAB_LISTS['val']}: "
            f"{len(listed - both)} lines are here alone, {len(both - listed)} there alone, such as "
            f"`{min(both ^ listed)}`; restore the lists, or remove this one"
        )


def _named(entry: _Entry, names: tuple[str, ...], file: Path) -> _Entry:
    number = int(entry.cells[0])
    if not 0 <= number < len(names):
        raise SourceError(f"{entry.place}: label {number}, but {file} has {len(names)} names")
    return entry._replace(cells=(names[number],))


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error


def _from_list(
    entries: list[_Entry],
    targets: Sequence[Labels],
    root: Path,
    splits: tuple[str, ...] | None,
    description: str,
) -> Source:
    """`targets` are those of all entries; the splits that are not asked for go here."""
    kept = select_splits((entry.split for entry in entries), splits, description)
    place_of: dict[str, str] = {}
    rows, paths, missing = [], [], []
    numbers: list[int] = []
    for number, entry in enumerate(entries):
        path = os.path.normpath(root / entry.path)
        if path in place_of:
            raise SourceError(
                f"{entry.place}: {entry.path} is listed already: {place_of[path]}; keep one"
            )
        place_of[path] = entry.place
        if entry.split not in kept:
            continue
        if not Path(path).is_file():
            missing.append(f"{entry.path} ({entry.place})")
        rows.append(Row(key=_key(entry.path, root), split=entry.split))
        paths.append(path)
        numbers.append(number)
    if missing:
        raise SourceError(
            f"{description}: {len(missing)} of {len(rows)} files are missing: {some(missing)}; "
            f"paths are relative to {root.absolute()}"
        )
    return FileSource(
        rows=rows,
        targets=tuple(target.take(numbers) for target in targets),
        description=description,
        paths=paths,
    )


def _key(path: str, root: Path) -> str:
    """Relative to the root, so that data can move; absolute only if listed so and outside."""
    if Path(path).is_absolute() and Path(path).is_relative_to(root.absolute()):
        path = str(Path(path).relative_to(root.absolute()))
    return Path(os.path.normpath(path)).as_posix()
