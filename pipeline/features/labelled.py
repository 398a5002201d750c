"""What a cache tells stage two beside its tokens: which rows have which labels, and what shape the
features have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cache import Reader, no_label
from pipeline.config import Question
from pipeline.errors import SettingError
from pipeline.features.taps import choose_taps
from pipeline.side.contract import FeatureSpec, TokenShape
from pipeline.tasks import KINDS, task_of


@dataclass(frozen=True)
class LabelledRows:
    """Row numbers of a cache, and for each question its labels of them (`pipeline.tasks`).

    `left_out` counts the rows that have no label for any target of the cache. `folds`, of rows that
    are held out by folds, is the fold of each.
    """

    rows: np.ndarray
    labels: Mapping[Question, np.ndarray]
    left_out: int = 0
    folds: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)


def labelled_rows(reader: Reader, splits: Sequence[str], tasks: Sequence[str]) -> LabelledRows:
    """Rows of the splits that have a label for some target of the cache, with those of `tasks`.

    Which rows does not depend on `tasks`: members share the batches, whatever they learn. Raises
    SettingError if a task has no label there.
    """
    if not splits:
        return LabelledRows(np.empty(0, np.int64), {})
    found = reader.split_rows(*splits)
    tables, known, left_out = _known(reader, found)
    named = " + ".join(splits)
    if len(found) == 0:
        raise SettingError(f"split {named}: it has no rows")
    for task in tasks:
        if not known[task].any():
            raise SettingError(f"split {named}: none of its {len(found):,} rows has a {task}")
    kept = np.any(list(known.values()), axis=0)
    return LabelledRows(
        rows=found[kept],
        labels={Question(task): tables[task][kept] for task in tasks},
        left_out=left_out,
    )


def folded_rows(reader: Reader, questions: Sequence[Question]) -> tuple[LabelledRows, LabelledRows]:
    """Rows to learn from and rows held out, of questions that each name a fold.

    All members see the rows of all folds in one order; of those of its own fold a member learns
    nothing, as they have no label there. So which folds are asked for together changes no member.
    Held out are the rows of the folds asked for, fold by fold.

    Raises NameMissing without folds in the cache, SettingError for a fold that it has not, or one
    in which a task has no label.
    """
    folds = reader.folds
    there = reader.labelling.folds
    wanted = [fold for _, fold in questions if fold is not None and fold < there]
    if len(wanted) < len(questions):
        came = [fold for _, fold in questions if fold not in wanted]
        raise SettingError(
            f"fold = {came[0]}: expected one of 0 to {there - 1}, for every member or for none"
        )
    readable = reader.split_rows()
    found = readable[folds[readable] >= 0]
    of_row = folds[found]
    tables, known, left_out = _known(reader, found)
    kept = np.any(list(known.values()), axis=0)
    found, of_row = found[kept], of_row[kept]
    order = np.argsort(of_row, kind="stable")
    order = order[np.isin(of_row[order], wanted)]
    learned, held = {}, {}
    for question in questions:
        own = of_row == question.fold
        values, labelled = tables[question.task][kept], known[question.task][kept]
        for rows, what in ((own, "held out in"), (~own, "left without")):
            if not labelled[rows].any():
                raise SettingError(f"no row {what} fold {question.fold} has a {question.task}")
        learned[question] = _blank(values, own)
        held[question] = _blank(values, ~own)[order]
    return (
        LabelledRows(rows=found, labels=learned, left_out=left_out),
        LabelledRows(rows=found[order], labels=held, folds=of_row[order]),
    )


def _known(
    reader: Reader, rows: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], int]:
    """The labels of some rows for every target that can be learned, which rows have one, and how
    many have none at all."""
    targets = [target for target in reader.labelling.targets if target.kind in KINDS]
    tables = {target.name: reader.labels(target.name)[rows] for target in targets}
    known = {
        target.name: task_of(target).known(torch.from_numpy(tables[target.name])).numpy()
        for target in targets
    }
    kept = np.any(list(known.values()), axis=0) if known else np.zeros(len(rows), bool)
    return tables, known, int((~kept).sum())


def _blank(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Labels as if `rows`, (N,) bool, had none."""
    values = values.copy()
    values[rows] = no_label(values.dtype)
    return values


def feature_spec(reader: Reader, outputs: int, taps: str = "all") -> FeatureSpec:
    """What the cache tells a side network; of its taps those that `taps` chooses.

    Raises SettingError if `taps` chooses none, or one that the cache lacks.
    """
    shapes = {
        tap: TokenShape(tokens=stack.tokens, prefix_tokens=stack.prefix_tokens, dim=stack.dim)
        for stack in reader.manifest.stacks
        for tap in stack.taps
    }
    norm = reader.final_norm
    return FeatureSpec(
        taps={tap: shapes[tap] for tap in choose_taps(taps, tuple(shapes))},
        classes=outputs,
        norm=norm["kind"],
        norm_eps=norm["eps"],
        norm_weight=_tensor(norm.get("weight")),
        norm_bias=_tensor(norm.get("bias")),
        blocks=tuple(reader.manifest.blocks),
    )


def initial_weights(reader: Reader) -> dict[str, Tensor]:
    """What the cache offers side networks to start from: LST's pruned weights, if it has them."""
    tables = reader.tables_below("ladder")
    return {name: torch.from_numpy(table) for name, table in tables.items()}


def _tensor(array: np.ndarray | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(np.array(array))
