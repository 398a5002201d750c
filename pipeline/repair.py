"""Compute damaged rows of a cache again, and nothing else.

What `verify` finds is either single rows, which are written again in their places, or whole shards
(a file that is gone or was cut, a ledger record that cannot be read), which are extracted again. A
row is computed at its old place in a batch of the old size, black where rows are whole: then, on a
machine like the one before, its bits are the old ones, and the ledger's checksum says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cache import Reader, Writer, verify
from pipeline.backbones.behind import backbone_of
from pipeline.config import VerifyConfig
from pipeline.device import pick_device, without_tf32
from pipeline.errors import ImageError, SettingError, SourceError, some
from pipeline.features.filling import Filling, Slots, fill
from pipeline.features.writing import TokenBuffer, layout_of
from pipeline.sources.open import open_source
from pipeline.sources.source import REPAIR

USUAL_BATCH = 64  # of caches that do not say with which they were begun


@dataclass(frozen=True, kw_only=True)
class RepairResult:
    """What `repair` did: `rows` that were computed again, those that came to other bits than before
    (`differing`, by key: another machine or version), and `left`: damage of another kind, which
    only a new extraction mends."""

    rows: int
    differing: list[str]
    left: list[str]


@without_tf32()
def repair(config: VerifyConfig, report: Callable[[Any], None] = lambda _: None) -> RepairResult:
    """Verify a cache and write its damaged rows anew from the images at `config.repair`.

    Raises SourceError if an image that is needed is not there as it was, BackboneError if the
    backbone's weights are others, SettingError for a copy whose numbers no backbone gives, and
    cache errors; nothing is changed then.
    """
    found = verify(config.cache, report)
    left = [str(damage) for damage in found.damaged if damage.row is None]
    rows = sorted({damage.row for damage in found.damaged if damage.row is not None})
    if not rows:
        return RepairResult(rows=0, differing=[], left=left)
    with Reader(config.cache, allow_incomplete=True) as reader:
        if "copied" in reader.manifest.identity:
            raise SettingError(
                f"{config.cache} was copied, and its numbers are not those of the backbone: copy "
                f"it again from {reader.manifest.notes.get('copied_from', 'the other cache')}"
            )
        lost = {int(s) for s in found.lost_shards}
        shards = reader.manifest.shards_of(reader.slots)
        again = [row for row in range(reader.rows) if int(shards[row]) in lost]
        slots = _inputs(config, reader, sorted({*rows, *again}))
        device = pick_device(config.device)
        backbone = backbone_of(
            reader.manifest.identity,
            device=device,
            weights=config.weights,
            pretrained=config.pretrained,
            seed=config.seed,
        )
        layout = layout_of(reader.manifest)
        backbone.keep(layout.read)
        single = [row for row in rows if int(shards[row]) not in lost]
        places = {int(reader.slots[row]): reader.keys[row] for row in single}
        batch_size = reader.manifest.notes.get("batch_size", USUAL_BATCH)
        precision = getattr(torch, reader.manifest.identity["precision"])
    how = Filling(
        backbone=backbone,
        layout=layout,
        precision=precision,
        batch_size=batch_size,
        workers=0,
        on_error="raise",
    )
    with Writer.resume(config.cache) as writer:
        differing = [key for slot, key in places.items() if not _replace(writer, slots, slot, how)]
        writer.forget(lost)
        if lost:
            fill(writer, slots, how, report)
    return RepairResult(rows=len({*rows, *again}), differing=differing, left=left)


def _inputs(config: VerifyConfig, reader: Reader, rows: Sequence[int]) -> Slots:
    """The images of the rows, by slot; SourceError if one is not there as it was."""
    source = open_source(
        str(config.repair),
        data_dir=config.data_dir,
        input_key=config.input_key,
        target_key=config.target_key,
        advice=REPAIR,
    )
    place = {row.key: number for number, row in enumerate(source.rows)}
    digests = reader.source_sha256
    numbers = np.full(reader.manifest.slots, -1)
    missing = []
    for row in rows:
        number = place.get(reader.keys[row])
        if number is None or source.sha256(number) != bytes(digests[row]):
            missing.append(reader.keys[row])
        else:
            numbers[reader.slots[row]] = number
    if missing:
        raise SourceError(
            f"{config.repair}: {len(missing)} of {len(rows)} damaged rows' images are not there as "
            f"they were: {some(missing)}. Bring them back; `sidecache extract --update` computes "
            f"what has changed"
        )
    return Slots(source=source, keys=reader.slot_keys, numbers=numbers)


def _replace(writer: Writer, slots: Slots, slot: int, how: Filling) -> bool:
    """Compute one slot and write it in its place; whether its bits are those of before."""
    (batch,) = how.backbone.batches(  # black where there is nothing to compute
        slots,
        pending=[range(slot, slot + 1)],
        batch_size=how.batch_size,
        starts=writer.manifest.part_starts[:-1],
        workers=0,
    )
    if slot in batch.failures:
        raise ImageError(batch.failures[slot])
    buffer = TokenBuffer(writer.manifest, how.layout, len(batch.images), how.backbone.device)
    buffer.fill(how.backbone, batch.images, how.precision)
    buffer.overflowing()  # waits for the copy; black images may overflow, this one did not before
    place = slice(slot - batch.start, slot - batch.start + 1)
    return writer.replace(slot, {name: host.array[place] for name, host in buffer.host.items()})
