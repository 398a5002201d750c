"""Opening a source of images: what is there decides how it is read.

    a folder     class folders, or split folders above class folders (SPLIT_NAMES)
    a .csv       header `path,label[,split]`; paths relative to the file; rows in file order
    a VTAB-1K    task folder in the NOAH layout: train800.txt, val200.txt, test.txt, …
    a .tar       of images, and timm dataset strings such as `hfds/…`: pipeline.timm_datasets

The idea to hold: opening a source finds every fault of the *list* (missing files, unknown labels,
empty classes) before the backbone runs; faults of one *image* come later, as ImageError, so that
`--on-error skip` can leave that row out. Rows without any split belong to "train".
"""

from __future__ import annotations

import csv
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import SourceError
from pipeline.images import (
    SPLIT_NAMES,
    FileSource,
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


def open_source(
    images: str | Path,
    *,
    splits: tuple[str, ...] | None = None,
    classes: tuple[str, ...] | None = None,
    data_dir: str | None = None,
    input_key: str | None = None,
    target_key: str | None = None,
    download: bool = False,
) -> Source:
    """Open `images`; raise SourceError saying what was looked for and what was found.

    What is on the disk comes first: a folder `torch/cifar100` here hides timm's data set.

    splits: keep these alone. For timm dataset strings: the names to ask timm for, or `name=what`
        to ask for something else under a name of ours (`val=train[800:]`); ("train",) if None.
    classes: those of another cache; labels are then numbered by them, and others refused.
    data_dir, input_key, target_key, download: timm's `--data-dir`, `--input-key`, `--target-key`,
        `--dataset-download`; for timm dataset strings only.
    """
    path, text = Path(images), str(images)
    if not path.exists() and text.partition("/")[0].lower() in TIMM_PREFIXES and "/" in text:
        from pipeline.timm_datasets import TimmOptions, open_timm

        options = TimmOptions(data_dir, input_key, target_key, download)
        return open_timm(text, splits=splits or ("train",), classes=classes, options=options)
    if data_dir or input_key or target_key or download:
        raise SourceError(
            f"{text}: data_dir, input_key, target_key and download belong to timm dataset strings "
            f"({', '.join(f'{prefix}/…' for prefix in TIMM_PREFIXES)}), and this is none"
        )
    if path.is_dir():
        names = (VTAB_LISTS["train"], VTAB_LISTS["val"], VTAB_UNION)
        is_vtab = any((path / name).is_file() for name in names)
        return (_open_vtab if is_vtab else _open_folder)(path, splits, classes)
    if path.is_file() and path.suffix.lower() == ".csv":
        return _open_csv(path, splits, classes)
    if path.is_file() and path.suffix.lower() == ".tar":
        from pipeline.timm_datasets import open_tar

        return open_tar(path, splits=splits, classes=classes)
    raise SourceError(
        f"{text}: {'a file of another kind' if path.exists() else 'nothing there'}; expected a "
        "folder with a folder per class (or train/, val/, test/ above those), a .csv with "
        "path,label[,split], a VTAB-1K task folder, a .tar of images, or a timm dataset string: "
        + ", ".join(f"{prefix}/…" for prefix in TIMM_PREFIXES)
    )


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
    numbers, classes = index_labels(
        [name for _, name in folders],
        classes or union,
        integers=False,
        where=lambda position: str(root / places[position]),
    )
    rows, paths = [], []
    for (split, _), place, number in zip(folders, places, numbers, strict=True):
        files = sorted(images_under(root / place))
        if not files:
            raise SourceError(
                f"{root / place}: this class folder holds no image; fill it or remove it "
                f"(looked for {suffixes_shown()})"
            )
        rows += [Row(key=f"{place}/{file}", label=number, split=split) for file in files]
        paths += [str(root / place / file) for file in files]
    return FileSource(rows=rows, classes=classes, description=f"folder {root}", paths=paths)


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


class _Entry(NamedTuple):
    path: str
    label: str
    split: str
    place: str  # "images.csv, line 3"


def _open_csv(
    path: Path, splits: tuple[str, ...] | None, classes: tuple[str, ...] | None
) -> Source:
    entries = list(_read_csv(path))
    return _from_list(entries, path.parent, splits, classes, f"CSV file {path}")


def _read_csv(path: Path) -> Iterator[_Entry]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True)
        try:
            header = [name.strip() for name in next(lines, [])]
            for name in ("path", "label"):
                if header.count(name) != 1:
                    raise SourceError(
                        f"{path}, line 1: expected the header path,label[,split] with one column "
                        f"{name!r}, separated by commas; found {','.join(header) or 'nothing'}"
                    )
            for fields in lines:
                if fields:
                    yield _csv_entry(header, fields, f"{path}, line {lines.line_num}")
        except csv.Error as error:
            raise SourceError(f"{path}, line {lines.line_num}: not a CSV line: {error}") from error
        except UnicodeDecodeError as error:
            raise SourceError(
                f"{path}: not UTF-8 (byte {error.start} of a block read after line "
                f"{lines.line_num}); save it as UTF-8"
            ) from error


