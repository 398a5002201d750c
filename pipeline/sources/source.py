"""Where the images come from: rows in a fixed order, each decoded and hashed by its number.

A `Source` says which images there are, what is to be predicted of them, and how the bytes of one
are read; `pipeline.sources.open` opens the kinds that there are.

Decoding is timm's: Pillow, then `convert("RGB")`. Hence no EXIF rotation, transparency is dropped
rather than blended, and the first frame of an animation counts. Grey of more than 8 bits, which
Pillow turns white above 255, is first scaled from the depth that it fills (`_to_rgb`). Kinds that
start another program are refused, whatever the file is called.

A source holds no open files: it can be pickled, and used from threads and forks.
What this file does not know: tensors, transforms, backbones.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

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
MOST_SPLITS = 256  # a cache keeps a row's split in one byte
SPLIT_ORDER = ("train", "val", "test")

NOT_PHOTOGRAPHS = {  # Pillow registers these too, but for them it …
    "BUFR": "needs a plug-in",
    "EPS": "starts Ghostscript",
    "GRIB": "needs a plug-in",
    "HDF5": "needs a plug-in",
    "IPTC": "opens what is inside, of any kind",
    "MPEG": "decodes no frame",
    "PALM": "only writes them",
    "PDF": "only writes them",
    "WMF": "needs Windows",
}
GREY_MODES = {"I", "I;16", "I;16B", "I;16L", "I;16N"}  # Pillow's, of whole numbers above 8 bits
GREY_TOPS = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16))  # what scanners make
OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # not the image's fault

REPAIR = "Repair or remove the file"
REPAIR_OR_SKIP = f"{REPAIR}, or leave such rows out with --on-error skip"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One image: `key` is its path relative to the root (posix, unique)."""

    key: str
    split: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Labels:
    """What is to be predicted of every image, one target of a source; named as in a cache.

    values, in order of rows: kind "class": class index, int64 (N,), -1 if unknown; "multilabel":
    1 where a class applies, else 0, int8 (N, C), -1 throughout if unknown; "regression": float32
    (N,), NaN if unknown, and no classes.
    """

    name: str
    kind: str
    classes: tuple[str, ...]
    values: np.ndarray

    def take(self, rows: Sequence[int]) -> Labels:
        """Those of some rows, in the order given."""
        return replace(self, values=self.values[np.asarray(rows, np.int64)])


@dataclass(frozen=True, kw_only=True, eq=False)
class Source(ABC):
    """Images in a fixed order; a subclass says how the encoded bytes of one are read."""

    rows: Sequence[Row]
    targets: tuple[Labels, ...] = ()
    description: str

    def __post_init__(self) -> None:
        if not self.rows:
            raise SourceError(f"{self.description}: no images")
        if len(self.splits) > MOST_SPLITS:
            raise SourceError(
                f"{self.description}: {len(self.splits)} splits ({some(self.splits)}); expected at "
                f"most {MOST_SPLITS}, such as train, val and test. Is the column another one?"
            )
        assert all(len(target.values) == len(self.rows) for target in self.targets)
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
        return ordered(row.split for row in self.rows)

    def target(self, name: str) -> Labels:
        """The target of that name. Raises SourceError listing those there are."""
        for target in self.targets:
            if target.name == name:
                return target
        names = some([target.name for target in self.targets], 10)
        raise SourceError(f"{self.description}: no target {name!r}; there is {names}")

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


