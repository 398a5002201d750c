"""Stage one: run the frozen backbone over every image once and write all its taps to a cache.

Four legs overlap: decoding (worker processes), the forward pass, the copy to the host, and writing
(threads). What this file does not know: side networks, training.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache import (
    CacheError,
    IdentityMismatch,
    Manifest,
    Reader,
    Stack,
    Target,
    Writer,
    encode_keys,
)
from pipeline.backbone import Backbone, load_backbone, preprocessing_dict
from pipeline.config import ExtractConfig
from pipeline.device import (
    memory_explained,
    name_of,
    pick_device,
    pick_precision,
    precision_name,
    without_tf32,
)
from pipeline.errors import ImageError, SettingError
from pipeline.images import Labels, Source, source_digests
from pipeline.layout import Layout, TokenBuffer, plan_layout
from pipeline.loader import ImageBatch, image_batches
from pipeline.prune import ladder_tables
from pipeline.side.ladder import keep_layers
from pipeline.sources import open_source

WRITERS = 2  # threads that write, each from a buffer of its own; one more is being filled


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Reported once, before the first image: what will be done, and where."""

    rows: int
    pending_rows: int
    bytes: int
    stacks: tuple[Stack, ...]
    device: str
    precision: str


@dataclass(frozen=True, kw_only=True)
class Hashed:
    """Reported while the source files are hashed."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """Reported after every batch handed to the writers."""

    rows: int
    total: int
    bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """Reported for each unreadable image that `on_error = "skip"` left out."""

    key: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ExtractResult:
    """What `extract` did. `seconds` and `images_per_second` cover this call's images alone;
    `legs` is where the main thread's time went, in seconds."""

    rows: int
    bytes: int
    complete: bool
    fingerprint: str
    content: str
    seconds: float
    images_per_second: float
    extracted_rows: int
    skipped: dict[str, str]
    legs: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """Reported while the Fisher information of the backbone's weights is summed up."""

    done: int
    total: int


Report = Callable[[Plan | Hashed | Weighed | Extracted | Skipped], None]


@without_tf32()
def extract(config: ExtractConfig, report: Report = lambda _: None) -> ExtractResult:
    """Write the cache that `config` describes, or finish one that was begun.

    A complete cache of the same identity is left alone (`extracted_rows` is 0). Raises
    cache.IdentityMismatch if `config.out` holds another identity, ImageError on an unreadable
    image (unless skipped), BackboneError, SourceError, SettingError, DeviceError, and
    cache.StorageOverflow naming tap and image if a token does not fit the storage type.
    """
    device = pick_device(config.device)
    precision = pick_precision(device, config.amp)
    source = open_source(config.images, splits=config.split, data_dir=config.data_dir)
    backbone = load_backbone(
        config.model,
        device=device,
        weights=config.weights,
        pretrained=config.pretrained,
        seed=config.seed,
        preprocessing=config.preprocessing(),
    )
    layout = plan_layout(config, backbone)
    digests = source_digests(
        source,
        on_error=config.on_error,
        report=lambda done, total: report(Hashed(done=done, total=total)),
    )
    manifest = _manifest(config, source, backbone, layout, precision, digests)
    tables = _tables(source, backbone, digests)
    if config.ladder_init:
        ladder = _ladder(config, manifest, source, backbone, report)
        tables |= {f"ladder/{name}": table for name, table in ladder.items()}
    backbone.keep(layout.read)
    try:
        writer = Writer.open(config.out, manifest, tables, overwrite=config.overwrite)
    except IdentityMismatch as error:
        raise _name_changed_images(error, config.out, source, digests) from None
    with writer:
        pending_rows = sum(len(run) for run in writer.pending)
        report(
            Plan(
                rows=manifest.rows,
                pending_rows=pending_rows,
                bytes=manifest.nbytes,
                stacks=layout.stacks,
                device=name_of(device),
                precision=precision_name(precision),
            )
        )
        begin = time.perf_counter()
        with memory_explained("a smaller --batch-size makes a step smaller"):
            legs = _run(config, source, backbone, layout, precision, writer, report)
        seconds = time.perf_counter() - begin
    with Reader(config.out) as reader:
        return ExtractResult(
            rows=manifest.rows,
            bytes=manifest.nbytes,
            complete=True,
            fingerprint=reader.fingerprint,
            content=reader.content,
            seconds=seconds,
            images_per_second=pending_rows / seconds if pending_rows else 0.0,
            extracted_rows=pending_rows,
            skipped={source.rows[row].key: why for row, why in reader.skipped.items()},
            legs=legs,
        )


