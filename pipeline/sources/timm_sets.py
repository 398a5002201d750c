"""timm's data sets as sources: `hfds/…`, `hfids/…`, `tfds/…`, `torch/…`, `wds/…`, and tars.

timm's readers find and list the data; the encoded bytes of a row are then fetched by its number.
The idea to hold: timm's ImageDataset silently returns the *next* image for a broken one, and its
webdataset reader drops it, so neither ever delivers an image here. Rows keep timm's order.

    .tar      timm's ReaderImageInTar lists the members; each is read at its offset
    torch/…   torchvision: by file where it has files, else its decoded pixels
    hfds/…    timm's reader by number (random access to Arrow)
    wds/…     the shards that timm's reader resolves; members are read at their offsets.
              Shards that are no local files are first copied to a spool
    hfids/…, tfds/…   no random access: all images, as encoded, are first copied to a spool

A spool is a temporary folder (TMPDIR chooses the disk), as large as the data, written at every
opening and removed with the source; a process that is killed leaves it behind.

A split is timm's word for what to load; `name=what` loads `what` under the name `name`, as in
`val=train[800:]`. What this file does not know: decoding, transforms.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import tarfile
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from timm.data import create_dataset
from timm.data.readers import create_reader
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from pipeline.errors import ImageError, SourceError
from pipeline.sources.source import (
    REPAIR_OR_SKIP,
    SPLIT_NAMES,
    FileSource,
    Labels,
    Row,
    Source,
    index_labels,
    normal_split,
    select_splits,
)

PACKAGES = {  # prefix → what timm's reader imports
    "hfds": ("datasets",),
    "hfids": ("datasets",),
    "tfds": ("tensorflow", "tensorflow_datasets"),
    "torch": ("torchvision",),
    "wds": ("webdataset",),
}
TRAIN_OR_TEST = ("cifar10", "cifar100", "fashion_mnist", "kmnist", "mnist", "qmnist")
WDS_MEMBER = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")  # webdataset: the key ends at the first dot


@dataclass(frozen=True)
class TimmOptions:
    """timm's `--data-dir`, `--input-key`, `--target-key`, `--dataset-download`."""

    data_dir: str | None = None
    input_key: str | None = None
    target_key: str | None = None
    download: bool = False


@dataclass(frozen=True)
class _Part:
    """One split to load: timm's name for the data set and the split, and our name for the split."""

    dataset: str
    timm_split: str
    split: str
    options: TimmOptions

    def __str__(self) -> str:
        return f"{self.dataset}, split {self.timm_split}"

    def key(self, index: int) -> str:
        return f"{self.split}/{index:08d}"

    def columns(self) -> str:
        image, label = self.options.input_key or "image", self.options.target_key or "label"
        return f"{self} (--input-key {image}, --target-key {label})"


class _Sample(NamedTuple):
    key: str
    label: str  # as text: a class name, or a number
    split: str
    place: Any  # whatever the source needs to find the image


def open_timm(
    name: str,
    *,
    splits: tuple[str, ...],
    classes: tuple[str, ...] | None,
    options: TimmOptions,
) -> Source:
    """Open a timm dataset string; SourceError if its package is missing or timm refuses it."""
    prefix, _, rest = name.partition("/")
    lacking = [p for p in PACKAGES[prefix.lower()] if importlib.util.find_spec(p) is None]
    if lacking:
        packages = " ".join(lacking).replace("_", "-")
        raise SourceError(f"{name}: packages are missing: pip install {packages}")
    parts = []
    for text in splits:
        ours, _, theirs = text.rpartition("=")
        parts.append(_Part(name, theirs, normal_split(ours or theirs), options))
    if len({part.split for part in parts}) < len(parts):
        raise SourceError(f"{name}: two of the splits {', '.join(splits)} have one name")
    return _OPENERS[prefix.lower()](f"{prefix.lower()}/{rest}", parts, classes)


# ---- tars: members at known offsets -------------------------------------------------------------


class Span(NamedTuple):
    """`size` bytes at `offset` of `file`."""

    file: str
    offset: int
    size: int


