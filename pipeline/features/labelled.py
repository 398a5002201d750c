"""What a cache tells stage two beside its tokens: which rows have which labels, and what shape the
features have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cache import Reader
from pipeline.errors import SettingError
from pipeline.features.taps import choose_taps
from pipeline.side.contract import FeatureSpec, TokenShape
from pipeline.tasks import KINDS, task_of


@dataclass(frozen=True)
class LabelledRows:
    """Row numbers of a cache, and for each task its labels of them (`pipeline.tasks`).

    `left_out` counts the rows that have no label for any target of the cache.
    """

    rows: np.ndarray
    labels: Mapping[str, np.ndarray]
    left_out: int = 0

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
    targets = [target for target in reader.labelling.targets if target.kind in KINDS]
    tables = {target.name: reader.labels(target.name)[found] for target in targets}
    known = {
        target.name: task_of(target).known(torch.from_numpy(tables[target.name])).numpy()
        for target in targets
    }
    named = " + ".join(splits)
    if len(found) == 0:
        raise SettingError(f"split {named}: it has no rows")
    for task in tasks:
        if not known[task].any():
            raise SettingError(f"split {named}: none of its {len(found):,} rows has a {task}")
    kept = np.any(list(known.values()), axis=0)
    return LabelledRows(
        rows=found[kept],
        labels={task: tables[task][kept] for task in tasks},
        left_out=int((~kept).sum()),
    )


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
