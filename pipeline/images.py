"""Where the images come from: rows in a fixed order, each decoded and hashed by its number.

`open_source` decides by what is there:

    a folder     class folders, or split folders above class folders (SPLIT_NAMES)
    a .csv       header `path,label[,split]`; paths relative to the file; rows in file order
    a VTAB-1K    task folder in the NOAH layout: train800.txt, val200.txt, test.txt, …
    a .tar       of images, and timm dataset strings such as `hfds/…`: pipeline.timm_datasets

The idea to hold: opening a source finds every fault of the *list* (missing files, unknown labels,
empty classes) before the backbone runs; faults of one *image* come later, as ImageError, so that
`--on-error skip` can leave that row out. Rows without any split belong to "train".

Decoding is timm's: Pillow, then `convert("RGB")`. Hence no EXIF rotation, transparency is dropped
rather than blended, the first frame of an animation counts, and 16-bit greyscale above 255
saturates. A source holds no open files: it can be pickled, and used from threads and forks.
What this file does not know: tensors, transforms, backbones.
"""

from __future__ import annotations

import csv
import errno
import functools
import hashlib
import io
import os
import posixpath
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.errors import ImageError, SettingError, SourceError

SPLIT_NAMES = {  # folder or CSV value, in any case → the split's name here
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
SPLIT_ORDER = ("train", "val", "test")
TIMM_PREFIXES = ("hfds", "hfids", "tfds", "torch", "wds")
VTAB_LISTS = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
VTAB_UNION = "train800val200.txt"

# Pillow registers these suffixes too, but only writes them, needs a plug-in, or runs Ghostscript.
NOT_PHOTOGRAPHS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"}
OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # not the image's fault

REPAIR = "Repair or remove the file"
REPAIR_OR_SKIP = f"{REPAIR}, or leave such rows out with --on-error skip"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One image: `key` is its path relative to the root (posix, unique), `label` -1 if unknown."""

    key: str
    label: int
    split: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Source(ABC):
    """Images in a fixed order; a subclass says how the encoded bytes of one are read."""

    rows: Sequence[Row]
    classes: tuple[str, ...]
    description: str

    def __post_init__(self) -> None:
        if not self.rows:
            raise SourceError(f"{self.description}: no images")
        seen: set[str] = set()
        for row in self.rows:
            if row.key in seen:
                raise SourceError(f"{self.description}: {row.key} occurs twice; keep one of them")
            if not row.key.isprintable() and not _is_utf8(row.key):
                raise SourceError(f"{self.description}: the name {row.key!r} is not UTF-8")
            seen.add(row.key)

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """In order of appearance, but train, val and test first."""
        return _ordered(row.split for row in self.rows)

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded bytes of one image; ImageError if they cannot be had."""

    def where(self, index: int) -> str:
        """How messages name one image."""
        return self.rows[index].key

    def open(self, index: int) -> Image.Image:
        """One image, decoded, RGB; ImageError names the file, the reason and what to do."""
        return decode(self.read(index), self.where(index))

    def sha256(self, index: int) -> bytes:
        """32 bytes, of the file as it is stored (of size and pixels where there is no file)."""
        return hashlib.sha256(self.read(index)).digest()


@dataclass(frozen=True, kw_only=True, eq=False)
class FileSource(Source):
    """One file per image."""

    paths: Sequence[str]

    def where(self, index: int) -> str:
        return self.paths[index]

    def read(self, index: int) -> bytes:
        return _read_file(self.paths[index], self.where(index), REPAIR_OR_SKIP)


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


def source_digests(
    source: Source,
    *,
    threads: int = 8,
    on_error: str = "raise",
    report: Callable[[int, int], object] | None = None,
) -> np.ndarray:
    """SHA-256 of every row, (N, 32) uint8, in order of rows; `report(done, total)` now and then.

    An unreadable file raises ImageError; with `on_error="skip"` its row is 32 zero bytes. A file
    that can be read but not decoded has a digest like any other.
    """
    if on_error not in ("raise", "skip"):
        raise SettingError(f"on_error is {on_error!r}; expected 'raise' or 'skip'")
    total = len(source.rows)
    digests = np.zeros((total, 32), np.uint8)
    step = 64  # rows per task: a future for each of a million rows would cost a gigabyte

    def fill(start: int) -> int:
        stop = min(start + step, total)
        for index in range(start, stop):
            try:
                digests[index] = np.frombuffer(source.sha256(index), np.uint8)
            except ImageError:
                if on_error == "raise":
                    raise
        return stop

    with ThreadPoolExecutor(threads) as pool:
        for done in pool.map(fill, range(0, total, step)):
            if report is not None:
                report(done, total)
    return digests


def photos(paths: Sequence[str | Path]) -> list[Path]:
    """The photographs that `paths` name: files as they are, folders searched in sorted order."""
    missing = [str(path) for path in paths if not Path(path).exists()]
    if missing:
        raise SourceError(f"no such file or folder: {_some(missing)}")
    found: list[Path] = []
    for path in map(Path, paths):
        inside = [path / name for name in sorted(_images_under(path))] if path.is_dir() else [path]
        if not inside:
            raise SourceError(f"{path}: no image in this folder; looked for {_suffixes_shown()}")
        found += inside
    return found


def open_photo(path: str | Path) -> Image.Image:
    """One photograph, decoded, RGB; ImageError names the file and the reason."""
    return decode(_read_file(str(path), str(path), REPAIR), str(path), REPAIR)


def decode(data: bytes, where: str, advice: str = REPAIR_OR_SKIP) -> Image.Image:
    """Encoded bytes → RGB image, as timm decodes; ImageError names `where` and ends in `advice`.

    Pillow warns of a decompression bomb above Image.MAX_IMAGE_PIXELS and refuses at twice that;
    here the lower limit counts. It is checked by hand because warning filters are not per thread.
    """
    try:
        if not data:
            raise _Refused("the file is empty (0 bytes)")
        with Image.open(io.BytesIO(data)) as image:
            pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
            if limit is not None and pixels > limit:
                raise _Refused(f"decompression bomb? {pixels} pixels, the limit is {limit}")
            return _to_rgb(image)
    except MemoryError:
        raise
    except _Refused as error:
        reason = str(error)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = f"decompression bomb? {error}"
    except UnidentifiedImageError:
        reason = f"not an image of a kind that Pillow reads ({len(data)} bytes)"
    except Exception as error:  # decoders also raise SyntaxError, ValueError, struct.error, …
        reason = f"truncated or damaged: {type(error).__name__}: {error}"
    raise ImageError(f"{where}: {reason}. {advice}")


def index_labels(
    labels: Sequence[str],
    classes: tuple[str, ...] | None,
    *,
    integers: bool,
    where: Callable[[int], str],
) -> tuple[list[int], tuple[str, ...]]:
    """Label texts → class numbers, and the classes they count by.

    With `classes`, a label is a class name, or, if `integers` and no class is itself named by a
    number, a class number. Without, labels that are all integers are numbers in "0" … "C-1", and
    others are names, sorted. -1 is an unknown label. `where(i)` names the place of label i.
    """
    if classes is None:
        if not (integers and all(map(_is_integer, labels))):
            classes = tuple(sorted(set(labels) - {"-1"}))
            integers = False
        else:
            highest = max(map(int, labels), default=-1)
            classes = tuple(str(number) for number in range(highest + 1))
    number_of = {name: number for number, name in enumerate(classes)}
    number_of.setdefault("-1", -1)
    if integers and not any(map(_is_integer, classes)):
        number_of |= {str(number): number for number in range(len(classes))}
    for position, label in enumerate(labels):
        if label not in number_of:
            raise SourceError(
                f"{where(position)}: the label {label!r} is none of the {len(classes)} known "
                f"classes: {_some(classes, 10)}"
            )
    return [number_of[label] for label in labels], classes


def select_splits(
    present: Iterable[str], wanted: tuple[str, ...] | None, where: str
) -> tuple[str, ...]:
    """The splits to keep, in order; SourceError lists what is there if one is not."""
    there = _ordered(present)
    if wanted is None:
        return there
    kept = {normal_split(name) for name in wanted}
    unknown = sorted(kept - set(there))
    if unknown:
        raise SourceError(f"{where}: no split {_some(unknown)}; there is {_some(there)}")
    return tuple(name for name in there if name in kept)


def normal_split(name: str) -> str:
    """`validation`, `Training`, … → the names used here; other names stay as they are."""
    return SPLIT_NAMES.get(name.casefold(), name)


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
        files = sorted(_images_under(root / place))
        if not files:
            raise SourceError(
                f"{root / place}: this class folder holds no image; fill it or remove it "
                f"(looked for {_suffixes_shown()})"
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
    classes = [name for name in others if next(_images_under(root / name), None)]
    if classes:
        raise SourceError(
            f"{root}: {_some(named)} look like splits, but {_some(classes)} beside them hold "
            "images too; move one kind away, or list the images in a CSV with path,label,split"
        )
    result: dict[str, str] = {}
    for name in named:
        split = normal_split(name)
        if split in result:
            raise SourceError(f"{root}: {result[split]} and {name} both mean the split {split!r}")
        result[split] = name
    return {split: result[split] for split in _ordered(result)}


def _class_folders(base: Path) -> list[str]:
    names = _folders(base)
    stray = sorted(
        entry.name for entry in os.scandir(base) if _is_image(entry.name) and entry.is_file()
    )
    if stray:
        raise SourceError(
            f"{base}: {len(stray)} images lie outside any class folder: {_some(stray)}; move them "
            "into a folder per class, or list them in a CSV with path,label[,split]"
        )
    if not names:
        found = sorted(path.name for path in base.iterdir())
        raise SourceError(
            f"{base}: no images; expected a folder per class, or train/, val/, test/ above those, "
            f"or the lists {', '.join(VTAB_LISTS.values())}; there is {_some(found)}"
        )
    return names


def _folders(path: Path) -> list[str]:
    try:
        entries = list(os.scandir(path))
    except OSError as error:
        raise SourceError(f"{path}: cannot be listed: {error.strerror}") from error
    return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _images_under(folder: Path) -> Iterator[str]:
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


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The suffixes, with their dot, of the image formats that Pillow reads."""
    registered = Image.registered_extensions()
    return frozenset(end for end, kind in registered.items() if kind not in NOT_PHOTOGRAPHS)


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
        if len(fields) != 2 or not _is_integer(fields[1]):
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
            f"{description}: {len(missing)} of {len(rows)} files are missing: {_some(missing)}; "
            f"paths are relative to {root.absolute()}"
        )
    return FileSource(rows=rows, classes=classes, description=description, paths=paths)


def _key(path: str, root: Path) -> str:
    """Relative to the root, so that data can move; absolute only if listed so and outside."""
    if Path(path).is_absolute() and Path(path).is_relative_to(root.absolute()):
        path = str(Path(path).relative_to(root.absolute()))
    return Path(os.path.normpath(path)).as_posix()


# ---- one image, and small things ----------------------------------------------------------------


class _Refused(Exception):
    """We, not Pillow, decline an image; becomes an ImageError at once."""


def _read_file(path: str, where: str, advice: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        reason = "no such file"
    except OSError as error:
        if error.errno in OUT_OF_RESOURCES:
            raise
        reason = f"cannot be read: {error.strerror}"
    raise ImageError(f"{where}: {reason}. {advice}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        return image.convert("RGBA").convert("RGB")  # the same colours, without Pillow's warning
    return image.convert("RGB")


def _ordered(names: Iterable[str]) -> tuple[str, ...]:
    seen = dict.fromkeys(names)
    return (*(n for n in SPLIT_ORDER if n in seen), *(n for n in seen if n not in SPLIT_ORDER))


def _is_integer(text: str) -> bool:
    """-1, 0, 1, … as Python prints them: 007 and 1.0 are names."""
    return text == "-1" or (text.isascii() and text.isdigit() and str(int(text)) == text)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _some(names: Sequence[str], most: int = 3) -> str:
    if not names:
        return "nothing"
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _suffixes_shown() -> str:
    return f".jpg, .png, .webp and {len(image_suffixes()) - 3} more suffixes"
