"""Several labels: any number of classes apply to a row, or none.

Labels are 1 where a class applies, else 0, (B, C), -1 throughout where a row has none; outputs a
logit a class; the loss is binary cross-entropy, mean over the classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import SourceError
from pipeline.tasks.classes import number_labels
from pipeline.tasks.contract import SHOWN, Answer, Parsed, Task, Where, ranked

NO_NAME = "-"  # in a cell: known, and none applies


class MultilabelTask(Task):
    """The score is mean average precision."""

    kind = "multilabel"
    column = "labels"
    cell = "classes separated by `;`"
    scores: ClassVar[Mapping[str, str]] = {"map": "mAP"}

    @classmethod
    def parse(cls, cells: Sequence[str], known: tuple[str, ...] | None, where: Where) -> Parsed:
        """Names separated by `;`, `-` for none of them, "" where unknown → int8 (N, C), -1
        throughout where unknown. Each name counts as a label of its own does in a class target."""
        rows: list[int] = []
        names: list[str] = []
        for row, cell in enumerate(cells):
            if cell in ("", NO_NAME):
                continue
            parts = [part.strip() for part in cell.split(";")]
            if not {"", NO_NAME, "-1"}.isdisjoint(parts):
                raise SourceError(
                    f"{where(row)}: expected names separated by `;` (or `{NO_NAME}` alone where "
                    f"none applies, or nothing where that is not known), found {cell!r}"
                )
            rows += [row] * len(parts)
            names += parts
        classes, numbers = number_labels(names, known, where=lambda name: where(rows[name]))
        if cells and not classes:
            raise SourceError(f"{where(0)} and all after it: no name; remove the column")
        values = np.zeros((len(cells), len(classes)), np.int8)
        values[np.array([not cell for cell in cells], bool)] = -1
        values[np.array(rows, np.int64), numbers] = 1
        return classes, values

    def written(self, label: Any) -> str:
        if label[0] < 0:
            return ""
        holding = zip(self.classes, label, strict=True)
        return ";".join(name for name, holds in holding if holds) or NO_NAME

    def renumbered(
        self, labels: np.ndarray, place: Sequence[int], classes: Sequence[str]
    ) -> np.ndarray:
        wide = np.zeros((len(labels), len(classes)), labels.dtype)
        wide[:, place] = labels
        wide[labels[:, 0] < 0] = -1
        return wide

    def known(self, labels: Tensor) -> Tensor:
        return labels[:, 0] >= 0

    @property
    def described(self) -> str:
        return f"{len(self.classes)} classes, several at once"

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return _cross_entropy(outputs, labels.clamp_min(0).to(outputs.dtype).expand_as(outputs))

    def smooth_losses(self, outputs: Tensor) -> Tensor:
        return _cross_entropy(outputs, torch.full_like(outputs, 0.5))

    def measure(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return {"map": mean_average_precision(outputs, labels)}

    def answer(self, output: Tensor, top_k: int) -> Answer:
        """Each class's own probability."""
        return ranked(self.classes, output.sigmoid(), top_k)

    def examine(self, labels: np.ndarray, outputs: np.ndarray) -> dict[str, Any]:
        """Average precision a class (None without a positive row), lowest first; the most confident
        false positives first."""
        classes = list(self.classes)
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


def _cross_entropy(outputs: Tensor, truth: Tensor) -> Tensor:
    """(K, B, C) twice → (K, B)."""
    return functional.binary_cross_entropy_with_logits(outputs, truth, reduction="none").mean(
        dim=-1
    )


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Area under precision over recall by steps, (N,) and (N,) 0/1; NaN without a positive.

    Rows of equal score enter together, as in scikit-learn.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(truth[order] == 1)
    if not len(hits) or hits[-1] == 0:
        return float("nan")
    last = np.append(np.diff(scores[order]) != 0, True)  # of a run of equal scores
    hits, seen = hits[last], np.flatnonzero(last) + 1
    return float((np.diff(hits, prepend=0) / hits[-1] * (hits / seen)).sum())


def mean_average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Mean over the classes that occur: scores (N, C), truth (N, C) → a fraction; 0 if none do."""
    each = [average_precision(scores[:, c], truth[:, c]) for c in range(truth.shape[1])]
    found = [value for value in each if not np.isnan(value)]
    return float(np.mean(found)) if found else 0.0