def _csv_entry(header: list[str], fields: list[str], place: str) -> _Entry:
    if len(fields) != len(header):
        raise SourceError(
            f"{place}: {len(fields)} fields, the header has {len(header)}; quote a field that "
            "holds a comma"
        )
    field = dict(zip(header, (text.strip() for text in fields), strict=True))
    empty = [name for name in ("path", "label", "split") if field.get(name) == ""]
    if empty:
        raise SourceError(f"{place}: {empty[0]} is empty")
    return _Entry(field["path"], field["label"], normal_split(field.get("split", "train")), place)


def _open_vtab(
    root: Path, splits: tuple[str, ...] | None, classes: tuple[str, ...] | None
) -> Source:
    """NOAH's layout (https://github.com/ZhangYuanhan-AI/NOAH): a list a split, lines `path label`.

    train800val200.txt is train and val together: checked, not loaded again; where it stands
    without those two, it is "train". Names of classes, one a line, may stand in classes.txt.
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
    return _from_list(entries, root, splits, classes, f"VTAB-1K task folder {root}")


def _read_vtab(path: Path, split: str) -> Iterator[_Entry]:
    for number, line in enumerate(_lines(path), start=1):
        if not line:
            continue
        place = f"{path}, line {number}"
        fields = line.rsplit(maxsplit=1)
        if len(fields) != 2 or not is_integer(fields[1]):
            raise SourceError(f"{place}: expected `path label`, the label an integer; found {line}")
        yield _Entry(fields[0], fields[1], split, place)


def _check_union(union: Path, entries: list[_Entry]) -> None:
    both = {(e.path, e.label) for e in entries if e.split in ("train", "val")}
    listed = {(e.path, e.label) for e in _read_vtab(union, "train")}
    if both != listed:
        path, label = min(both ^ listed)
        raise SourceError(
            f"{union}: not the union of {VTAB_LISTS['train']} and {VTAB_LISTS['val']}: "
            f"{len(listed - both)} lines are here alone, {len(both - listed)} there alone, such as "
            f"`{path} {label}`; restore the lists, or remove this one"
        )


def _named(entry: _Entry, names: tuple[str, ...], file: Path) -> _Entry:
    number = int(entry.label)
    if not 0 <= number < len(names):
        raise SourceError(f"{entry.place}: label {number}, but {file} has {len(names)} names")
    return entry._replace(label=names[number])


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error


def _from_list(
    entries: list[_Entry],
    root: Path,
    splits: tuple[str, ...] | None,
    classes: tuple[str, ...] | None,
    description: str,
) -> Source:
    kept = select_splits((entry.split for entry in entries), splits, description)
    numbers, classes = index_labels(
        [entry.label for entry in entries],
        classes,
        integers=True,
        where=lambda position: entries[position].place,
    )
    place_of: dict[str, str] = {}
    rows, paths, missing = [], [], []
    for entry, number in zip(entries, numbers, strict=True):
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
        rows.append(Row(key=_key(entry.path, root), label=number, split=entry.split))
        paths.append(path)
    if missing:
        raise SourceError(
            f"{description}: {len(missing)} of {len(rows)} files are missing: {some(missing)}; "
            f"paths are relative to {root.absolute()}"
        )
    return FileSource(rows=rows, classes=classes, description=description, paths=paths)


def _key(path: str, root: Path) -> str:
    """Relative to the root, so that data can move; absolute only if listed so and outside."""
    if Path(path).is_absolute() and Path(path).is_relative_to(root.absolute()):
        path = str(Path(path).relative_to(root.absolute()))
    return Path(os.path.normpath(path)).as_posix()
