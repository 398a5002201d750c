"""Make a smaller cache from a cache: fewer taps, sums of taps, another storage type, fewer splits.

No backbone is needed. A copy is a cache like any other; where its numbers are not those that an
extraction would have written (sums of rounded taps, values rounded twice), its identity says what
they were made from. A copy has the rows of today alone, without what updates left behind.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cache import Manifest, Reader, Stack, Writer, encode_keys
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
from pipeline.labelling.questions import Questions, of_reader
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
        asked = _asked(config, reader, rows)
        tables = {**_tables(reader, asked, rows), **asked.tables}
        labelling = asked.labelling
        with Writer(config.dst, manifest, labelling, tables, overwrite=config.overwrite) as writer:
            copied = _run(reader, rows, gather, writer, report)
        source_bytes = len(rows) * reader.manifest.slot_nbytes
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
    most = max(1, _CHUNK_BYTES // reader.manifest.slot_nbytes)
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
            done = copied * writer.manifest.slot_nbytes
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
        return np.arange(reader.rows)
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
    """Taps that are left out change no number; another storage type and sums do, and then the
    fingerprint speaks of the cache that they were made from."""
    source = reader.manifest
    storage = config.dtype or source.storage
    identity = {**source.identity, "taps": [tap for stack in stacks for tap in stack.taps]}
    if gather or storage != source.storage:
        identity |= {"dtype": storage, "copied": {"fingerprint": reader.fingerprint}}
    if gather:
        identity["gather"] = dataclasses.asdict(gather)
    same = identity == source.identity
    return dataclasses.replace(
        source,
        identity=identity,
        storage=storage,
        parts=(len(rows),),
        slots_per_shard=0,
        stacks=stacks,
        notes={**source.notes, "copied_from": str(config.src)},
        formerly=source.formerly if same else "",
    )


def _asked(config: CopyConfig, reader: Reader, rows: np.ndarray) -> Questions:
    """What the source cache asks of these rows; of its splits those that are copied are left."""
    keys = reader.keys
    asked = of_reader(reader).rows(rows, [keys[row] for row in rows.tolist()])
    if config.split is None:
        return asked
    old, new = reader.labelling.splits, tuple(config.split)
    place = np.array([new.index(name) if name in new else -1 for name in old], np.int16)
    return Questions(
        keys=asked.keys,
        labelling=dataclasses.replace(asked.labelling, splits=new),
        tables={**asked.tables, "split": place[asked.tables["split"]]},
    )


def _tables(reader: Reader, asked: Questions, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The tables of the features: what the rows' slots have, and those of the whole cache."""
    tables = {"keys": encode_keys(asked.keys)}
    if reader.has("source_sha256"):
        tables["source_sha256"] = reader.source_sha256[rows]
    for stack in reader.manifest.stacks:
        if reader.has(f"lengths/{stack.name}"):
            tables[f"lengths/{stack.name}"] = reader.lengths(stack.name)[rows]
    for above in ("final_norm", "ladder"):
        found = reader.tables_below(above)
        tables |= {f"{above}/{name}": table for name, table in found.items()}
    return tables
