"""What a trained member gets wrong on the rows that chose it: for people to look at.

Validation rows only. The test split is `evaluate`'s, and a run that was validated on it is refused
here. Everything returned is plain data, ready for a page or for JSON.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cache import NameMissing, Reader
from pipeline.config import TrainConfig
from pipeline.device import pick_device, pick_precision, without_tf32
from pipeline.errors import ImageError, RunError
from pipeline.features.labelled import folded_rows, labelled_rows
from pipeline.features.operands import Batches
from pipeline.runs.card import TrainedMember
from pipeline.sources.source import Source
from pipeline.training.scoring import EVAL_BATCH

THUMBNAIL = 160  # pixels, the longer side
TEST = "test"


def examine(
    trained: TrainedMember, config: TrainConfig, reader: Reader, device: str, amp: bool | None
) -> dict[str, Any]:
    """What the task's kind shows of one member on its validation rows, the worst mistakes among it.

    `reader` has the cache it learned from. Raises RunError if it was validated on `test`, or if its
    outputs are not finite.
    """
    if TEST in config.val_split:
        raise RunError("this run was validated on the test split, which a report never reads")
    rows, labels, outputs = _predict(trained, config, reader, device, amp)
    task = trained.task
    found = task.examine(labels, outputs)
    for mistake in found["mistakes"]:
        mistake["row"] = int(rows[mistake.pop("position")])
        mistake["key"] = reader.keys[mistake["row"]]
    return {"kind": task.kind, "rows": len(rows), **found}


@without_tf32()
def _predict(
    trained: TrainedMember, config: TrainConfig, reader: Reader, device: str, amp: bool | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers (N,), labels (N, …) and outputs (N, C) in the target's unit, of the validation
    rows that have a label."""
    chosen = pick_device(device)
    dtype = trained.precision if amp is None else pick_precision(chosen, amp)
    question = trained.task.question
    if question.fold is None:
        labelled = labelled_rows(reader, config.val_split, [question.task])
    else:
        _, labelled = folded_rows(reader, [question])
    network, task = trained.network.to(chosen), trained.task
    batches = Batches(reader, labelled, [network], device=chosen, dtype=dtype)
    with torch.no_grad():
        found = [network(b.operands[0])[0].float().cpu() for b in batches.epoch(EVAL_BATCH)]
    outputs, labels = task.in_units(torch.cat(found).numpy()), labelled.labels[task.question]
    known = task.known(torch.from_numpy(labels)).numpy()
    bad = int((~np.isfinite(outputs[known])).any(axis=1).sum())
    if bad:
        raise RunError(f"the outputs of {trained.id} are not finite on {bad} of {known.sum()} rows")
    return labelled.rows[known], labels[known], outputs[known]


def add_thumbnails(mistakes: Sequence[dict[str, Any]], source: Source, reader: Reader) -> list[str]:
    """Give each mistake its `image`, a data URI; return what could not be shown, and why.

    An image that is not the one the cache was made from is not shown.
    """
    places = {row.key: place for place, row in enumerate(source.rows)}
    try:
        digests = reader.source_sha256
    except NameMissing:
        digests = None
    left_out: dict[str, int] = {}
    for mistake in mistakes:
        place = places.get(mistake["key"])
        reason = None if place is not None else f"not in {source.description}"
        if place is not None:
            try:
                if digests is None or source.sha256(place) == digests[mistake["row"]].tobytes():
                    mistake["image"] = _thumbnail(source, place)
                else:
                    reason = "changed since the cache was made"
            except ImageError:
                reason = "unreadable"
        if reason:
            left_out[reason] = left_out.get(reason, 0) + 1
    return [
        f"{count} of {len(mistakes)} thumbnails: {reason}" for reason, count in left_out.items()
    ]


def _thumbnail(source: Source, place: int) -> str:
    image, room = source.open(place), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(room, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(room.getvalue()).decode()}"
