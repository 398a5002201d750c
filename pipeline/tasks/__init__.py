"""Kinds of target: one kind, one file. A new kind is a subclass of `Task`, and a line here.

| kind | output | labels (B, …), none | loss | scores, the first one ranks |
|---|---|---|---|---|
| class | a logit a class | index (B,), -1 | cross-entropy | top1, top5 |
| multilabel | a logit a class | 0 or 1 (B, C), -1 | binary cross-entropy, mean over classes | map |
| regression | one number | number (B,), NaN | squared error of the standardised value | r2, mae |

How a cache stores each kind's labels is the cache's own table (`cache.manifest.LABEL_DTYPES`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeVar

from pipeline.errors import SettingError
from pipeline.tasks.classes import ClassTask
from pipeline.tasks.contract import Answer, Scores, Tally, Task
from pipeline.tasks.multilabel import MultilabelTask
from pipeline.tasks.regression import RegressionTask

KINDS: dict[str, type[Task]] = {
    "class": ClassTask,
    "multilabel": MultilabelTask,
    "regression": RegressionTask,
}

__all__ = [
    "KINDS",
    "Answer",
    "Scores",
    "Tally",
    "Target",
    "Task",
    "kind_of",
    "task_from",
    "task_of",
]


class Target(Protocol):
    """What a cache and a source call a target."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...


T = TypeVar("T", bound=Target)


def task_of(target: Target) -> Task:
    """A target as a task, not yet `fitted` to any rows.

    Raises SettingError for a kind that a cache may hold, but nothing here learns.
    """
    if target.kind not in KINDS:
        raise SettingError(
            f"target {target.name}: it is a {target.kind}, which is not learned here; expected "
            f"one of {', '.join(KINDS)}"
        )
    return KINDS[target.kind](name=target.name, classes=target.classes)


def exclusive(targets: Iterable[T]) -> list[T]:
    """Those whose classes exclude each other: a row has one of them, or none."""
    return [target for target in targets if target.kind in KINDS and KINDS[target.kind].exclusive]


def task_from(values: Mapping[str, Any]) -> Task:
    """The inverse of `Task.to_dict`."""
    fields = {**values, "classes": tuple(values["classes"])}
    return KINDS[fields.pop("kind")](**fields)


def kind_of(score: str) -> type[Task] | None:
    """The kind that has a score of that name."""
    return next((kind for kind in KINDS.values() if score in kind.scores), None)