def _run(
    config: ExtractConfig,
    source: Source,
    backbone: Backbone,
    layout: Layout,
    precision: torch.dtype,
    writer: Writer,
    report: Report,
) -> dict[str, float]:
    pending = list(writer.pending)
    legs = {"decoding": 0.0, "forward": 0.0, "writing": 0.0}
    if not pending:
        return legs
    batches = image_batches(
        source,
        backbone.preprocessing.transform(),
        backbone.preprocessing.img_size,
        pending=pending,
        batch_size=config.batch_size,
        workers=config.workers,
        pin_memory=backbone.device.type == "cuda",
    )
    total = sum(len(run) for run in pending)
    row_bytes = writer.manifest.row_nbytes
    begin = last = time.perf_counter()
    done = 0

    def lap(leg: str) -> None:
        nonlocal last
        now = time.perf_counter()
        legs[leg] += now - last
        last = now

    free = [
        TokenBuffer(writer.manifest, layout, config.batch_size, backbone.device)
        for _ in range(WRITERS + 1)
    ]
    in_flight: deque[Future[TokenBuffer]] = deque()
    pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="sidecache-write")
    try:
        for batch in batches:
            lap("decoding")
            if batch.failures and config.on_error == "raise":
                raise ImageError(next(iter(batch.failures.values())))
            for row, reason in batch.failures.items():
                report(Skipped(key=source.rows[row].key, reason=reason))
            if not free:
                free.append(in_flight.popleft().result())
            lap("writing")
            buffer = free.pop()
            buffer.fill(backbone, batch.images, precision)
            lap("forward")
            runs = _overlaps(batch, pending)
            in_flight.append(pool.submit(_write, writer, buffer, batch, runs, source))
            done += sum(len(run) for run in runs)
            report(Extracted(rows=done, total=total, bytes=done * row_bytes, seconds=last - begin))
        for future in in_flight:
            future.result()
        lap("writing")
    finally:
        pool.shutdown(cancel_futures=True)
    return legs


def _write(
    writer: Writer, buffer: TokenBuffer, batch: ImageBatch, runs: list[range], source: Source
) -> TokenBuffer:
    if buffer.overflowing():
        raise buffer.overflow(batch, source)
    for row in batch.failures:
        for host in buffer.host.values():
            host.tensor[row - batch.start] = 0
    errors = {} if batch.start in batch.failures else buffer.measured()
    for run in runs:
        place = slice(run.start - batch.start, run.stop - batch.start)
        arrays = {name: host.array[place] for name, host in buffer.host.items()}
        reasons = {row: why for row, why in batch.failures.items() if row in run}
        measured = errors if run.start == batch.start else {}
        writer.write(run.start, arrays, reasons, measured)
    return buffer


def _overlaps(batch: ImageBatch, pending: Sequence[range]) -> list[range]:
    start, stop = batch.start, batch.start + len(batch.images)
    runs = (range(max(start, run.start), min(stop, run.stop)) for run in pending)
    return [run for run in runs if run]


def _manifest(
    config: ExtractConfig,
    source: Source,
    backbone: Backbone,
    layout: Layout,
    precision: torch.dtype,
    digests: np.ndarray,
) -> Manifest:
    rows = source.rows
    identity: dict[str, Any] = {
        "backbone": backbone.identity(),
        "preprocessing": preprocessing_dict(backbone.preprocessing),
        "taps": [tap for stack in layout.stacks for tap in stack.taps],
        "gather": asdict(layout.gather) if layout.gather else "none",
        "tokens": "all",
        "dtype": config.dtype,
        "precision": precision_name(precision),
        "views": {"count": 1, "recipe": "eval", "seed": 0},
        "source": {
            "files": hashlib.sha256(digests.tobytes()).hexdigest(),
            "keys": _sha256([row.key for row in rows]),
            **_identity_of(source.targets),
            "splits": _sha256([row.split for row in rows]),
        },
        "versions": {"timm": version("timm"), "torch": torch.__version__.split("+")[0]},
    }
    if config.ladder_init:
        identity["ladder"] = {
            "init": config.ladder_init,
            "reduction": config.reduction,
            "layers": _layers(config, backbone),
            "samples": config.fisher_samples if config.ladder_init == "fisher" else 0,
            "seed": config.seed,
        }
    norm = backbone.final_norm
    return Manifest(
        identity=identity,
        storage=config.dtype,
        rows=len(rows),
        stacks=layout.stacks,
        blocks=backbone.block_descriptions,
        targets=tuple(
            Target(name=target.name, kind=target.kind, classes=target.classes)
            for target in source.targets
        ),
        splits=tuple(source.splits),
        final_norm={"kind": norm.kind, "eps": norm.eps},
        notes={"created_by": f"sidecache {version('sidecache')}", "source": source.description},
    )


