"""Columns, numbers as text, and JSON, as every command prints them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


def print_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose columns are as wide as their widest cell."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())


def print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Names in one column, what is said of each behind it, blanks at its end kept."""
    width = max(len(name) for name, _ in pairs)
    for name, text in pairs:
        click.echo(f"{name:<{width}}  {text}")


def counted(number: int, what: str) -> str:
    """`1 row`, `1,000 rows`."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def size_text(size: float) -> str:
    """Bytes as MB or GB, of 10^6 and 10^9."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def clock_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def titled(metric: str) -> str:
    """`val_top1` → `val top-1`."""
    return metric.replace("_", " ").replace("top", "top-").replace("map", "mAP")


def score_text(metric: str, value: float | None) -> str:
    """As percent, or as it is, as the kind of target wants it; nothing for None."""
    from pipeline.tasks import kind_of

    if value is None:
        return ""
    kind = kind_of(metric.removeprefix("val_"))
    return f"{value:.2%}" if kind and kind.percent else f"{value:.4f}"


def loss_text(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"
