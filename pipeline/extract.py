"""Stage one: run the frozen backbone over every image once and write all its taps to a cache.

A cache that is there is gone on with: what is done is left alone, and `update` computes the inputs
that are new or changed and nothing else. What this file does not know: side networks, training; how
the bytes travel (`features/filling.py`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from cache import CacheError, Manifest, Reader, Stack, encode_keys
from pipeline import __version__
from pipeline.backbones.contract import Backbone
from pipeline.backbones.fisher import FisherImages
from pipeline.backbones.prune import ladder_tables
from pipeline.backbones.timm_models import load_backbone
from pipeline.config import ExtractConfig
from pipeline.device import (
    memory_explained,
    name_of,
    pick_device,
    pick_precision,
    precision_name,
    without_tf32,
)
from pipeline.errors import SettingError
from pipeline.features.filling import Extracted, Filling, Skipped, fill
from pipeline.features.job import Inputs, Updating, begin_job
from pipeline.features.writing import plan_layout
from pipeline.labelling.questions import of_source
from pipeline.side.ladder import keep_layers
from pipeline.sources.decode import is_deep_grey
from pipeline.sources.open import open_source
from pipeline.sources.source import Source, source_digests


@dataclass(frozen=True, kw_only=True)
class ExtractionPlan:
    """Reported once, before the first image: what will be done, and where.

    `pending_rows` of `rows` are to be computed.

    `begun_batch_size` is that with which the cache was begun, None in older caches: products of
    another batch size may differ in their last bits.
    """

    rows: int
    pending_rows: int
    bytes: int
    stacks: tuple[Stack, ...]
    device: str
    precision: str
    begun_batch_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Hashed:
    """Reported while the source files are hashed."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """Reported for two splits that share images, byte for byte: `rows` of `split` are also in
    `other`; `example` is a key of such a row, and of its twin there."""

    split: str
    other: str
    rows: int
    example: tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class ExtractResult:
    """What `extract` did. `fingerprint` names the features, `content` their numbers, `labelling`
    what is asked of them. `seconds` and `images_per_second` cover this call's images alone;
    `legs` is where the main thread's time went, in seconds."""

    rows: int
    bytes: int
    complete: bool
    fingerprint: str
    content: str
    labelling: str
    seconds: float
    images_per_second: float
    extracted_rows: int
    skipped: dict[str, str]
    legs: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """Reported while the Fisher information of the backbone's weights is summed up; `skipped`
    unreadable images were passed over on the way."""

    done: int
    total: int
    skipped: int = 0


Record = ExtractionPlan | Updating | Hashed | Repeated | Weighed | Extracted | Skipped
Report = Callable[[Any], None]


@without_tf32()
def extract(config: ExtractConfig, report: Report = lambda _: None) -> ExtractResult:
    """Write the cache that `config` describes, or finish one that was begun.

    A complete cache of the same features and inputs is left alone (`extracted_rows` is 0). Raises
    cache.IdentityMismatch if `config.out` holds other features, or features of other inputs (which
    `config.update` allows for: those that are new or changed are computed, vanished ones leave the
    labelling); cache.LabellingMismatch if the source asks other things of the same inputs;
    ImageError on an unreadable image (unless skipped), BackboneError, SourceError, SettingError,
    DeviceError, and cache.StorageOverflow naming tap and image if a token does not fit the storage
    type.
    """
    device = pick_device(config.device)
    precision = pick_precision(device, config.amp)
    inputs, backbone = _open(config, device, report)
    layout = plan_layout(config, backbone)
    manifest = _manifest(config, inputs, backbone, layout.stacks, layout.gather, precision)
    manifest, tables = _with_ladder(config, manifest, inputs, backbone, report)
    backbone.keep(layout.read)
    with begin_job(config, manifest, tables, inputs, report) as job:
        pending = sum(map(len, job.writer.pending))
        report(
            ExtractionPlan(
                rows=len(inputs.keys),
                pending_rows=pending,
                bytes=job.writer.manifest.nbytes,
                stacks=layout.stacks,
                device=name_of(device),
                precision=precision_name(precision),
                begun_batch_size=job.writer.manifest.notes.get("batch_size"),
            )
        )
        how = Filling(
            backbone=backbone,
            layout=layout,
            precision=precision,
            batch_size=config.batch_size,
            workers=config.workers,
            on_error=config.on_error,
        )
        begin = time.perf_counter()
        with memory_explained("a smaller --batch-size makes a step smaller"):
            legs = fill(job.writer, job.slots, how, report)
        seconds = time.perf_counter() - begin
        job.settle()
    return _result(config.out, pending, seconds, legs)


def _result(out: str, extracted: int, seconds: float, legs: dict[str, float]) -> ExtractResult:
    with Reader(out) as reader:
        return ExtractResult(
            rows=reader.rows,
            bytes=reader.manifest.nbytes,
            complete=True,
            fingerprint=reader.fingerprint,
            content=reader.content,
            labelling=reader.labelling_digest,
            seconds=seconds,
            images_per_second=extracted / seconds if extracted else 0.0,
            extracted_rows=extracted,
            skipped={reader.keys[row]: why for row, why in reader.skipped.items()},
            legs=legs,
        )


def _open(config: ExtractConfig, device: torch.device, report: Report) -> tuple[Inputs, Backbone]:
    source = open_source(
        config.images,
        splits=config.split,
        data_dir=config.data_dir,
        input_key=config.input_key,
        target_key=config.target_key,
        download=config.dataset_download,
    )
    backbone = load_backbone(
        config.model,
        device=device,
        weights=config.weights,
        pretrained=config.pretrained,
        seed=config.seed,
        preprocessing=config.preprocessing(),
    )
    deep: set[bool] = set()
    digests = source_digests(
        source,
        on_error=config.on_error,
        report=lambda done, total: report(Hashed(done=done, total=total)),
        see=lambda data: deep.add(is_deep_grey(data)),
    )
    for repeated in _repeated(source, digests):
        report(repeated)
    asked = of_source(source)
    return Inputs(source=source, digests=digests, deep=True in deep, asked=asked), backbone