@dataclass(frozen=True, kw_only=True, eq=False)
class SpanSource(Source):
    """Images inside uncompressed tars, read without tarfile: nothing stays open, forks are safe."""

    spans: Sequence[Span]
    spool: Spool | None = None

    def where(self, index: int) -> str:
        return f"{self.description}, member {self.rows[index].key}"

    def read(self, index: int) -> bytes:
        span = self.spans[index]
        try:
            with Path(span.file).open("rb") as file:
                file.seek(span.offset)
                data = file.read(span.size)
        except (FileNotFoundError, PermissionError) as error:
            raise ImageError(f"{self.where(index)}: {error}. {REPAIR_OR_SKIP}") from error
        if len(data) < span.size:
            raise ImageError(
                f"{self.where(index)}: {span.file} ends {span.size - len(data)} bytes too early. "
                f"{REPAIR_OR_SKIP}"
            )
        return data


def open_tar(
    path: Path, *, splits: tuple[str, ...] | None = None, classes: tuple[str, ...] | None = None
) -> Source:
    """A tar of images (or of tars of images): class = innermost folder, as timm has it.

    timm lists .jpg, .jpeg and .png alone and knows no splits in a tar; here a folder train/, val/
    or test/ right above every class folder is the split. Hidden files are left out.
    """
    with _as_source_error(f"tar {path}, looking for .jpg, .jpeg and .png"):
        reader = ReaderImageInTar(str(path), cache_tarfiles=False, cache_tarinfo=False)
    samples = []
    for (info, _, child), target in zip(reader.samples, reader.targets, strict=True):
        inner = PurePosixPath(info.path)
        if inner.name.startswith("."):
            continue
        inside = PurePosixPath(child.path) if child is not None else PurePosixPath()
        offset = info.offset_data + (child.offset_data if child is not None else 0)
        samples.append(
            _Sample(
                key=(inside / inner).as_posix(),
                label=reader.class_idx_to_name[int(target)],
                split=_split_in_path(
                    inside.with_suffix("") / inner if child is not None else inner
                ),
                place=Span(str(path), offset, info.size),
            )
        )
    samples = _one_layout(samples, path)
    kept = select_splits((sample.split for sample in samples), splits, f"tar {path}")
    names = tuple(reader.class_idx_to_name[i] for i in range(len(reader.class_idx_to_name)))
    samples = [sample for sample in samples if sample.split in kept]
    rows, targets = _rows(samples, names, classes, f"tar {path}")
    spans = [sample.place for sample in samples]
    return SpanSource(rows=rows, targets=targets, description=f"tar {path}", spans=spans)


def _split_in_path(path: PurePosixPath) -> str:
    """The split that the folder above the class folder names, or nothing."""
    return SPLIT_NAMES.get(path.parts[-3].casefold(), "") if len(path.parts) > 2 else ""


def _one_layout(samples: list[_Sample], path: Path) -> list[_Sample]:
    outside = [sample for sample in samples if not sample.split]
    if 0 < len(outside) < len(samples):
        raise SourceError(
            f"tar {path}: some images lie in split folders, but {len(outside)} do not, such as "
            f"{outside[0].key}; unpack it and list the images in a CSV with path,label,split"
        )
    labels = {sample.label.casefold() for sample in samples}
    if outside and labels <= SPLIT_NAMES.keys():
        raise SourceError(
            f"tar {path}: the images lie right in {', '.join(sorted(labels))}; expected a folder "
            "per class there"
        )
    return [sample._replace(split=sample.split or "train") for sample in samples]


# ---- wds: shards are tars -----------------------------------------------------------------------


def _open_wds(name: str, parts: list[_Part], classes: tuple[str, ...] | None) -> Source:
    spool: Spool | None = None
    samples: list[_Sample] = []
    for part in parts:
        data_dir = part.options.data_dir
        root = name.partition("/")[2] if data_dir is None else data_dir  # "" before a whole URL
        with _as_source_error(str(part)):
            reader = create_reader(
                name,
                root=root,
                split=part.timm_split,
                input_key=part.options.input_key,
                target_key=part.options.target_key,
            )
        for shard in reader.split_info.filenames:
            path = Path(root) / shard
            if not path.is_file():
                spool = spool or Spool()
                path = _fetch(os.path.join(root, shard), spool, f"{part}, shard {shard}")  # noqa: PTH118
            samples += _read_shard(path, str(shard), part, reader)
    rows, targets = _rows(samples, None, classes, name)
    spans = [sample.place for sample in samples]
    return SpanSource(rows=rows, targets=targets, description=name, spans=spans, spool=spool)


