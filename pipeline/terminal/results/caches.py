"""What was done with a cache: records → lines on stdout."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from pipeline.terminal.tables import (
    counted,
    print_json,
    print_pairs,
    size_text,
)

if TYPE_CHECKING:
    from cache import Inspection, Verification
    from pipeline.config import CopyConfig, ExtractConfig
    from pipeline.copy import CopyResult
    from pipeline.extract import ExtractResult
    from pipeline.label import LabelResult
    from pipeline.repair import RepairResult


def show_extract(config: ExtractConfig, result: ExtractResult, as_json: bool) -> None:
    if as_json:
        keys = ("rows", "bytes", "complete", "fingerprint", "content", "labelling")
        extra = ("seconds", "images_per_second", "extracted_rows", "skipped", "legs")
        print_json({key: getattr(result, key) for key in (*keys, *extra)})
        return
    if not result.extracted_rows:
        click.echo(f"{config.out}: already complete, nothing to do ({result.rows:,} rows)")
        return
    click.echo(
        f"{config.out}: {result.rows:,} rows, {size_text(result.bytes)}, "
        f"{result.images_per_second:,.0f} images/s, fingerprint {result.fingerprint[:12]}"
    )
    if result.skipped:
        click.echo(f"{len(result.skipped)} unreadable images skipped; `inspect` lists them")
    total = sum(result.legs.values()) or 1.0
    shares = ", ".join(f"{leg} {value / total:.0%}" for leg, value in result.legs.items())
    click.echo(f"{result.seconds:.1f} s, spent waiting for: {shares}", err=True)


def show_inspect(cache: str, found: Inspection, as_json: bool) -> None:
    if as_json:
        print_json(found.to_dict())
        return
    state = "complete" if found.complete else f"INCOMPLETE: {found.rows_done:,} rows done"
    lines = [
        ("cache", f"{cache} ({found.format}), {state}"),
        (
            "rows",
            f"{found.rows:,} x {found.views} view, {size_text(found.bytes)} of {found.storage}",
        ),
        ("bytes a row", f"{found.bytes / max(found.slots, 1):,.0f}"),
        *_left_behind(found),
        *_stacks(found),
        ("splits", ", ".join(f"{k} {v:,}" for k, v in found.splits.items())),
        *(
            (f"target {name}", _target(found.kinds[name], found.targets[name]))
            for name in found.targets
        ),
    ]
    if found.folds:
        lines.append(("folds", ", ".join(f"{rows:,}" for rows in found.folds)))
    lines += [(f"group {name}", f"{count:,} groups") for name, count in found.groups.items()]
    if found.seconds is not None:
        made = "copying" if "copied_from" in found.notes else "extraction"
        lines.append((made, f"{found.seconds:,.{0 if found.seconds >= 10 else 2}f} s"))
    lines += [(f"skipped row {row}", reason) for row, reason in found.skipped.items()]
    lines += list(_flatten(found.identity))
    lines += [("fingerprint", found.fingerprint), ("content", found.content or "(incomplete)")]
    lines += [("labelling", found.labelling), ("format version", str(found.format_version))]
    print_pairs(lines)


def _left_behind(found: Inspection) -> Iterator[tuple[str, str]]:
    """What updates have left, or not done yet."""
    if found.slots_pending and found.complete:
        yield "update", f"UNFINISHED: {found.slots_pending:,} rows to do; the same --update goes on"
    elif found.slots > found.rows:
        yield (
            "left behind",
            f"{counted(found.slots - found.rows, 'row')} of updates; `copy` leaves them out",
        )


def _stacks(found: Inspection) -> Iterator[tuple[str, str]]:
    for stack in found.stacks:
        taps = stack["taps"]
        shape = f"{len(taps)} taps x {stack['tokens']} tokens x {stack['dim']}"
        yield f"stack {stack['name']}", f"{shape}: {' '.join(taps)}"
        if error := found.error.get(stack["name"]):
            worst = f"worst token {error['worst_token']:.2g}"
            yield "rounding error", f"{error['relative']:.2g} of the values' size; {worst}"


def _target(kind: str, classes: Mapping[str, Any]) -> str:
    if kind == "regression":
        rows, *spread = classes.items()
        shown = "".join(f", {k} {v:.4g}" for k, v in spread if v is not None)
        return f"regression, {rows[1]:,} rows{shown}"
    few = list(classes.items())[:8]
    more = f", … {len(classes) - 8} more" if len(classes) > 8 else ""
    counts = ", ".join(f"{k} {v:,}" for k, v in few)
    return f"{'' if kind == 'class' else f'{kind}, '}{len(classes)} classes: {counts}{more}"


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        elif name != "taps":
            yield prefix + name, str(value)


def show_verify(
    cache: str, result: Verification, repaired: RepairResult | None, as_json: bool
) -> None:
    if as_json:
        damaged = [{**vars(d), "file": str(d.file)} for d in result.damaged]
        found = {"ok": result.ok, "rows": result.rows, "bytes": result.bytes, "damaged": damaged}
        print_json(found if repaired is None else {**found, "repaired": vars(repaired)})
        return
    if repaired is not None:
        told = f"{cache}: {counted(repaired.rows, 'row')} computed again"
        others = f"; other last bits than before: {', '.join(repaired.differing)}"
        click.echo(told + (others if repaired.differing else ""))
    for damage in result.damaged:
        click.echo(str(damage))
    verdict = "no damage" if result.ok else f"{len(result.damaged)} damaged"
    click.echo(f"{cache}: {result.rows:,} rows, {size_text(result.bytes)} read, {verdict}")


def show_label(result: LabelResult, as_json: bool) -> None:
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    if not result.changed:
        click.echo(f"{result.cache}: all of it is so already, nothing to do")
        return
    parts = [f"targets {', '.join(result.targets) or 'none'}"]
    parts += [f"splits {', '.join(result.splits)}"] if result.splits else []
    parts += [f"groups {', '.join(result.groups)}"] if result.groups else []
    parts += [f"folds of {', '.join(map(str, result.folds))} rows"] if result.folds else []
    click.echo(f"{result.cache}: {result.rows:,} rows; {'; '.join(parts)}")
    if result.unlisted:
        click.echo(
            f"{counted(result.unlisted, 'row')} of the cache not in the list: no label, and no "
            "split if it says splits",
            err=True,
        )


def print_labelling(columns: Mapping[str, Sequence[str]]) -> None:
    """The labelling as CSV on stdout, a line a row."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    click.echo(text.getvalue(), nl=False)


def show_copy(config: CopyConfig, result: CopyResult, as_json: bool) -> None:
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    if not result.copied_rows:
        click.echo(f"{config.dst}: already complete, nothing to do ({result.rows:,} rows)")
        return
    click.echo(
        f"{config.dst}: {result.rows:,} rows, {size_text(result.bytes)} "
        f"({result.bytes / result.source_bytes:.1%} of {config.src}'s), {result.seconds:.1f} s"
    )
