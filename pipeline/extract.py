"""Stage one: run the frozen backbone over every image once and write all its taps to a cache.

Four legs overlap: decoding (worker processes), the forward pass, the copy to the host, and writing
(threads). Tokens are cast to the storage type on the device, straight into the batch's buffer as
each block finishes. What this file does not know: side networks, training.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
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
    StorageOverflow,
    Target,
    Writer,
    encode_keys,
)
from pipeline.backbone import Backbone, load_backbone, preprocessing_dict
from pipeline.config import ExtractConfig
from pipeline.device import name_of, pick_device, pick_precision, precision_name
from pipeline.errors import ImageError
from pipeline.images import Source, source_digests
from pipeline.loader import ImageBatch, image_batches
from pipeline.sources import open_source
from pipeline.taps import host_buffer, parse_taps

STACK = "tokens"
WRITERS = 2  # threads that write, each from a buffer of its own; one more is being filled


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Reported once, before the first image: what will be done, and where."""

    rows: int
    pending_rows: int
    bytes: int
    taps: tuple[str, ...]
    tokens: int
    dim: int
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


Report = Callable[[Plan | Hashed | Extracted | Skipped], None]


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
    taps = parse_taps(config.taps, backbone.blocks)
    digests = source_digests(
        source,
        on_error=config.on_error,
        report=lambda done, total: report(Hashed(done=done, total=total)),
    )
    manifest = _manifest(config, source, backbone, taps, precision, digests)
    tables = _tables(source, backbone, digests)
    backbone.keep(taps)
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
                taps=taps,
                tokens=backbone.tokens,
                dim=backbone.dim,
                device=name_of(device),
                precision=precision_name(precision),
            )
        )
        begin = time.perf_counter()
        legs = _run(config, source, backbone, taps, precision, writer, report)
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
    taps: Sequence[str],
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

    shape = (config.batch_size, 1, len(taps), backbone.tokens, backbone.dim)
    free = [_Buffer(shape, config.dtype, backbone.device) for _ in range(WRITERS + 1)]
    in_flight: deque[Future[_Buffer]] = deque()
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
            in_flight.append(pool.submit(_write, writer, buffer, batch, runs, source, taps))
            done += sum(len(run) for run in runs)
            report(Extracted(rows=done, total=total, bytes=done * row_bytes, seconds=last - begin))
        for future in in_flight:
            future.result()
        lap("writing")
    finally:
        pool.shutdown(cancel_futures=True)
    return legs


