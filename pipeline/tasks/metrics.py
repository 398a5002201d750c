"""What members learn to predict and how well they do: a loss and scores for each kind of target.

| kind | output | labels (B, …), none | loss | scores, the first one ranks |
|---|---|---|---|---|
| class | a logit a class | index (B,), -1 | cross-entropy | top1, top5 |
| multilabel | a logit a class | 0 or 1 (B, C), -1 | binary cross-entropy, mean over classes | map |
| regression | one number | number (B,), NaN | squared error of the standardised value | r2, mae |

Rows without a label count nowhere. Scores are fractions, not percent; `mae` has the target's unit.
What is not finite is no number that can be compared, written as JSON or drawn: it is None from
here on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.records import finite

# kind → its scores; the first one ranks, higher is better
SCORES = {"class": ("top1", "top5"), "multilabel": ("map",), "regression": ("r2", "mae")}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A target of a cache, as members learn it.

    A regression is learned standardised [ours]: (value - centre) / scale, by the training rows'
    mean and deviation, so that one learning rate suits any unit.
    """

    name: str
    kind: str
    classes: tuple[str, ...] = ()
    centre: float = 0.0
    scale: float = 1.0

    @property
    def outputs(self) -> int:
        """C: what a network for this task gives per row."""
        return len(self.classes) if self.kind != "regression" else 1

    @property
    def metric(self) -> str:
        """The score that ranks, higher is better."""
        return SCORES[self.kind][0]

    def known(self, labels: Tensor) -> Tensor:
        """Which rows have a label, (B,) bool."""
        if self.kind == "regression":
            return ~labels.isnan()
        return (labels if labels.ndim == 1 else labels[:, 0]) >= 0

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Loss of each row for each member: (K, B, C) → (K, B), undefined where not known."""
        if self.kind == "class":
            index = labels.clamp_min(0).expand(len(outputs), -1)[..., None]  # (K, B, 1)
            return -outputs.log_softmax(dim=-1).gather(-1, index)[..., 0]
        truth = self._truth(outputs, labels)
        if self.kind == "regression":
            return (outputs - truth).square()[..., 0]
        return functional.binary_cross_entropy_with_logits(outputs, truth, reduction="none").mean(
            dim=-1
        )

    def _truth(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """What `outputs` should have been, (K, B, C)."""
        if self.kind == "regression":
            return self.standardised(labels)[:, None].to(outputs.dtype).expand_as(outputs)
        return labels.clamp_min(0).to(outputs.dtype).expand_as(outputs)

    def standardised(self, values: Tensor) -> Tensor:
        """Values in the target's unit → as learned; NaN (none) → 0."""
        return ((values - self.centre) / self.scale).nan_to_num()

    def smooth_losses(self, outputs: Tensor) -> Tensor:
        """Loss of each row against the uniform target, (K, B): what label smoothing mixes in."""
        if self.kind == "class":
            return -outputs.log_softmax(dim=-1).mean(dim=-1)
        half = torch.full_like(outputs, 0.5)
        return functional.binary_cross_entropy_with_logits(outputs, half, reduction="none").mean(
            dim=-1
        )

    def loss(self, outputs: Tensor, labels: Tensor, smoothing: Tensor) -> Tensor:
        """Mean over the rows with a label, per member: (K, B, C), (B, …), (K,) → (K,)."""
        losses = self.losses(outputs, labels)
        if self.kind != "regression":
            weight = smoothing[:, None]
            losses = (1 - weight) * losses + weight * self.smooth_losses(outputs)
        known = self.known(labels)
        return torch.where(known, losses, 0.0).sum(dim=1) / known.sum().clamp_min(1)

    def tally(self, members: int, device: torch.device) -> Tally:
        """An empty tally for this kind of task."""
        return (ClassTally if self.kind == "class" else ValueTally)(self, members, device)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "classes": list(self.classes)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Task:
        return cls(**{**values, "classes": tuple(values["classes"])})


@dataclass(frozen=True, kw_only=True)
class Scores:
    """`values` by name, the ranking one first; mean `loss`; both over `n` rows with a label.

    All are None of a member whose loss is not finite: what such outputs get right is chance.
    """

    values: dict[str, float | None]
    loss: float | None
    n: int

    @property
    def score(self) -> float | None:
        """The one that ranks, higher is better."""
        return next(iter(self.values.values()))


class Tally(ABC):
    """What is gathered over batches, per member, on the device until read."""

    def __init__(self, task: Task, members: int, device: torch.device) -> None:
        self.task = task
        self.sums = torch.zeros(3, members, device=device, dtype=torch.float64)  # the loss's first
        self.n = torch.zeros((), device=device, dtype=torch.int64)

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """Count one batch: outputs (K, B, C), labels (B, …)."""
        known = self.task.known(labels)  # a mask: to pick rows by it would wait for a GPU
        self.n += known.sum()
        losses = torch.where(known, self.task.losses(outputs, labels), 0.0)
        self.sums[0] += losses.double().sum(dim=1)
        self._add(outputs, labels, known)

    @abstractmethod
    def _add(self, outputs: Tensor, labels: Tensor, known: Tensor) -> None:
        """Count what the kind of task needs beside the loss, of the `known` rows (B,)."""

    @abstractmethod
    def _values(self) -> list[dict[str, float]]:
        """The scores of each member."""

    def scores(self) -> list[Scores]:
        """One `Scores` a member."""
        n = int(self.n)
        losses = [finite(loss) for loss in (self.sums[0] / max(n, 1)).tolist()]
        return [
            Scores(values=dict.fromkeys(values) if loss is None else {**values}, loss=loss, n=n)
            for values, loss in zip(self._values(), losses, strict=True)
        ]


class ClassTally(Tally):
    """Top-1; top-5 counts a hit among the five best (all, with fewer classes)."""

    def _add(self, outputs: Tensor, labels: Tensor, known: Tensor) -> None:
        best = outputs.topk(min(5, outputs.shape[-1]), dim=-1).indices  # (K, B, ≤5)
        hits = (best == labels[None, :, None]) & known[None, :, None]
        self.sums[1] += hits[..., 0].sum(dim=1)
        self.sums[2] += hits.any(dim=-1).sum(dim=1)

    def _values(self) -> list[dict[str, float]]:
        top1, top5 = (self.sums[1:] / max(int(self.n), 1)).tolist()
        return [{"top1": a, "top5": b} for a, b in zip(top1, top5, strict=True)]


class ValueTally(Tally):
    """Scores that need all outputs at once: kept in memory, 4 bytes a number."""

    def __init__(self, task: Task, members: int, device: torch.device) -> None:
        super().__init__(task, members, device)
        self.outputs: list[Tensor] = []  # (K, B, C)
        self.labels: list[Tensor] = []

    def _add(self, outputs: Tensor, labels: Tensor, known: Tensor) -> None:
        known = known.cpu()
        self.outputs.append(outputs.cpu()[:, known])
        self.labels.append(labels.cpu()[known])

    def _values(self) -> list[dict[str, float]]:
        outputs, labels = torch.cat(self.outputs, dim=1).numpy(), torch.cat(self.labels).numpy()
        if self.task.kind == "multilabel":
            return [{"map": mean_average_precision(each, labels)} for each in outputs]
        spread = float(((labels - labels.mean()) ** 2).mean())
        values = []
        for predicted in outputs[..., 0].astype(np.float64) * self.task.scale + self.task.centre:
            error = predicted - labels
            r2 = 1 - float((error**2).mean()) / spread if spread else 0.0
            values.append({"r2": r2, "mae": float(np.abs(error).mean())})
        return values


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
