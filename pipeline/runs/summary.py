"""summary.csv: one line a member, and what its cells say."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from pipeline.records import finite, rank
from pipeline.tasks import KINDS


def member_id(position: int) -> str:
    """Short and stable: m0, m1, …; the settings stand in the files beside it."""
    return f"m{position}"


def position_of(member: str) -> int:
    """The inverse of `member_id`."""
    return int(member.removeprefix("m"))


def summary_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lines under the names of all their cells; None, and what a line lacks, is an empty cell."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_summary(path: Path) -> list[dict[str, str]]:
    """The lines of a summary.csv."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def score_of(row: Mapping[str, str]) -> float | None:
    """The validation score that ranks."""
    values = [row.get(f"val_{next(iter(kind.scores))}") for kind in KINDS.values()]
    return number_of(next((value for value in values if value), ""))


def loss_of(row: Mapping[str, str]) -> float | None:
    """The validation loss."""
    return number_of(row["val_loss"])


def rank_of(rows: Sequence[Mapping[str, str]]) -> tuple[bool, float, float]:
    """Sorts settings of one task, best first, by the lines of their members: one, or one a fold."""
    scores, losses = [score_of(row) for row in rows], [loss_of(row) for row in rows]
    return rank(_mean(scores), _mean(losses), stopped=any(row["stopped"] for row in rows))


def _mean(values: Sequence[float | None]) -> float | None:
    """None if one is lacking: a mean of the others would hide it."""
    known = [value for value in values if value is not None]
    return mean(known) if len(known) == len(values) else None


def number_of(text: str) -> float | None:
    """What a cell holds; None if that is nothing, or not finite."""
    return finite(float(text)) if text else None
