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
from pipeline.features.labelled import labelled_rows
from pipeline.features.operands import Batches
from pipeline.runs.run import TrainedMember
from pipeline.sources.source import Source
from pipeline.tasks.metrics import average_precision
from pipeline.training.scoring import EVAL_BATCH

SHOWN = 12  # mistakes
MOST_CLASSES = 30  # of a confusion matrix that one can read
MOST_PAIRS = 20
MOST_DOTS = 2000  # of a scatter plot
THUMBNAIL = 160  # pixels, the longer side
TEST = "test"


def examine(
    trained: TrainedMember, config: TrainConfig, reader: Reader, device: str, amp: bool | None
) -> dict[str, Any]:
    """Confusion or scatter, and the worst mistakes, of one member on its validation rows.

    `reader` has the cache it learned from. Raises RunError if it was validated on `test`, or if its
    outputs are not finite.
    """
    if TEST in config.val_split:
        raise RunError("this run was validated on the test split, which a report never reads")
    rows, labels, outputs = _predict(trained, config, reader, device, amp)
    task = trained.task
    found = KINDS[task.kind](labels, outputs, list(task.classes))
    for mistake in found["mistakes"]:
        mistake["row"] = int(rows[mistake.pop("position")])
        mistake["key"] = reader.keys[mistake["row"]]
    return {"kind": task.kind, "rows": len(rows), **found}


@without_tf32()
def _predict(
    trained: TrainedMember, config: TrainConfig, reader: Reader, device: str, amp: bool | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers (N,), labels (N, …) and the network's outputs (N, C) of the validation rows."""
    chosen = pick_device(device)
    dtype = trained.precision if amp is None else pick_precision(chosen, amp)
    labelled = labelled_rows(reader, config.val_split, [trained.task.name])
    network, task = trained.network.to(chosen), trained.task
    batches = Batches(reader, labelled, [network], device=chosen, dtype=dtype)
    with torch.no_grad():
        found = [network(b.operands[0])[0].float().cpu() for b in batches.epoch(EVAL_BATCH)]
    outputs, labels = torch.cat(found).numpy(), labelled.labels[task.name]
    if task.kind == "regression":
        outputs = outputs * task.scale + task.centre
    known = task.known(torch.from_numpy(labels)).numpy()
    bad = int((~np.isfinite(outputs[known])).any(axis=1).sum())
    if bad:
        raise RunError(f"the outputs of {trained.id} are not finite on {bad} of {known.sum()} rows")
    return labelled.rows[known], labels[known], outputs[known]


def confusion(labels: np.ndarray, outputs: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """Class labels (N,) against logits (N, C): the matrix of counts [true][predicted], or the most
    confused pairs where there are too many classes; the most confident mistakes first."""
    probabilities = _softmax(outputs)
    predicted = probabilities.argmax(axis=1)
    counts = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    confidence = probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:SHOWN]
    of_class = counts.sum(axis=1)
    off = counts * ~np.eye(len(classes), dtype=bool)
    order = np.argsort(-off, axis=None, kind="stable")[:MOST_PAIRS]
    least = min(2, off.max(initial=1))  # once is chance, unless there is nothing else
    pairs = [divmod(int(place), len(classes)) for place in order if off.flat[place] >= least]
    return {
        "classes": classes,
        "correct": int((predicted == labels).sum()),
        "matrix": counts.tolist() if len(classes) <= MOST_CLASSES else None,
        "pairs": [
            {
                "truth": classes[true],
                "predicted": classes[other],
                "count": int(counts[true, other]),
                "of": int(of_class[true]),
            }
            for true, other in pairs
        ],
        "mistakes": [
            {
                "position": int(i),
                "truth": classes[labels[i]],
                "predicted": classes[predicted[i]],
                "confidence": float(confidence[i]),
            }
            for i in worst
        ],
    }


def precision_by_class(
    labels: np.ndarray, outputs: np.ndarray, classes: list[str]
) -> dict[str, Any]:
    """0/1 labels (N, C) against logits (N, C): average precision a class (None without a positive
    row), lowest first; the most confident false positives first."""
    truth, probabilities = labels > 0, 1 / (1 + np.exp(-outputs.astype(np.float64)))
    table = [
        {
            "name": name,
            "rows": int(truth[:, c].sum()),
            "ap": average_precision(outputs[:, c], truth[:, c]) if truth[:, c].any() else None,
        }
        for c, name in enumerate(classes)
    ]
    false = np.where(truth | (probabilities < 0.5), -1.0, probabilities)
    order = np.argsort(-false, axis=None, kind="stable")[:SHOWN]
    places = [divmod(int(place), len(classes)) for place in order if false.flat[place] > 0]
    return {
        "classes": classes,
        "table": sorted(table, key=lambda line: (line["ap"] is None, line["ap"] or 0)),
        "mistakes": [
            {
                "position": i,
                "truth": ", ".join(classes[k] for k in np.flatnonzero(truth[i])) or "none",
                "predicted": classes[c],
                "confidence": float(probabilities[i, c]),
            }
            for i, c in places
        ],
    }


def deviations(labels: np.ndarray, outputs: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """Numbers (N,) against predictions (N, 1): points for a scatter plot, the largest errors."""
    predicted = outputs[:, 0]
    error = np.abs(predicted - labels)
    worst = np.argsort(-error, kind="stable")[:SHOWN]
    step = -(-len(labels) // MOST_DOTS)  # every step-th row: rows lie in no order of their value
    points = np.stack([labels, predicted], axis=1)[::step].astype(float).round(6)
    return {
        "points": points.tolist(),
        "every": step,
        "mae": float(error.mean()),
        "mistakes": [
            {
                "position": int(i),
                "truth": float(labels[i]),
                "predicted": float(predicted[i]),
                "error": float(predicted[i] - labels[i]),
            }
            for i in worst
        ],
    }


KINDS = {"class": confusion, "multilabel": precision_by_class, "regression": deviations}


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


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
