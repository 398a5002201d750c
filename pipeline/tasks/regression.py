"""A number.

Labels are numbers (B,), NaN where there is none; the one output is learned standardised [ours]:
(value - centre) / scale, by the training rows' mean and deviation, so that one learning rate suits
any unit. The loss is its squared error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from pipeline.errors import SourceError
from pipeline.tasks.contract import SHOWN, Answer, Parsed, Task, Where

MOST_DOTS = 2000  # of a scatter plot


class RegressionTask(Task):
    """Scores are R² and the mean absolute error, which has the target's unit."""

    kind = "regression"
    column = "value"
    cell = "a number"
    scores: ClassVar[Mapping[str, str]] = {"r2": "R²", "mae": "mean absolute error"}
    percent = False
    smooths = False

    @classmethod
    def parse(cls, cells: Sequence[str], known: tuple[str, ...] | None, where: Where) -> Parsed:
        """Finite numbers, "" where unknown → float32 (N,), NaN where unknown; no classes."""
        values = np.full(len(cells), np.nan, np.float32)
        for row, cell in enumerate(cells):
            if not cell:
                continue
            try:
                number = float(cell)
            except ValueError:
                number = math.nan
            if not abs(number) <= float(np.finfo(np.float32).max):
                raise SourceError(
                    f"{where(row)}: expected a finite number in float32's range, such as -1.5 (or "
                    f"nothing where it is not known), found {cell!r}"
                )
            values[row] = number
        return (), values

    def written(self, label: Any) -> str:
        return "" if np.isnan(label) else repr(float(label))

    def known(self, labels: Tensor) -> Tensor:
        return ~labels.isnan()

    def fitted(self, labels: np.ndarray) -> Task:
        values = labels.astype(np.float64)
        centre, scale = float(np.nanmean(values)), float(np.nanstd(values)) or 1.0
        return replace(self, centre=centre, scale=scale)

    @property
    def described(self) -> str:
        return "a number"

    @property
    def outputs(self) -> int:
        return 1

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        standardised = ((labels - self.centre) / self.scale).nan_to_num()
        return (outputs - standardised[:, None].to(outputs.dtype)).square()[..., 0]

    def measure(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        spread = float(((labels - labels.mean()) ** 2).mean())
        error = self.in_units(outputs[:, 0].astype(np.float64)) - labels
        r2 = 1 - float((error**2).mean()) / spread if spread else 0.0
        return {"r2": r2, "mae": float(np.abs(error).mean())}

    def in_units(self, outputs: np.ndarray) -> np.ndarray:
        return outputs * self.scale + self.centre

    def answer(self, output: Tensor, top_k: int) -> Answer:
        return Answer(value=float(self.in_units(output.double().numpy())[0]))

    def examine(self, labels: np.ndarray, outputs: np.ndarray) -> dict[str, Any]:
        """Points (true, predicted) for a scatter plot; the largest errors first."""
        predicted = outputs[:, 0]
        error = np.abs(predicted - labels)
        worst = np.argsort(-error, kind="stable")[:SHOWN]
        step = -(-len(labels) // MOST_DOTS)  # every step-th: rows lie in no order of their value
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