def _fetch(url: str, spool: Spool, what: str) -> Path:
    """Copy a shard that is no local file: whatever webdataset can open, such as http or a pipe."""
    webdataset = importlib.import_module("webdataset")
    path = spool.new_file()
    with (
        _as_source_error(f"{what}: no local file, and it cannot be fetched"),
        webdataset.gopen(url) as stream,
        path.open("wb") as file,
    ):
        shutil.copyfileobj(stream, file)
    return path


def _read_shard(path: Path, shard: str, part: _Part, reader: Any) -> Iterator[_Sample]:
    what = f"{part}, shard {shard}"
    files: dict[str, dict[str, tarfile.TarInfo]] = {}
    with _as_source_error(what), tarfile.open(path, "r:") as tar:
        for info in filter(tarfile.TarInfo.isfile, tar):
            if member := WDS_MEMBER.fullmatch(info.name):
                files.setdefault(member[1], {})[member[2].lower()] = info
        for key, found in files.items():
            image = next((found[end] for end in reader.input_key.split(";") if end in found), None)
            if image is None:
                raise SourceError(
                    f"{what}: sample {key} has no {reader.input_key.replace(';', ' or ')}, only "
                    f"{', '.join(found)}; name the images' suffix with --input-key"
                )
            with _as_source_error(f"{what}: sample {key}"):
                label = _wds_label(tar, found, reader, f"{what}: sample {key}")
            span = Span(str(path), image.offset_data, image.size)
            yield _Sample(key=f"{shard}/{key}", label=label, split=part.split, place=span)


def _wds_label(tar: tarfile.TarFile, found: dict[str, Any], reader: Any, what: str) -> str:
    """As timm: the .cls file, or the field `target_key` of the .json file."""
    key = reader.target_key or reader.split_info.alt_label
    end = "json" if key else "cls"
    file = tar.extractfile(found[end]) if end in found else None
    if file is None:
        raise SourceError(f"{what} has no .{end} for its label; see --target-key")
    text = file.read().decode()
    if not key:
        return str(int(text))
    fields = json.loads(text)
    if key not in fields:
        raise SourceError(f"{what}: no field {key!r} in its .json, only {', '.join(fields)}")
    return str(fields[key])


# ---- hfds: random access ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class ReaderSource(Source):
    """timm readers with random access, one a split; `starts[i]` is the first row of reader i."""

    readers: Sequence[Any]
    starts: Sequence[int]

    def where(self, index: int) -> str:
        return f"{self.description}, row {self.rows[index].key}"

    def read(self, index: int) -> bytes:
        reader, position = _place(self.readers, self.starts, index)
        try:
            file, _ = reader[position]
            with file:
                return bytes(file.read())
        except (OSError, TypeError, AssertionError) as error:  # no path, no bytes, or None
            raise ImageError(
                f"{self.where(index)}: no image bytes: {type(error).__name__}: {error}. "
                f"{REPAIR_OR_SKIP}"
            ) from error


def _open_hfds(name: str, parts: list[_Part], classes: tuple[str, ...] | None) -> Source:
    readers, starts = [], []
    samples: list[_Sample] = []
    names: tuple[str, ...] | None = None
    for part in parts:
        with _as_source_error(part.columns()):
            reader = _reader(part)
            column = list(reader.dataset[reader.label_key])
        own = _names(reader.class_to_idx)
        names = _union(names, own)
        readers.append(reader)
        starts.append(len(samples))
        for index, target in enumerate(column):
            samples.append(_Sample(part.key(index), _text(target, own), part.split, None))
    rows, targets = _rows(samples, names, classes, name)
    return ReaderSource(
        rows=rows, targets=targets, description=name, readers=readers, starts=starts
    )


def _reader(part: _Part, **more: Any) -> Any:
    options = part.options
    return create_reader(
        part.dataset,
        root=options.data_dir,
        split=part.timm_split,
        input_key=options.input_key,
        target_key=options.target_key,
        download=options.download,
        **more,
    )


def _place(parts: Sequence[Any], starts: Sequence[int], index: int) -> tuple[Any, int]:
    part = bisect_right(starts, index) - 1
    return parts[part], index - starts[part]


