"""Make a smaller cache from a cache: fewer taps, sums of taps, another storage type, fewer splits.

No backbone is needed. A copy is a cache like any other; its identity says what it was copied from,
so it never passes for one that came straight from the backbone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache import Manifest, Reader, Stack, Writer, decode_keys, encode_keys, row_tables
from pipeline.config import CopyConfig
from pipeline.errors import SettingError
from pipeline.features.casting import (
    host_buffer,
    restore,
    rounding_error,
    store,
    total_error,
)
from pipeline.features.taps import choose_gather, choose_taps
from pipeline.features.writing import gathered_stacks, overflow_error
from pipeline.side.gather import Gather

_CHUNK_BYTES = 32 * 2**20  # of the source's rows at a time


@dataclass(frozen=True, kw_only=True)
class Copied:
    """Reported after each run of rows."""

    rows: int
    total: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class CopyResult:
    """What `copy` did; `source_bytes` are those of the same rows in the source."""

    rows: int
    bytes: int
    source_bytes: int
    fingerprint: str
    content: str
    seconds: float
    copied_rows: int


def copy(config: CopyConfig, report: Callable[[Copied], None] = lambda _: None) -> CopyResult:
    """Write `config.dst` from `config.src`, or finish a copy that was begun.

    Values are decoded, summed in float32 if sums are asked for, and rounded once. Raises cache
    errors for either cache, StorageOverflow naming tap and row among them; SettingError for taps or
    sums that the source cannot give.
    """
    begin = time.perf_counter()
    with Reader(config.src) as reader:
        rows = _rows(reader, config.split)
        shapes = {tap: stack.shape[1:] for stack in reader.manifest.stacks for tap in stack.taps}
        gather = choose_gather(config, shapes, config.src)
        stacks = _stacks(config, reader, gather)
        manifest = _manifest(config, reader, rows, gather, stacks)
        tables = _tables(config, reader, rows)
        with Writer.open(config.dst, manifest, tables, overwrite=config.overwrite) as writer:
            copied = _run(reader, rows, gather, writer, report)
        source_bytes = len(rows) * reader.manifest.row_nbytes
    with Reader(config.dst) as done:
        return CopyResult(
            rows=len(rows),
            bytes=done.manifest.nbytes,
            source_bytes=source_bytes,
            fingerprint=done.fingerprint,
            content=done.content,
            seconds=time.perf_counter() - begin,
            copied_rows=copied,
        )


def _run(
    reader: Reader,
    rows: np.ndarray,
    gather: Gather | None,
    writer: Writer,
    report: Callable[[Copied], None],
) -> int:
    pending = writer.pending
    total = sum(map(len, pending))
    most = max(1, _CHUNK_BYTES // reader.manifest.row_nbytes)
    copied = 0
    for run in pending:
        for start in range(run.start, run.stop, most):
            part = rows[start : min(start + most, run.stop)]
            skipped = {
                start + i: reader.skipped[row]
                for i, row in enumerate(part.tolist())
                if row in reader.skipped
            }
            views = [
                _convert(reader, part, view, gather, writer.manifest)
                for view in range(writer.manifest.views)
            ]
            arrays = {
                stack.name: np.stack([arrays[stack.name] for arrays, _ in views], axis=1)
                for stack in writer.manifest.stacks
            }
            errors = {} if skipped else views[0][1]
            writer.write(start, arrays, skipped, errors)
            copied += len(part)
            done = copied * writer.manifest.row_nbytes
            report(Copied(rows=copied, total=total, bytes=done))
    return copied


def _convert(
    reader: Reader, rows: np.ndarray, view: int, gather: Gather | None, into: Manifest
) -> tuple[dict[str, np.ndarray], dict[str, tuple[float, float, float]]]:
    """Some rows of one view as the new cache stores them, and what rounding the first one lost."""
    features: dict[str, Tensor] = {}
    for stack in reader.manifest.stacks:
        shape = (len(rows), *reader.manifest.stored_shape(stack.name))
        buffer = host_buffer(shape, reader.manifest.storage, pinned=False)
        reader.read_into(rows, buffer.array, stack=stack.name, view=view)
        tokens = restore(buffer.tensor, stack.dim)
        features |= zip(stack.taps, tokens.unbind(1), strict=True)
    if gather:
        features = gather.reduce(features, into.stacks[0].prefix_tokens)
    keys = [reader.keys[row] for row in rows]
    arrays, errors = {}, {}
    for stack in into.stacks:
        shape = (len(rows), *into.stored_shape(stack.name))
        buffer = host_buffer(shape, into.storage, pinned=False)
        lost = []
        for position, tap in enumerate(stack.taps):
            part = buffer.tensor[:, position]
            store(features[tap], part)
            _refuse_overflow(tap, features[tap], part, stack, into.storage, keys)
            lost.append(rounding_error(features[tap][:1], part[:1]))
        arrays[stack.name] = buffer.array
        if into.storage != "float32":
            errors[stack.name] = total_error(torch.stack(lost))
    return arrays, errors


def _refuse_overflow(
    tap: str, exact: Tensor, stored: Tensor, stack: Stack, storage: str, keys: Sequence[str]
) -> None:
    fits = restore(stored, stack.dim).isfinite().flatten(1).all(dim=1)
    if not fits.all():
        row = int((~fits).nonzero()[0])
        least, greatest = torch.aminmax(exact[row])
        raise overflow_error(tap, keys[row], least.item(), greatest.item(), storage)


def _rows(reader: Reader, splits: Sequence[str] | None) -> np.ndarray:
    """Rows of the splits; of the whole cache, skipped rows included, if none is named."""
    if splits is None:
        return np.arange(reader.manifest.rows)
    rows = reader.split_rows(*splits)
    if len(rows) == 0:
        raise SettingError(f"split {' + '.join(splits)}: it has no rows")
    return rows


def _stacks(config: CopyConfig, reader: Reader, gather: Gather | None) -> tuple[Stack, ...]:
    stacks = reader.manifest.stacks
    if gather:
        return gathered_stacks(gather, stacks[0])
    chosen = choose_taps(config.taps, [tap for stack in stacks for tap in stack.taps])
    kept = []
    for stack in stacks:
        if taps := tuple(tap for tap in stack.taps if tap in chosen):
            kept.append(dataclasses.replace(stack, taps=taps))
    return tuple(kept)


def _manifest(
    config: CopyConfig,
    reader: Reader,
    rows: np.ndarray,
    gather: Gather | None,
    stacks: tuple[Stack, ...],
) -> Manifest:
    source = reader.manifest
    storage = config.dtype or source.storage
    splits = source.splits if config.split is None else tuple(config.split)
    identity: dict[str, Any] = {
        **source.identity,
        "taps": [tap for stack in stacks for tap in stack.taps],
        "dtype": storage,
        "copied": {"fingerprint": reader.fingerprint, "splits": list(splits)},
    }
    if gather:
        identity["gather"] = dataclasses.asdict(gather)
    return dataclasses.replace(
        source,
        identity=identity,
        storage=storage,
        rows=len(rows),
        rows_per_shard=0,
        stacks=stacks,
        splits=splits,
        notes={**source.notes, "copied_from": str(config.src)},
    )


def _tables(config: CopyConfig, reader: Reader, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The source's tables; those with a value a row for the rows that are copied."""
    names = reader.backend.document["tables"]
    tables = {name: reader.table(name) for name in names}
    keys = decode_keys(tables["keys"])
    tables |= {name: tables[name][rows] for name in row_tables(reader.manifest) if name in names}
    tables["keys"] = encode_keys([keys[row] for row in rows])
    if config.split is not None:
        old = reader.manifest.splits
        renumbered = np.array([_place(name, config.split) for name in old], np.uint8)
        tables["split"] = renumbered[tables["split"]]
    return tables


def _place(name: str, names: Sequence[str]) -> int:
    return list(names).index(name) if name in names else 0