class _Buffer:
    """Room for one batch of stored tokens (B, 1, taps, T, D), on the device and on the host."""

    def __init__(self, shape: tuple[int, ...], storage: str, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.host, self.array = host_buffer(shape, storage, pinned=on_gpu)
        self.device = torch.empty(shape, dtype=self.host.dtype, device=device) if on_gpu else None
        self.extremes = torch.zeros(shape[2], 2, device=device)  # least and greatest, per tap
        self.copied = torch.cuda.Event() if on_gpu else None

    def fill(self, backbone: Backbone, images: Tensor, precision: torch.dtype) -> None:
        """Forward `images`, cast every tap into place, begin the copy to the host."""
        size = len(images)
        into = self.host if self.device is None else self.device

        def sink(position: int, tokens: Tensor) -> None:
            into[:size, 0, position].copy_(tokens)
            self.extremes[position] = torch.stack(torch.aminmax(tokens)).float()

        backbone.read_taps(images.to(backbone.device, non_blocking=True), sink, precision=precision)
        if self.device is not None and self.copied is not None:
            self.host[:size].copy_(self.device[:size], non_blocking=True)
            self.copied.record()

    def overflowing(self) -> bool:
        """Wait for the copy; whether a token was NaN or left the range of the storage type."""
        if self.copied is not None:
            self.copied.synchronize()
        return not bool(self.extremes.to(self.host.dtype).isfinite().all())


def _write(
    writer: Writer,
    buffer: _Buffer,
    batch: ImageBatch,
    runs: list[range],
    source: Source,
    taps: Sequence[str],
) -> _Buffer:
    if buffer.overflowing():
        raise _overflow(buffer, batch, source, taps)
    for row in batch.failures:
        buffer.host[row - batch.start] = 0
    for run in runs:
        part = buffer.array[run.start - batch.start : run.stop - batch.start]
        reasons = {row: why for row, why in batch.failures.items() if row in run}
        writer.write(run.start, {STACK: part}, reasons)
    return buffer


def _overflow(
    buffer: _Buffer, batch: ImageBatch, source: Source, taps: Sequence[str]
) -> StorageOverflow:
    bad = ~buffer.host[: len(batch.images), 0].isfinite().flatten(2).all(dim=2)  # (B, taps)
    row, tap = (int(i) for i in bad.nonzero()[0])
    least, greatest = buffer.extremes[tap].tolist()
    storage = precision_name(buffer.host.dtype)
    if np.isfinite(least) and np.isfinite(greatest):
        what = f"values from {least:.4g} to {greatest:.4g} do not fit {storage}"
        advice = "--dtype bfloat16 has the range of float32"
    else:
        what = "the backbone itself gave NaN or infinity"
        advice = "try --no-amp, and check the weights"
    return StorageOverflow(
        f"tap {taps[tap]} of {source.rows[batch.start + row].key}: {what}; {advice}"
    )


def _overlaps(batch: ImageBatch, pending: Sequence[range]) -> list[range]:
    start, stop = batch.start, batch.start + len(batch.images)
    runs = (range(max(start, run.start), min(stop, run.stop)) for run in pending)
    return [run for run in runs if run]


def _manifest(
    config: ExtractConfig,
    source: Source,
    backbone: Backbone,
    taps: tuple[str, ...],
    precision: torch.dtype,
    digests: np.ndarray,
) -> Manifest:
    rows = source.rows
    identity = {
        "backbone": backbone.identity(),
        "preprocessing": preprocessing_dict(backbone.preprocessing),
        "taps": list(taps),
        "gather": "none",
        "tokens": "all",
        "dtype": config.dtype,
        "precision": precision_name(precision),
        "views": {"count": 1, "recipe": "eval", "seed": 0},
        "source": {
            "files": hashlib.sha256(digests.tobytes()).hexdigest(),
            "keys": _sha256([row.key for row in rows]),
            "labels": _sha256([row.label for row in rows]),
            "classes": _sha256(list(source.classes)),
            "splits": _sha256([row.split for row in rows]),
        },
        "versions": {"timm": version("timm"), "torch": torch.__version__.split("+")[0]},
    }
    norm = backbone.final_norm
    return Manifest(
        identity=identity,
        storage=config.dtype,
        rows=len(rows),
        stacks=(
            Stack(
                name=STACK,
                taps=taps,
                tokens=backbone.tokens,
                prefix_tokens=backbone.prefix_tokens,
                dim=backbone.dim,
            ),
        ),
        targets=(Target(name="label", classes=source.classes),),
        splits=tuple(source.splits),
        final_norm={"kind": norm.kind, "eps": norm.eps},
        notes={"created_by": f"sidecache {version('sidecache')}", "source": source.description},
    )


def _tables(source: Source, backbone: Backbone, digests: np.ndarray) -> dict[str, np.ndarray]:
    rows, norm = source.rows, backbone.final_norm
    tables = {
        "keys": encode_keys([row.key for row in rows]),
        "labels/label": np.array([row.label for row in rows], np.int64),
        "split": np.array([source.splits.index(row.split) for row in rows], np.uint8),
        "source_sha256": digests,
    }
    for name, tensor in (("weight", norm.weight), ("bias", norm.bias)):
        if tensor is not None:
            tables[f"final_norm/{name}"] = tensor.numpy()
    return tables


def _sha256(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, ensure_ascii=False).encode()).hexdigest()


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
