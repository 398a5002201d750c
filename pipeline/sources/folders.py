"""A folder of class folders as a source, with split folders above them or without.

    cat/*.jpg, dog/*.jpg                  all rows are "train"
    train/cat/*.jpg, val/cat/*.jpg …      folders called as in SPLIT_NAMES are splits

Images lie at any depth below their class folder; hidden files and folders do not count.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.errors import SourceError, some
from pipeline.sources import vtab
from pipeline.sources.decode import image_suffixes, suffixes_shown
from pipeline.sources.source import FileSource, Row, TargetColumn
from pipeline.sources.splits import SPLIT_NAMES, in_order, normal_split, select_splits
from pipeline.tasks.classes import number_labels


def open_folder(
    root: Path, splits: tuple[str, ...] | None, classes: tuple[str, ...] | None
) -> FileSource:
    """The images below `root`, in sorted order; one target, "label", by the names of the folders.

    Classes are those of all splits, also where `splits` are asked for, unless they are given.
    Raises SourceError for an empty class folder, images outside any, and splits beside classes.
    """
    folder_of = _split_folders(root) or {"train": ""}
    classes_of = {split: _class_folders(root / name) for split, name in folder_of.items()}
    union = tuple(sorted({name for names in classes_of.values() for name in names}))
    kept = select_splits(folder_of, splits, str(root))
    folders = [(split, name) for split in kept for name in classes_of[split]]
    places = [posixpath.join(folder_of[split], name) for split, name in folders]
    known, numbers = number_labels(
        [name for _, name in folders],
        classes or union,
        integers=False,
        where=lambda position: str(root / places[position]),
    )
    target = TargetColumn(name="label", kind="class", classes=known, values=numbers)
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


def photos(paths: Sequence[str | Path]) -> list[Path]:
    """The photographs that `paths` name: files as they are, folders searched in sorted order."""
    missing = [str(path) for path in paths if not Path(path).exists()]
    if missing:
        raise SourceError(f"no such file or folder: {some(missing)}")
    found: list[Path] = []
    for path in map(Path, paths):
        inside = [path / name for name in sorted(images_under(path))] if path.is_dir() else [path]
        if not inside:
            raise SourceError(f"{path}: no image in this folder; looked for {suffixes_shown()}")
        found += inside
    return found


def images_under(folder: Path) -> Iterator[str]:
    """Posix paths relative to `folder`, unsorted; links are followed, except into a circle."""

    def refuse(error: OSError) -> None:
        raise SourceError(f"{error.filename}: cannot be listed: {error.strerror}") from error

    for base, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        here = Path(base)
        folders[:] = [
            name for name in folders if not name.startswith(".") and not _circular(here / name)
        ]
        for name in filter(_is_image, files):
            yield (here / name).relative_to(folder).as_posix()


def _circular(path: Path) -> bool:
    return path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve())


def _is_image(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in image_suffixes()


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
    return {split: result[split] for split in in_order(result)}


def _class_folders(base: Path) -> list[str]:
    names = _folders(base)
    stray = sorted(
        entry.name for entry in os.scandir(base) if _is_image(entry.name) and entry.is_file()
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
            f"or the lists {some(list(vtab.LISTS.values()))}; there is {some(found)}"
        )
    return names


def _folders(path: Path) -> list[str]:
    try:
        entries = list(os.scandir(path))
    except OSError as error:
        raise SourceError(f"{path}: cannot be listed: {error.strerror}") from error
    return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