def _identity_of(targets: Sequence[Labels]) -> dict[str, Any]:
    """Of what is to be predicted: the class "label" alone as ever, anything else by name."""
    if [(target.name, target.kind) for target in targets] == [("label", "class")]:
        (label,) = targets
        return {
            "labels": _sha256(label.values.tolist()),
            "classes": _sha256(list(label.classes)),
        }
    named = {}
    for target in targets:
        digest = hashlib.sha256(target.values.tobytes()).hexdigest()
        named[target.name] = {"kind": target.kind, "labels": digest}
        if target.classes:
            named[target.name]["classes"] = _sha256(list(target.classes))
    return {"targets": named}


def _ladder(
    config: ExtractConfig,
    manifest: Manifest,
    source: Source,
    backbone: Backbone,
    report: Report,
) -> dict[str, np.ndarray]:
    """LST's pruned initial weights: those that the cache has already, or computed now."""
    assert config.ladder_init is not None
    try:
        with Reader(config.out, allow_incomplete=True) as reader:
            if reader.fingerprint == manifest.fingerprint:
                return reader.tables_below("ladder")
    except CacheError:
        pass  # no cache yet, or one that the writer will refuse or replace
    transform = backbone.preprocessing.transform()
    target = _fisher_target(source) if config.ladder_init == "fisher" else None
    rows = _fisher_rows(config, source, target) if target else []

    def images() -> Iterator[tuple[Tensor, int]]:
        for row in rows:
            assert target is not None
            yield transform(source.open(row)).to(backbone.device), int(target.values[row])

    try:
        return ladder_tables(
            backbone.model,
            how=config.ladder_init,
            reduction=config.reduction,
            layers=_layers(config, backbone),
            images=images,
            classes=len(target.classes) if target else 0,
            pool="cls" if backbone.prefix_tokens else "mean",
            prefix_tokens=backbone.prefix_tokens,
            device=backbone.device,
            seed=config.seed,
            report=lambda done, total: report(Weighed(done=done, total=total)),
        )
    except ValueError as error:
        raise SettingError(f"--ladder-init: {error}") from error


def _layers(config: ExtractConfig, backbone: Backbone) -> tuple[int, ...]:
    try:
        return keep_layers(config.keep_layers, backbone.blocks)
    except ValueError as error:
        raise SettingError(f"--keep-layers: {error}") from None


def _fisher_target(source: Source) -> Labels:
    """The classes that the loss for the Fisher information tells apart."""
    for target in source.targets:
        if target.kind == "class":
            return target
    there = ", ".join(f"{target.name} ({target.kind})" for target in source.targets) or "nothing"
    raise SettingError(
        f"--ladder-init fisher: expected a target of kind class, as in a column label:NAME; there "
        f"is {there}. --ladder-init magnitude needs none."
    )


def _fisher_rows(config: ExtractConfig, source: Source, target: Labels) -> list[int]:
    """Numbers of labelled training images, drawn at random from --seed."""
    known = target.values >= 0
    labelled = [i for i, row in enumerate(source.rows) if row.split == "train" and known[i]]
    if not labelled:
        raise SettingError(
            f"--ladder-init fisher: expected labelled images in a split called train, found none "
            f"(splits: {', '.join(source.splits)}). --ladder-init magnitude needs no images."
        )
    order = np.random.default_rng(config.seed).permutation(len(labelled))
    return [labelled[i] for i in order[: config.fisher_samples]]


def _tables(source: Source, backbone: Backbone, digests: np.ndarray) -> dict[str, np.ndarray]:
    rows, norm = source.rows, backbone.final_norm
    tables = {
        "keys": encode_keys([row.key for row in rows]),
        **{f"labels/{target.name}": target.values for target in source.targets},
        "split": np.array([source.splits.index(row.split) for row in rows], np.uint8),
        "source_sha256": digests,
    }
    for name, tensor in (("weight", norm.weight), ("bias", norm.bias)):
        if tensor is not None:
            tables[f"final_norm/{name}"] = tensor.numpy()
    return tables


def _sha256(values: Any) -> str:
    return hashlib.sha256(
        json.dumps(values, ensure_ascii=False, allow_nan=False).encode()
    ).hexdigest()


def _name_changed_images(
    error: IdentityMismatch, out: str, source: Source, digests: np.ndarray
) -> IdentityMismatch:
    """The fingerprint sees that some image changed; the cache's table says which."""
    if all(name != "source.files" for name, _, _ in error.differences):
        return error
    try:
        with Reader(out, allow_incomplete=True) as reader:
            before = dict(zip(reader.keys, map(bytes, reader.source_sha256), strict=True))
    except CacheError:
        return error
    changed = [
        row.key
        for row, digest in zip(source.rows, map(bytes, digests), strict=True)
        if before.get(row.key, digest) != digest
    ]
    if not changed:
        return error
    shown = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
    return IdentityMismatch(f"{error}\n  changed since: {shown}", error.differences)
