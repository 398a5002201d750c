"""Folds: rows dealt into K parts of equal size, groups kept together, classes kept balanced."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.errors import SettingError


def draw_folds(
    rows: np.ndarray,
    folds: int,
    *,
    seed: int = 0,
    groups: Sequence[str] | None = None,
    classes: np.ndarray | None = None,
) -> np.ndarray:
    """The fold of each row, int16 (N,), 0 to `folds` - 1; -1 outside of `rows`, bool (N,).

    groups: N names; rows of one group share a fold, one with an empty name is its own group.
    classes: int64 (N,), -1 for none; each fold gets its share of each. Without groups, fold sizes,
    and those of each class, differ by one at most. With groups: the largest first, each into the
    fold that then is the most balanced (over classes, squared); this is the greedy rule of
    scikit-learn's StratifiedGroupKFold, with sums of squares in place of deviations. The same
    `seed`, the same folds.

    Raises SettingError with fewer rows, or groups, than folds.
    """
    chosen = np.flatnonzero(rows)
    random = np.random.default_rng(seed)
    order = chosen[random.permutation(len(chosen))]
    of_class = np.zeros(len(rows), np.int64) if classes is None else classes + 1
    out = np.full(len(rows), -1, np.int16)
    if groups is None:
        _enough(len(chosen), folds, "rows")
        order = order[np.argsort(of_class[order], kind="stable")]
        out[order] = np.arange(len(order)) % folds
        return out
    alone = [group or f"\0{row}" for row, group in enumerate(groups)]  # a row that has none
    names, place = np.unique(np.asarray(alone)[order], return_inverse=True)
    _enough(len(names), folds, "groups")
    counts = np.zeros((len(names), int(of_class.max(initial=0)) + 1), np.int64)
    np.add.at(counts, (place, of_class[order]), 1)
    share = np.maximum(counts.sum(axis=0), 1) / folds  # of each class
    filled = np.zeros((folds, counts.shape[1]), np.int64)
    fold_of = np.empty(len(names), np.int16)
    seen = {name: number for number, name in enumerate(dict.fromkeys(place.tolist()))}
    for group in sorted(range(len(names)), key=lambda g: (-counts[g].sum(), seen[g])):
        after = ((filled + counts[group]) / share) ** 2 - (filled / share) ** 2
        fold = np.lexsort((filled.sum(axis=1), after.sum(axis=1).round(12)))[0]
        fold_of[group] = fold
        filled[fold] += counts[group]
    out[order] = fold_of[place]
    return out


def _enough(there: int, folds: int, what: str) -> None:
    if there < folds:
        raise SettingError(f"--folds {folds}: expected as many {what} or more, there are {there}")