def source_digests(
    source: Source,
    *,
    threads: int = 8,
    on_error: str = "raise",
    report: Callable[[int, int], object] | None = None,
    see: Callable[[bytes], object] | None = None,
) -> np.ndarray:
    """SHA-256 of every row, (N, 32) uint8, in order of rows; `report(done, total)` now and then.

    `see` gets the bytes of each, in any thread. An unreadable file raises ImageError; with
    `on_error="skip"` its row is 32 zero bytes. A file that can be read but not decoded has a digest
    like any other.
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
                data = source.read(index)
            except ImageError:
                if on_error == "raise":
                    raise
                continue
            digests[index] = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
            if see is not None:
                see(data)
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
        raise SourceError(f"no such file or folder: {some(missing)}")
    found: list[Path] = []
    for path in map(Path, paths):
        inside = [path / name for name in sorted(images_under(path))] if path.is_dir() else [path]
        if not inside:
            raise SourceError(f"{path}: no image in this folder; looked for {suffixes_shown()}")
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
        with Image.open(io.BytesIO(data), formats=photograph_formats()) as image:
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
        reason = _unidentified(data)
    except Exception as error:  # decoders also raise SyntaxError, ValueError, struct.error, …
        reason = f"truncated or damaged: {type(error).__name__}: {error}"
    raise ImageError(f"{where}: {reason}. {advice}")


def index_labels(
    labels: Sequence[str],
    classes: tuple[str, ...] | None,
    *,
    integers: bool,
    where: Callable[[int], str],
    name: str = "label",
) -> Labels:
    """Label texts → the class target `name`: class numbers, and the classes they count by.

    With `classes`, a label is a class name, or, if `integers` and no class is itself named by a
    number, a class number. Without, labels that are all integers are numbers in "0" … "C-1", and
    others are names, sorted. -1 is an unknown label. `where(i)` names the place of label i.
    """
    if classes is None:
        if not (integers and all(map(is_integer, labels))):
            classes = tuple(sorted(set(labels) - {"-1"}))
            integers = False
        else:
            highest = max(map(int, labels), default=-1)
            classes = tuple(str(number) for number in range(highest + 1))
    number_of = {known: number for number, known in enumerate(classes)}
    number_of.setdefault("-1", -1)
    if integers and not any(map(is_integer, classes)):
        number_of |= {str(number): number for number in range(len(classes))}
    for position, label in enumerate(labels):
        if label not in number_of:
            raise SourceError(
                f"{where(position)}: the label {label!r} is none of the {len(classes)} known "
                f"classes: {some(classes, 10)}"
            )
    values = np.array([number_of[label] for label in labels], np.int64)
    return Labels(name=name, kind="class", classes=classes, values=values)


def select_splits(
    present: Iterable[str], wanted: tuple[str, ...] | None, where: str
) -> tuple[str, ...]:
    """The splits to keep, in order; SourceError lists what is there if one is not."""
    there = ordered(present)
    if wanted is None:
        return there
    kept = {normal_split(name) for name in wanted}
    unknown = sorted(kept - set(there))
    if unknown:
        raise SourceError(f"{where}: no split {some(unknown)}; there is {some(there)}")
    return tuple(name for name in there if name in kept)


def normal_split(name: str) -> str:
    """`validation`, `Training`, … → the names used here; other names stay as they are."""
    return SPLIT_NAMES.get(name.casefold(), name)


# ---- image files ---------------------------------------------------------------------------------


def images_under(folder: Path) -> Iterator[str]:
    """Posix paths relative to `folder`, unsorted; links are followed, except into a circle."""

    def refuse(error: OSError) -> None:
        raise SourceError(f"{error.filename}: cannot be listed: {error.strerror}") from error

    for base, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        here = Path(base)
        folders[:] = [
            name for name in folders if not name.startswith(".") and not _circular(here / name)
        ]
        for name in filter(is_image, files):
            yield (here / name).relative_to(folder).as_posix()


def _circular(path: Path) -> bool:
    return path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve())


def is_image(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in image_suffixes()


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The suffixes, with their dot, of the image formats that Pillow reads."""
    registered = Image.registered_extensions()
    return frozenset(end for end, kind in registered.items() if kind not in NOT_PHOTOGRAPHS)


@functools.cache
def photograph_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are opened, common ones first."""
    Image.preinit()
    Image.init()
    return tuple(kind for kind in Image.ID if kind not in NOT_PHOTOGRAPHS)


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


def _unidentified(data: bytes) -> str:
    for kind, reason in NOT_PHOTOGRAPHS.items():
        _, accepts = Image.OPEN.get(kind, (None, None))
        if accepts is not None and accepts(data[:16]) is True:
            return f"a file of the kind {kind}, which is refused: for it, Pillow {reason}"
    return f"not an image of a kind that Pillow reads ({len(data)} bytes)"


def _to_rgb(image: Image.Image) -> Image.Image:
    """As timm converts; but grey above 8 bits fits its range, or is refused where it has none.

    White is the largest value of 8, 10, 12, 14 or 16 bits, the first that holds the image's largest
    value: a 12-bit scan in a 16-bit file keeps its contrast, scans of one depth keep their
    brightness beside each other, and values up to 255 stay what they are.
    """
    if image.mode in GREY_MODES:
        return _eight_bits(image).convert("RGB")
    if image.mode == "F":
        raise _Refused(
            "grey of floating point has no white; save it with 8 or 16 bits, from black to white"
        )
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        return image.convert("RGBA").convert("RGB")  # the same colours, without Pillow's warning
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > GREY_TOPS[-1]:
        raise _Refused(
            f"grey from {low} to {high}: expected 0 to {GREY_TOPS[-1]}; save it with 8 or 16 bits, "
            "from black to white"
        )
    top = next(top for top in GREY_TOPS if high <= top)
    return Image.fromarray(((pixels.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8))


def is_deep_grey(data: bytes) -> bool:
    """Whether an encoded image is grey above 8 bits, by its header."""
    try:
        with Image.open(io.BytesIO(data), formats=photograph_formats()) as image:
            return image.mode in GREY_MODES
    except MemoryError:
        raise
    except Exception:  # `decode` will say what is wrong with it
        return False


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    seen = dict.fromkeys(names)
    return (*(n for n in SPLIT_ORDER if n in seen), *(n for n in seen if n not in SPLIT_ORDER))


def is_integer(text: str) -> bool:
    """-1, 0, 1, … as Python prints them: 007 and 1.0 are names."""
    return text == "-1" or (text.isascii() and text.isdigit() and str(int(text)) == text)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def some(names: Sequence[str], most: int = 3) -> str:
    if not names:
        return "nothing"
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def suffixes_shown() -> str:
    return f".jpg, .png, .webp and {len(image_suffixes()) - 3} more suffixes"