# ---- hfids, tfds: no random access, hence a spool -----------------------------------------------


class Spool:
    """A temporary folder that is removed with the object that made it, in the process that did."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sidecache-spool-"))
        self.files = 0
        weakref.finalize(self, _remove, self.folder, os.getpid())

    def new_file(self) -> Path:
        self.files += 1
        return self.folder / f"{self.files - 1:08d}"


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker inherits this finalizer, but not the folder
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class SpooledSource(FileSource):
    """Copies of the encoded images; a pickled or forked source reads them while the first lives."""

    spool: Spool

    def where(self, index: int) -> str:
        return f"{self.description}, row {self.rows[index].key}"


def _open_spooled(name: str, parts: list[_Part], classes: tuple[str, ...] | None) -> Source:
    read = _hfids_samples if name.startswith("hfids/") else _tfds_samples
    spool = Spool()
    samples: list[_Sample] = []
    names: tuple[str, ...] | None = None
    for part in parts:
        with _as_source_error(f"{part.columns()}, copied to {spool.folder} (see TMPDIR)"):
            class_to_idx, images = read(part)
            own = _names(class_to_idx)
            names = _union(names, own)
            for index, (data, target) in enumerate(images):
                path = spool.new_file()
                path.write_bytes(data)
                label = _text(target, own)
                samples.append(_Sample(part.key(index), label, part.split, str(path)))
    rows, targets = _rows(samples, names, classes, name)
    paths = [sample.place for sample in samples]
    return SpooledSource(rows=rows, targets=targets, description=name, paths=paths, spool=spool)


_Images = tuple[dict[str, int], Iterable[tuple[bytes, Any]]]


def _hfids_samples(part: _Part) -> _Images:
    datasets = importlib.import_module("datasets")
    reader = _reader(part, num_samples=1)  # timm wants some number; evaluation reads to the end
    reader._lazy_init()
    stream = reader.ds.cast_column(reader.input_key, datasets.Image(decode=False))
    names = getattr((stream.features or {}).get(reader.target_key), "names", None) or ()

    def images() -> Iterator[tuple[bytes, Any]]:
        for sample in stream:
            image = sample[reader.input_key] or {}
            data, path = image.get("bytes"), image.get("path")
            if data is None and path is not None:
                data = Path(path).read_bytes()
            yield data or b"", sample[reader.target_key]  # b"": that row's ImageError, later

    return {name: number for number, name in enumerate(names)}, images()


def _tfds_samples(part: _Part) -> _Images:
    # Only after timm, which loads triton: triton 3.9 loaded after tensorflow 2.21 aborts.
    tfds = importlib.import_module("tensorflow_datasets")
    reader = _reader(part)
    encoded = reader.builder.as_dataset(
        split=part.timm_split,
        shuffle_files=False,
        decoders={reader.input_key: tfds.decode.SkipDecoding()},
    )
    samples = tfds.as_numpy(encoded)
    images = ((sample[reader.input_key], sample[reader.target_key]) for sample in samples)
    return reader.class_to_idx, images


# ---- torch --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class PixelSource(Source):
    """torchvision data sets that hold pixels; `starts[i]` is the first row of data set i."""

    datasets: Sequence[Any]
    starts: Sequence[int]

    def _image(self, index: int) -> Image.Image:
        dataset, position = _place(self.datasets, self.starts, index)
        image: Image.Image = dataset[position][0]
        return image

    def read(self, index: int) -> bytes:
        """Mode, size and pixels: there are no encoded bytes."""
        image = self._image(index)
        return f"{image.mode} {image.width} {image.height}\n".encode() + image.tobytes()

    def open(self, index: int) -> Image.Image:
        return self._image(index).convert("RGB")


def _open_torch(name: str, parts: list[_Part], classes: tuple[str, ...] | None) -> Source:
    datasets, starts = [], []
    samples: list[_Sample] = []
    names: tuple[str, ...] | None = None
    for part in parts:
        _check_torch(part)
    for part in parts:
        dataset = _torchvision(part, alone=len(parts) == 1)
        own = tuple(map(str, getattr(dataset, "classes", ()))) or None
        names = _union(names, own)
        datasets.append(dataset)
        starts.append(len(samples))
        samples += _torch_samples(dataset, part, own)
    rows, targets = _rows(samples, names, classes, name)
    if samples and samples[0].place is not None:
        paths = [sample.place for sample in samples]
        return FileSource(rows=rows, targets=targets, description=name, paths=paths)
    return PixelSource(
        rows=rows, targets=targets, description=name, datasets=datasets, starts=starts
    )


def _check_torch(part: _Part) -> None:
    kind = part.dataset.rpartition("/")[2].lower()
    if part.options.data_dir is None:
        raise SourceError(f"{part}: torchvision needs a folder; name it with --data-dir")
    if part.options.input_key or part.options.target_key:
        raise SourceError(
            f"{part}: torchvision's data sets have one image and one label each, and no columns; "
            "leave out --input-key and --target-key"
        )
    if kind in TRAIN_OR_TEST and part.timm_split not in ("train", "training", "test"):
        # timm would hand out the test set under any other name
        raise SourceError(f"{part}: this data set has the splits train and test alone")


def _torchvision(part: _Part, *, alone: bool) -> Any:
    kind, root = part.dataset.rpartition("/")[2].lower(), part.options.data_dir or ""
    fetch = "" if part.options.download else "; to fetch what torchvision can: --dataset-download"
    with _as_source_error(f"{part}, --data-dir {root}{fetch}"):
        dataset = create_dataset(
            part.dataset,
            root=root,
            split=part.timm_split,
            download=part.options.download,
        )
    if kind in ("image_folder", "folder") and not alone and Path(dataset.root) == Path(root):
        # timm would hand out all of the folder for each split
        raise SourceError(f"{part}: no folder of that name in {root}")
    return dataset


def _torch_samples(dataset: Any, part: _Part, names: tuple[str, ...] | None) -> list[_Sample]:
    files = getattr(dataset, "samples", None) or getattr(dataset, "imgs", None)
    if files:
        root = Path(part.options.data_dir or "").absolute()
        samples = []
        for file, target in files:
            path = Path(file).absolute()
            key = path.relative_to(root) if path.is_relative_to(root) else path
            samples.append(_Sample(key.as_posix(), _text(target, names), part.split, str(file)))
        return samples
    targets = getattr(dataset, "targets", None)
    if targets is None:
        raise SourceError(f"{part}: torchvision lists no labels for it; pass its folder instead")
    numbers = np.asarray(targets)
    numbers = numbers[:, 0] if numbers.ndim > 1 else numbers  # QMNIST: the class comes first
    return [
        _Sample(part.key(index), _text(int(number), names), part.split, None)
        for index, number in enumerate(numbers)
    ]


_OPENERS = {
    "hfds": _open_hfds,
    "hfids": _open_spooled,
    "tfds": _open_spooled,
    "torch": _open_torch,
    "wds": _open_wds,
}


# ---- shared -------------------------------------------------------------------------------------


def _rows(
    samples: Sequence[_Sample],
    names: tuple[str, ...] | None,
    classes: tuple[str, ...] | None,
    what: str,
) -> tuple[list[Row], tuple[Labels]]:
    """`names`: the data set's own class names, where it has any; else labels are numbers."""
    target = index_labels(
        [sample.label for sample in samples],
        classes or names,
        integers=names is None,
        where=lambda position: f"{what}, {samples[position].key}",
    )
    return [Row(key=sample.key, split=sample.split) for sample in samples], (target,)


def _names(class_to_idx: dict[str, int]) -> tuple[str, ...] | None:
    return tuple(sorted(class_to_idx, key=class_to_idx.__getitem__)) or None


def _union(names: tuple[str, ...] | None, more: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Class names over splits: in the data set's order, or sorted where splits differ."""
    if names is None or more is None or names == more:
        return more or names
    return tuple(sorted({*names, *more}))


def _text(target: Any, names: tuple[str, ...] | None) -> str:
    """A target as text: the name of class number `target` where there are names; -1 for None."""
    if isinstance(target, str):
        return target
    number = -1 if target is None else int(target)
    return names[number] if names is not None and 0 <= number < len(names) else str(number)


@contextmanager
def _as_source_error(what: str) -> Iterator[None]:
    """timm, datasets, tensorflow and torchvision raise anything; say what was being opened."""
    try:
        yield
    except (SourceError, MemoryError):
        raise
    except Exception as error:
        raise SourceError(f"{what}: {type(error).__name__}: {error}") from error
