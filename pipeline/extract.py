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
from pipeline import __version__
from pipeline.backbones.contract import Backbone
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
from pipeline.errors import ImageError, SettingError
from pipeline.features.writing import Layout, TokenBuffer, plan_layout
from pipeline.side.ladder import keep_layers
from pipeline.sources.batches import ImageBatch
from pipeline.sources.decode import is_deep_grey
from pipeline.sources.open import open_source
from pipeline.sources.source import Source, TargetColumn, source_digests

WRITERS = 2  # threads that write, each from a buffer of its own; one more is being filled


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Reported once, before the first image: what will be done, and where.

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
    """Reported while the Fisher information of the backbone's weights is summed up; `skipped`
    unreadable images were passed over on the way."""

    done: int
    total: int
    skipped: int = 0


Report = Callable[[Plan | Hashed | Repeated | Weighed | Extracted | Skipped], None]


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
    layout = plan_layout(config, backbone)
    deep: set[bool] = set()
    digests = source_digests(
        source,
        on_error=config.on_error,
        report=lambda done, total: report(Hashed(done=done, total=total)),
        see=lambda data: deep.add(is_deep_grey(data)),
    )
    for repeated in _repeated(source, digests):
        report(repeated)
    decoding = {"grey": "by depth"} if True in deep else {}
    manifest = _manifest(config, source, backbone, layout, precision, digests, decoding)
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
                begun_batch_size=writer.manifest.notes.get("batch_size"),
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
    batches = backbone.batches(
        source,
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
    decoding: dict[str, str],
) -> Manifest:
    rows = source.rows
    identity: dict[str, Any] = {
        "backbone": backbone.identity(),
        "preprocessing": backbone.preprocessing.to_dict(),
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
    if decoding:  # only where it decides a number: other caches keep their fingerprints
        identity["decoding"] = decoding
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
        notes={
            "created_by": f"sidecache {__version__}",
            "source": source.description,
            "batch_size": config.batch_size,
        },
    )


def _identity_of(targets: Sequence[TargetColumn]) -> dict[str, Any]:
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
    images = _FisherImages(config, source, backbone) if config.ladder_init == "fisher" else None
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


class _FisherImages:
    """What the Fisher information is summed over: (3, H, W) and its class, the same at every call.

    Labelled training images in an order drawn from --seed, as many as --fisher-samples; one that
    cannot be read is `skipped` for the next, or raised, as --on-error says.
    """

    def __init__(self, config: ExtractConfig, source: Source, backbone: Backbone) -> None:
        self.config, self.source, self.backbone = config, source, backbone
        self.target = _fisher_target(source)
        self.rows = _fisher_rows(config, source, self.target)
        self.skipped: dict[int, str] = {}

    def __call__(self) -> Iterator[tuple[Tensor, int]]:
        left = self.config.fisher_samples
        for row in self.rows:
            if left == 0:
                return
            if row in self.skipped:
                continue
            try:
                image = self.source.open(row)
            except ImageError as error:
                if self.config.on_error == "raise":
                    raise
                self.skipped[row] = str(error)
                continue
            left -= 1
            yield (
                self.backbone.prepare(image).to(self.backbone.device),
                int(self.target.values[row]),
            )
        if len(self.skipped) == len(self.rows):
            raise SettingError(
                f"expected labelled training images that can be read, came none of "
                f"{len(self.rows)} ({self.skipped[self.rows[0]]}); --ladder-init magnitude needs "
                "no images"
            )


def _fisher_target(source: Source) -> TargetColumn:
    """The classes that the loss for the Fisher information tells apart."""
    for target in source.targets:
        if target.kind == "class":
            return target
    there = ", ".join(f"{target.name} ({target.kind})" for target in source.targets) or "nothing"
    raise SettingError(
        f"--ladder-init fisher: expected a target of kind class, as in a column label:NAME; there "
        f"is {there}. --ladder-init magnitude needs none."
    )


def _fisher_rows(config: ExtractConfig, source: Source, target: TargetColumn) -> list[int]:
    """Numbers of all labelled training images, in an order drawn from --seed."""
    known = target.values >= 0
    labelled = [i for i, row in enumerate(source.rows) if row.split == "train" and known[i]]
    if not labelled:
        raise SettingError(
            f"--ladder-init fisher: expected labelled images in a split called train, found none "
            f"(splits: {', '.join(source.splits)}). --ladder-init magnitude needs no images."
        )
    order = np.random.default_rng(config.seed).permutation(len(labelled))
    return [labelled[i] for i in order]


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
