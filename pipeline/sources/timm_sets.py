"""timm's data sets as sources: `hfds/…`, `hfids/…`, `tfds/…`, `torch/…` and `wds/…`.

timm's readers find and list the data; the encoded bytes of a row are then fetched by its number.
The idea to hold: timm's ImageDataset silently returns the *next* image for a broken one, and its
webdataset reader drops it, so neither ever delivers an image here. Rows keep timm's order.

    torch/…   torchvision: by file where it has files, else its decoded pixels
    hfds/…    timm's reader by number (random access to Arrow)
    wds/…     the shards that timm's reader resolves; members are read at their offsets.
              Shards that are no local files are first copied to a spool
    hfids/…, tfds/…   no random access: all images, as encoded, are first copied to a spool

A split is timm's word for what to load; `name=what` loads `what` under the name `name`, as in
`val=train[800:]`. What this file does not know: decoding, transforms.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import ImageError, SourceError, needed_for
from pipeline.sources.samples import (
    Sample,
    as_source_error,
    label_text,
    names_in_order,
    rows_and_target,
    union,
)
from pipeline.sources.shards import read_shard
from pipeline.sources.source import FileSource, Source
from pipeline.sources.splits import normal_split
from pipeline.sources.spool import Spool, SpooledSource
from pipeline.sources.tars import SpanSource

with needed_for("a timm data set", extra="extract"):
    from PIL import Image
    from timm.data import create_dataset
    from timm.data.readers import create_reader

PACKAGES = {  # prefix → what timm's reader imports
    "hfds": ("datasets",),
    "hfids": ("datasets",),
    "tfds": ("tensorflow", "tensorflow_datasets"),
    "torch": ("torchvision",),
    "wds": ("webdataset",),
}
TRAIN_OR_TEST = ("cifar10", "cifar100", "fashion_mnist", "kmnist", "mnist", "qmnist")


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


def open_timm(
    name: str,
    *,
    splits: tuple[str, ...],
    classes: tuple[str, ...] | None,
    options: TimmOptions,
) -> Source:
    """Open a timm dataset string: rows of all `splits`, in that order, with the target "label".

    `classes` number the labels where they are given. Raises SourceError if its package is missing,
    if two splits have one name, or if timm refuses it.
    """
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


# ---- wds: shards are tars -----------------------------------------------------------------------


def _open_wds(name: str, parts: list[_Part], classes: tuple[str, ...] | None) -> Source:
    spool: Spool | None = None
    samples: list[Sample] = []
    for part in parts:
        data_dir = part.options.data_dir
        root = name.partition("/")[2] if data_dir is None else data_dir  # "" before a whole URL
        with as_source_error(str(part)):
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
            samples += read_shard(
                path,
                str(shard),
                split=part.split,
                what=str(part),
                image_ends=reader.input_key.split(";"),
                label_field=reader.target_key or reader.split_info.alt_label,
            )
    rows, targets = rows_and_target(samples, None, classes, name)
    spans = [sample.place for sample in samples]
    return SpanSource(rows=rows, targets=targets, description=name, spans=spans, spool=spool)


def _fetch(url: str, spool: Spool, what: str) -> Path:
    """Copy a shard that is no local file: whatever webdataset can open, such as http or a pipe."""
    webdataset = importlib.import_module("webdataset")
    path = spool.new_file()
    with (
        as_source_error(f"{what}: no local file, and it cannot be fetched"),
        webdataset.gopen(url) as stream,
        path.open("wb") as file,
    ):
        shutil.copyfileobj(stream, file)
    return path


# ---- hfds: random access ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class ReaderSource(Source):
    """timm readers with random access, one a split; `starts[i]` is the first row of reader i."""

    readers: Sequence[Any]
    starts: Sequence[int]

    def where(self, index: int) -> str:
        """The row: it has no file."""
        return f"{self.description}, row {self.rows[index].key}"

    def read(self, index: int) -> bytes:
        """The encoded bytes that the reader gives. Raises ImageError where it gives none."""
        reader, position = _place(self.readers, self.starts, index)
        try:
            file, _ = reader[position]
            with file:
                return bytes(file.read())
        except (OSError, TypeError, AssertionError) as error:  # no path, no bytes, or None
            raise ImageError(
                f"{self.where(index)}: no image bytes: {type(error).__name__}: {error}. "
                f"{self.advice}"
            ) from error


def _open_hfds(name: str, parts: list[_Part], classes: tuple[str, ...] | None) -> Source:
    readers, starts = [], []
    samples: list[Sample] = []
    names: tuple[str, ...] | None = None
    for part in parts:
        with as_source_error(part.columns()):
            reader = _reader(part)
            column = list(reader.dataset[reader.label_key])
        own = names_in_order(reader.class_to_idx)
        names = union(names, own)
        readers.append(reader)
        starts.append(len(samples))
        for index, target in enumerate(column):
            samples.append(Sample(part.key(index), label_text(target, own), part.split, None))
    rows, targets = rows_and_target(samples, names, classes, name)
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


def _open_spooled(name: str, parts: list[_Part], classes: tuple[str, ...] | None) -> Source:
    read = _hfids_samples if name.startswith("hfids/") else _tfds_samples
    spool = Spool()
    samples: list[Sample] = []
    names: tuple[str, ...] | None = None
    for part in parts:
        with as_source_error(f"{part.columns()}, copied to {spool.folder} (see TMPDIR)"):
            class_to_idx, images = read(part)
            own = names_in_order(class_to_idx)
            names = union(names, own)
            for index, (data, target) in enumerate(images):
                path = spool.new_file()
                path.write_bytes(data)
                label = label_text(target, own)
                samples.append(Sample(part.key(index), label, part.split, str(path)))
    rows, targets = rows_and_target(samples, names, classes, name)
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
        """The data set's own image, RGB."""
        return self._image(index).convert("RGB")


def _open_torch(name: str, parts: list[_Part], classes: tuple[str, ...] | None) -> Source:
    datasets, starts = [], []
    samples: list[Sample] = []
    names: tuple[str, ...] | None = None
    for part in parts:
        _check_torch(part)
    for part in parts:
        dataset = _torchvision(part, alone=len(parts) == 1)
        own = tuple(map(str, getattr(dataset, "classes", ()))) or None
        names = union(names, own)
        datasets.append(dataset)
        starts.append(len(samples))
        samples += _torch_samples(dataset, part, own)
    rows, targets = rows_and_target(samples, names, classes, name)
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
    with as_source_error(f"{part}, --data-dir {root}{fetch}"):
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


def _torch_samples(dataset: Any, part: _Part, names: tuple[str, ...] | None) -> list[Sample]:
    files = getattr(dataset, "samples", None) or getattr(dataset, "imgs", None)
    if files:
        root = Path(part.options.data_dir or "").absolute()
        samples = []
        for file, target in files:
            path = Path(file).absolute()
            key = path.relative_to(root) if path.is_relative_to(root) else path
            samples.append(Sample(key.as_posix(), label_text(target, names), part.split, str(file)))
        return samples
    targets = getattr(dataset, "targets", None)
    if targets is None:
        raise SourceError(f"{part}: torchvision lists no labels for it; pass its folder instead")
    numbers = np.asarray(targets)
    numbers = numbers[:, 0] if numbers.ndim > 1 else numbers  # QMNIST: the class comes first
    return [
        Sample(part.key(index), label_text(int(number), names), part.split, None)
        for index, number in enumerate(numbers)
    ]


_OPENERS = {
    "hfds": _open_hfds,
    "hfids": _open_spooled,
    "tfds": _open_spooled,
    "torch": _open_torch,
    "wds": _open_wds,
}