# ---- what the cache is ---------------------------------------------------------------------------


def _manifest(
    config: ExtractConfig,
    inputs: Inputs,
    backbone: Backbone,
    stacks: tuple[Stack, ...],
    gather: Any,
    precision: torch.dtype,
) -> Manifest:
    identity: dict[str, Any] = {
        "backbone": backbone.identity(),
        "preprocessing": backbone.preprocessing.to_dict(),
        "taps": [tap for stack in stacks for tap in stack.taps],
        "gather": asdict(gather) if gather else "none",
        "tokens": "all",
        "dtype": config.dtype,
        "precision": precision_name(precision),
        "views": {"count": 1, "recipe": "eval", "seed": 0},
        "versions": {"timm": version("timm"), "torch": torch.__version__.split("+")[0]},
    }
    if inputs.deep:  # only where it decides a number: other caches keep their fingerprints
        identity["decoding"] = {"grey": "by depth"}
    norm = backbone.final_norm
    return Manifest(
        identity=identity,
        storage=config.dtype,
        parts=(len(inputs.keys),),
        stacks=stacks,
        blocks=backbone.block_descriptions,
        final_norm={"kind": norm.kind, "eps": norm.eps},
        notes={
            "created_by": f"sidecache {__version__}",
            "source": inputs.source.description,
            "batch_size": config.batch_size,
        },
    )


def _feature_tables(inputs: Inputs, backbone: Backbone) -> dict[str, np.ndarray]:
    tables = {"keys": encode_keys(inputs.keys), "source_sha256": inputs.digests}
    norm = backbone.final_norm
    for name, tensor in (("weight", norm.weight), ("bias", norm.bias)):
        if tensor is not None:
            tables[f"final_norm/{name}"] = tensor.numpy()
    return tables


def _with_ladder(
    config: ExtractConfig,
    manifest: Manifest,
    inputs: Inputs,
    backbone: Backbone,
    report: Report,
) -> tuple[Manifest, dict[str, np.ndarray]]:
    """The manifest and the features' tables, with LST's pruned initial weights if they are asked
    for: those that the cache has already, or computed now."""
    tables = _feature_tables(inputs, backbone)
    if not config.ladder_init:
        return manifest, tables
    ladder = {
        "init": config.ladder_init,
        "reduction": config.reduction,
        "layers": _layers(config, backbone),
        "samples": config.fisher_samples if config.ladder_init == "fisher" else 0,
        "seed": config.seed,
    }
    manifest = replace(manifest, identity={**manifest.identity, "ladder": ladder})
    try:
        with Reader(config.out, allow_incomplete=True) as reader:
            if reader.fingerprint == manifest.fingerprint:
                found = reader.tables_below("ladder")
                return manifest, tables | {f"ladder/{name}": t for name, t in found.items()}
    except CacheError:
        pass  # no cache yet, or one that the writer will refuse or replace
    made = _ladder(config, inputs.source, backbone, report)
    return manifest, tables | {f"ladder/{name}": table for name, table in made.items()}


def _ladder(
    config: ExtractConfig,
    source: Source,
    backbone: Backbone,
    report: Report,
) -> dict[str, np.ndarray]:
    """LST's pruned initial weights; the Fisher information is that of today's labels."""
    assert config.ladder_init is not None
    images = FisherImages(config, source, backbone) if config.ladder_init == "fisher" else None
    try:
        return ladder_tables(
            backbone.model,
            how=config.ladder_init,
            reduction=config.reduction,
            layers=_layers(config, backbone),
            images=images or (lambda: ()),
            classes=len(images.target.classes) if images else 0,
            pool="cls" if backbone.prefix_tokens else "mean",
            prefix_tokens=backbone.prefix_tokens,
            device=backbone.device,
            seed=config.seed,
            report=lambda done, total: report(
                Weighed(done=done, total=total, skipped=len(images.skipped) if images else 0)
            ),
        )
    except ValueError as error:
        raise SettingError(f"--ladder-init: {error}") from error


def _layers(config: ExtractConfig, backbone: Backbone) -> tuple[int, ...]:
    try:
        return keep_layers(config.keep_layers, backbone.blocks)
    except ValueError as error:
        raise SettingError(f"--keep-layers: {error}") from None


def _repeated(source: Source, digests: np.ndarray) -> Iterator[Repeated]:
    """Images that occur in several splits; the later split is named with the earlier."""
    heads = digests[:, :8].copy().view(np.uint64)[:, 0]
    _, places, counts = np.unique(heads, return_inverse=True, return_counts=True)
    several = np.flatnonzero(counts[places] > 1).tolist()
    first: dict[bytes, dict[str, int]] = {}  # digest → split → its first row
    for row in several:
        first.setdefault(bytes(digests[row]), {}).setdefault(source.rows[row].split, row)
    for nothing in (bytes(32), hashlib.sha256(b"").digest()):
        first.pop(nothing, None)  # what cannot be read is no image
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for row in several:
        split = source.rows[row].split
        for other, twin in first.get(bytes(digests[row]), {}).items():
            if source.splits.index(other) < source.splits.index(split):
                found.setdefault((split, other), []).append((row, twin))
    for (split, other), pairs in found.items():
        row, twin = pairs[0]
        example = (source.rows[row].key, source.rows[twin].key)
        yield Repeated(split=split, other=other, rows=len(pairs), example=example)
