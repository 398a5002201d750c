"""A class: one of several, each row at most one.

Labels are class indices (B,), -1 where there is none; outputs a logit a class; the loss is
cross-entropy. Also how labels as texts are numbered, which names of folders and what data sets list
are, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import SourceError, some
from pipeline.tasks.contract import SHOWN, Answer, Parsed, Tally, Task, Where, ranked

MOST_CLASSES = 30  # of a confusion matrix that one can read
MOST_PAIRS = 20


class ClassTask(Task):
    """Scores are top-1 and top-5 accuracy: among the five best (all, with fewer classes)."""

    kind = "class"
    column = "label"
    cell = "a class"
    scores: ClassVar[Mapping[str, str]] = {"top1": "top-1", "top5": "top-5"}
    exclusive = True

    @classmethod
    def parse(cls, cells: Sequence[str], known: tuple[str, ...] | None, where: Where) -> Parsed:
        """Names or numbers of classes, "" or "-1" where unknown → int64 (N,), -1 where unknown."""
        return number_labels([cell or "-1" for cell in cells], known, where=where)

    def written(self, label: Any) -> str:
        return self.classes[label] if label >= 0 else ""

    def renumbered(
        self, labels: np.ndarray, place: Sequence[int], classes: Sequence[str]
    ) -> np.ndarray:
        return np.array([*place, -1], labels.dtype)[labels]  # -1: the last

    def known(self, labels: Tensor) -> Tensor:
        return labels >= 0

    @property
    def described(self) -> str:
        return f"{len(self.classes)} classes"

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        index = labels.clamp_min(0).expand(len(outputs), -1)[..., None]  # (K, B, 1)
        return -outputs.log_softmax(dim=-1).gather(-1, index)[..., 0]

    def smooth_losses(self, outputs: Tensor) -> Tensor:
        return -outputs.log_softmax(dim=-1).mean(dim=-1)

    def tally(self, members: int, device: torch.device) -> Tally:
        return ClassTally(self, members, device)

    def standard_error(self, score: float, rows: int) -> float | None:
        """Of a share of hits; None at 0 and 1, where the formula says nothing."""
        return None if score in (0, 1) else math.sqrt(score * (1 - score) / rows)

    def answer(self, output: Tensor, top_k: int) -> Answer:
        return ranked(self.classes, output.softmax(dim=-1), top_k)

    def examine(self, labels: np.ndarray, outputs: np.ndarray) -> dict[str, Any]:
        """The matrix of counts [true][predicted], or the most confused pairs where there are too
        many classes; the most confident mistakes first."""
        classes, probabilities = list(self.classes), _softmax(outputs)
        predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
        counts = np.zeros((len(classes), len(classes)), np.int64)
        np.add.at(counts, (labels, predicted), 1)
        wrong = np.flatnonzero(predicted != labels)
        worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:SHOWN]
        return {
            "classes": classes,
            "correct": int((predicted == labels).sum()),
            "matrix": counts.tolist() if len(classes) <= MOST_CLASSES else None,
            "pairs": _confused(counts, classes),
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


class ClassTally(Tally):
    """Counts hits, and keeps nothing."""

    def __init__(self, task: Task, members: int, device: torch.device) -> None:
        super().__init__(task, members, device)
        self.hits = torch.zeros(2, members, device=device, dtype=torch.float64)  # top-1, top-5

    def _add(self, outputs: Tensor, labels: Tensor, known: Tensor) -> None:
        best = outputs.topk(min(5, outputs.shape[-1]), dim=-1).indices  # (K, B, ≤5)
        hits = (best == labels[None, :, None]) & known[None, :, None]
        self.hits[0] += hits[..., 0].sum(dim=1)
        self.hits[1] += hits.any(dim=-1).sum(dim=1)

    def _values(self) -> list[dict[str, float]]:
        top1, top5 = (self.hits / max(int(self.n), 1)).tolist()
        return [{"top1": a, "top5": b} for a, b in zip(top1, top5, strict=True)]


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _confused(counts: np.ndarray, classes: list[str]) -> list[dict[str, Any]]:
    """The pairs of classes [true][predicted] that are most often confused."""
    of_class = counts.sum(axis=1)
    off = counts * ~np.eye(len(classes), dtype=bool)
    order = np.argsort(-off, axis=None, kind="stable")[:MOST_PAIRS]
    least = min(2, off.max(initial=1))  # once is chance, unless there is nothing else
    pairs = [divmod(int(place), len(classes)) for place in order if off.flat[place] >= least]
    return [
        {
            "truth": classes[true],
            "predicted": classes[other],
            "count": int(counts[true, other]),
            "of": int(of_class[true]),
        }
        for true, other in pairs
    ]


def number_labels(
    labels: Sequence[str],
    known: tuple[str, ...] | None,
    *,
    where: Where,
    integers: bool = True,
) -> Parsed:
    """Label texts → the classes they count by, and class numbers, int64 (N,), -1 where unknown.

    With `known` classes, a label is a class name, or, if `integers` and no class is itself named by
    a number, a class number. Without, labels that are all integers are numbers in "0" … "C-1", and
    others are names, sorted. -1 is an unknown label. Raises SourceError, with the place of the
    label, for one that is none of the known.
    """
    classes = known
    if classes is None:
        if not (integers and all(map(is_integer, labels))):
            classes = tuple(sorted(set(labels) - {"-1"}))
            integers = False
        else:
            highest = max(map(int, labels), default=-1)
            classes = tuple(str(number) for number in range(highest + 1))
    number_of = {name: number for number, name in enumerate(classes)}
    number_of.setdefault("-1", -1)
    if integers and not any(map(is_integer, classes)):
        number_of |= {str(number): number for number in range(len(classes))}
    for position, label in enumerate(labels):
        if label not in number_of:
            raise SourceError(
                f"{where(position)}: the label {label!r} is none of the {len(classes)} known "
                f"classes: {some(classes, 10)}"
            )
    return classes, np.array([number_of[label] for label in labels], np.int64)


def is_integer(text: str) -> bool:
    """-1, 0, 1, … as Python prints them: 007 and 1.0 are names."""
    return text == "-1" or (text.isascii() and text.isdigit() and str(int(text)) == text)
