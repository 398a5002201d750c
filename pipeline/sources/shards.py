"""webdataset's shards: tars in which the files of one sample share a name up to its first dot.

Which shards there are, and which members hold images and labels, timm's reader says
(`timm_sets`); here they are listed, and their images read at their offsets, as `tars` does.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.errors import SourceError
from pipeline.sources.samples import Sample, as_source_error
from pipeline.sources.tars import Span

MEMBER = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")  # a sample's key ends at the first dot


def read_shard(
    path: Path,
    shard: str,
    *,
    split: str,
    what: str,
    image_ends: Sequence[str],
    label_field: str | None,
) -> Iterator[Sample]:
    """The samples of the tar `path`, which keys and messages call `shard`; places are Spans.

    The image is the first member that ends as one of `image_ends`; the label is the number in
    `.cls`, or the field `label_field` of `.json`. Raises SourceError, which begins with `what`, for
    what is no tar and for a sample without image or label.
    """
    what = f"{what}, shard {shard}"
    files: dict[str, dict[str, tarfile.TarInfo]] = {}
    with as_source_error(what), tarfile.open(path, "r:") as tar:
        for info in filter(tarfile.TarInfo.isfile, tar):
            if member := MEMBER.fullmatch(info.name):
                files.setdefault(member[1], {})[member[2].lower()] = info
        for key, found in files.items():
            image = next((found[end] for end in image_ends if end in found), None)
            if image is None:
                raise SourceError(
                    f"{what}: sample {key} has no {' or '.join(image_ends)}, only "
                    f"{', '.join(found)}; name the images' suffix with --input-key"
                )
            with as_source_error(f"{what}: sample {key}"):
                label = _label(tar, found, label_field, f"{what}: sample {key}")
            span = Span(str(path), image.offset_data, image.size)
            yield Sample(key=f"{shard}/{key}", label=label, split=split, place=span)


def _label(
    tar: tarfile.TarFile, found: dict[str, tarfile.TarInfo], field: str | None, what: str
) -> str:
    end = "json" if field else "cls"
    file = tar.extractfile(found[end]) if end in found else None
    if file is None:
        raise SourceError(f"{what} has no .{end} for its label; see --target-key")
    text = file.read().decode()
    if not field:
        return str(int(text))
    fields = json.loads(text)
    if field not in fields:
        raise SourceError(f"{what}: no field {field!r} in its .json, only {', '.join(fields)}")
    return str(fields[field])
