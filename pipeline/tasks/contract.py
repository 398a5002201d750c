"""What a kind of target is: the seam between labels and all that learns, scores or tells of them.

A kind is one subclass of `Task` in a file of its own, listed in `pipeline/tasks/__init__.py`: what
its column in a list of rows holds, its loss, its scores, what outputs answer for one row, and what
a page says of mistakes. All others ask the kind; nobody compares its name.

The one idea to hold: rows without a label count nowhere. Scores are fractions, or in the target's
unit, never percent. Shapes, as in `pipeline/side/contract.py`: K members, B rows, C outputs a row;
N rows of a whole split.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pipeline.config import Question
from pipeline.records import finite

Where = Callable[[int], str]  # the number of a cell → its place, as messages name it
Parsed = tuple[tuple[str, ...], np.ndarray]  # the classes, and a value or row of values a cell

SHOWN = 12  # mistakes of a member


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


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What outputs say of one row: classes with their probabilities, best first, or a value."""

    classes: list[str] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A target of a cache, as members learn it.

    `centre` and `scale` are of kinds that learn a standardised value, (label - centre) / scale.
    `fold` is the one whose rows it never sees, if it is learned by folds.
    """

    name: str
    classes: tuple[str, ...] = ()
    centre: float = 0.0
    scale: float = 1.0
    fold: int | None = None

    kind: ClassVar[str]
    column: ClassVar[str]  # a list of rows holds it in a column `column:NAME`,
    cell: ClassVar[str]  # in whose cells there is, for messages, "a class"
    scores: ClassVar[Mapping[str, str]]  # name → title; the first one ranks, higher is better
    percent: ClassVar[bool] = True  # scores are told as percent; else as they are
    smooths: ClassVar[bool] = True  # whether there is a uniform target for smoothing to mix in
    exclusive: ClassVar[bool] = False  # a row has one class: splits can be stratified by it

    @property
    def question(self) -> Question:
        """By which its labels are found."""
        return Question(self.name, self.fold)

    # --- its labels ---------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def parse(cls, cells: Sequence[str], known: tuple[str, ...] | None, where: Where) -> Parsed:
        """Cells of its column, "" where a row has no label → classes, and a cache's table of them.

        `known` are the classes where they are given. Raises SourceError with the place of a cell.
        """

    @abstractmethod
    def written(self, label: Any) -> str:
        """The inverse of `parse`: one row of the table → its cell."""

    def renumbered(
        self, labels: np.ndarray, place: Sequence[int], classes: Sequence[str]
    ) -> np.ndarray:
        """A copy of labels (N, …) as they are among other `classes`: class i is at `place[i]`."""
        return labels.copy()

    @abstractmethod
    def known(self, labels: Tensor) -> Tensor:
        """Which rows have a label, (B,) bool."""

    def fitted(self, labels: np.ndarray) -> Task:
        """The task as the training rows' labels (N, …) make it."""
        return self

    @property
    @abstractmethod
    def described(self) -> str:
        """What is predicted, for a headline: `12 classes`."""

    # --- learning -----------------------------------------------------------------------------

    @property
    def outputs(self) -> int:
        """C: what a network for this task gives per row."""
        return len(self.classes)

    @abstractmethod
    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Loss of each row for each member: (K, B, C) → (K, B), undefined where not known."""

    def smooth_losses(self, outputs: Tensor) -> Tensor:
        """Loss of each row against the uniform target, (K, B), of a kind that `smooths`."""
        raise NotImplementedError

    def loss(self, outputs: Tensor, labels: Tensor, smoothing: Tensor) -> Tensor:
        """Mean over the rows with a label, per member: (K, B, C), (B, …), (K,) → (K,)."""
        losses = self.losses(outputs, labels)
        if self.smooths:
            weight = smoothing[:, None]
            losses = (1 - weight) * losses + weight * self.smooth_losses(outputs)
        known = self.known(labels)
        return torch.where(known, losses, 0.0).sum(dim=1) / known.sum().clamp_min(1)

    # --- scoring ------------------------------------------------------------------------------

    @property
    def metric(self) -> str:
        """The score that ranks, higher is better."""
        return next(iter(self.scores))

    def tally(self, members: int, device: torch.device) -> Tally:
        """An empty tally; one that keeps all outputs, if the kind has none that counts."""
        return KeptTally(self, members, device)

    def measure(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The `scores` of one member: (N, C), labels (N, …) of rows that have one."""
        raise NotImplementedError

    def standard_error(self, score: float, rows: int) -> float | None:
        """That of the ranking score over so many rows, of kinds for which it is known."""
        return None

    # --- telling ------------------------------------------------------------------------------

    def in_units(self, outputs: np.ndarray) -> np.ndarray:
        """Outputs (…, C) in the target's unit, if it has one."""
        return outputs

    @abstractmethod
    def answer(self, output: Tensor, top_k: int) -> Answer:
        """What the finite outputs (C,) of one row say: up to `top_k` classes, or a value."""

    def examine(self, labels: np.ndarray, outputs: np.ndarray) -> dict[str, Any]:
        """What a page shows of one member, plain data: labels (N, …), `in_units` outputs (N, C).

        `mistakes`, the worst first, each with the `position` of its row, its `truth` and what was
        `predicted`; and what `pages/KIND.html.jinja` draws, where a kind has that.
        """
        return {"mistakes": []}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `pipeline.tasks.task_from`."""
        own = {**vars(self), "classes": list(self.classes)}
        if self.fold is None:
            del own["fold"]
        return {"name": own.pop("name"), "kind": self.kind, **own}


class Tally(ABC):
    """What is gathered over batches, per member, on the device until read."""

    def __init__(self, task: Task, members: int, device: torch.device) -> None:
        self.task = task
        self.loss_sum = torch.zeros(members, device=device, dtype=torch.float64)
        self.n = torch.zeros((), device=device, dtype=torch.int64)

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """Count one batch: outputs (K, B, C), labels (B, …)."""
        known = self.task.known(labels)  # a mask: to pick rows by it would wait for a GPU
        self.n += known.sum()
        losses = torch.where(known, self.task.losses(outputs, labels), 0.0)
        self.loss_sum += losses.double().sum(dim=1)
        self._add(outputs, labels, known)

    @abstractmethod
    def _add(self, outputs: Tensor, labels: Tensor, known: Tensor) -> None:
        """Count what the scores need, of the `known` rows (B,)."""

    @abstractmethod
    def _values(self) -> list[dict[str, float]]:
        """The scores of each member."""

    def scores(self) -> list[Scores]:
        """One `Scores` a member."""
        n = int(self.n)
        losses = [finite(loss) for loss in (self.loss_sum / max(n, 1)).tolist()]
        return [
            Scores(values=dict.fromkeys(values) if loss is None else {**values}, loss=loss, n=n)
            for values, loss in zip(self._values(), losses, strict=True)
        ]


class KeptTally(Tally):
    """Keeps outputs and labels in memory, 4 bytes a number, for `measure`, which needs all."""

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
        return [self.task.measure(each, labels) for each in outputs]


def ranked(classes: Sequence[str], probabilities: Tensor, top_k: int) -> Answer:
    """The `top_k` most probable classes: of C names, (C,)."""
    best = probabilities.topk(min(top_k, len(probabilities)))
    names = [classes[i] for i in best.indices.tolist()]
    return Answer(classes=names, probabilities=best.values.tolist())
