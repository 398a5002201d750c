"""What a command did, on stdout: the records that it returns → lines and tables."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.records import over_folds
from pipeline.setting import varying
from pipeline.terminal.tables import (
    counted,
    loss_text,
    print_columns,
    print_pairs,
    score_text,
    short,
    size_text,
    titled,
)

if TYPE_CHECKING:
    from cache import Inspection, Verification
    from pipeline.config import CopyConfig, ExtractConfig
    from pipeline.copy import CopyResult
    from pipeline.demo.tour import Result
    from pipeline.evaluate import Evaluation
    from pipeline.extract import ExtractResult
    from pipeline.label import LabelResult
    from pipeline.predict import Prediction
    from pipeline.records import FoldsResult, MemberResult, SweepResult, TrainResult, TrialDone
    from pipeline.refit import RefitResult
    from pipeline.repair import RepairResult
    from pipeline.report import Written

ALONE = ("rank", "gap", "depth", "pool", "lr", "epochs", "seed")  # shown of a single member
BEST = 10  # trials that are shown

# --- stage one --------------------------------------------------------------------------------


def show_extract(config: ExtractConfig, result: ExtractResult) -> None:
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


def extract_json(result: ExtractResult) -> dict[str, Any]:
    keys = ("rows", "bytes", "complete", "fingerprint", "content", "labelling")
    extra = ("seconds", "images_per_second", "extracted_rows", "skipped", "legs")
    return {key: getattr(result, key) for key in (*keys, *extra)}


def show_inspect(cache: str, found: Inspection) -> None:
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
        yield "left behind", f"{found.slots - found.rows:,} rows of updates; `copy` leaves them out"


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


def show_verify(cache: str, result: Verification, repaired: RepairResult | None = None) -> None:
    if repaired is not None:
        told = f"{cache}: {counted(repaired.rows, 'row')} computed again"
        others = f"; other last bits than before: {', '.join(repaired.differing)}"
        click.echo(told + (others if repaired.differing else ""))
    for damage in result.damaged:
        click.echo(str(damage))
    verdict = "no damage" if result.ok else f"{len(result.damaged)} damaged"
    click.echo(f"{cache}: {result.rows:,} rows, {size_text(result.bytes)} read, {verdict}")


def verify_json(result: Verification, repaired: RepairResult | None = None) -> dict[str, Any]:
    damaged = [{**vars(d), "file": str(d.file)} for d in result.damaged]
    found = {"ok": result.ok, "rows": result.rows, "bytes": result.bytes, "damaged": damaged}
    return found if repaired is None else {**found, "repaired": vars(repaired)}


def show_label(result: LabelResult) -> None:
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


def show_copy(config: CopyConfig, result: CopyResult) -> None:
    if not result.copied_rows:
        click.echo(f"{config.dst}: already complete, nothing to do ({result.rows:,} rows)")
        return
    click.echo(
        f"{config.dst}: {result.rows:,} rows, {size_text(result.bytes)} "
        f"({result.bytes / result.source_bytes:.1%} of {config.src}'s), {result.seconds:.1f} s"
    )


# --- stage two --------------------------------------------------------------------------------


def show_train(out: str, result: TrainResult, refitted: RefitResult | None) -> None:
    """A leaderboard a task, and what was refitted."""
    if not result.epochs_trained:
        click.echo(f"{out}: already finished, nothing to do")
    for task in dict.fromkeys(member.settings["task"] for member in result.members):
        same = [member for member in result.members if member.settings["task"] == task]
        if len(same) < len(result.members):
            click.secho(f"task {task}", bold=True)
        _show_members(same)
        _show_folds(over_folds(same))
    if refitted:
        _show_refit(refitted)
    if result.epochs_trained or refitted:
        _show_next(
            f"{out}: {result.seconds:.1f} s, {result.images_per_second:,.0f} images/s",
            out,
            refitted,
        )


def _show_members(members: Sequence[MemberResult]) -> None:
    """The settings that differ between members, best validation first."""
    settings = [member.settings for member in members]
    shown = varying(settings) if len(members) > 1 else [n for n in settings[0] if n in ALONE]
    metric = members[0].metric
    header = ["id", "method", *shown, "parameters", titled(metric), "val loss", ""]
    rows = [
        [
            m.id,
            m.method,
            *(str(m.settings.get(name, "")) for name in shown),
            f"{m.parameters:,}",
            score_text(metric, m.score),
            loss_text(m.scores["val_loss"]),
            m.stopped or "",
        ]
        for m in sorted(members, key=lambda member: member.rank)
    ]
    print_columns(header, rows)


def _show_folds(settings: Sequence[FoldsResult]) -> None:
    """Mean and deviation over folds, best first, with the settings that differ."""
    if not settings:
        return
    click.echo()
    shown = varying([one.settings for one in settings])
    header = ["over folds", "method", *shown, titled(settings[0].metric)]
    rows = [
        [
            counted(len(one.members), "fold"),
            one.method,
            *(str(one.settings.get(name, "")) for name in shown),
            " ± ".join(score_text(one.metric, v) for v in (one.mean, one.deviation)),
        ]
        for one in settings
    ]
    print_columns(header, rows)


def show_sweep(out: str, result: SweepResult, refitted: RefitResult | None) -> None:
    if not result.trained:
        click.echo(f"{out}: already finished, nothing to do")
    _show_trials(result.trials, result.metric or "")
    counts = f"{result.done} done, {result.pruned} stopped early, {result.failed} failed"
    click.echo(f"{out}: {counts}; {f'best {result.best}' if result.best else 'none was scored'}")
    if refitted:
        _show_refit(refitted)
    if (result.trained or refitted) and result.best:
        _show_next(f"{result.seconds:.1f} s", out, refitted)


def _show_trials(trials: Sequence[TrialDone], metric: str) -> None:
    """The best trials with the settings that the space left open."""
    trained = [trial for trial in trials if trial.member]
    shown = trained[:BEST]
    names = list(dict.fromkeys(name for trial in shown for name in trial.settings))
    header = ["id", "method", *names, titled(metric or "score"), "val loss", ""]
    rows = [
        [
            str(trial.member),
            trial.method,
            *(short(trial.settings.get(name, "")) for name in names),
            score_text(metric, trial.score),
            loss_text(trial.loss),
            trial.reason or "",
        ]
        for trial in shown
    ]
    print_columns(header, rows)
    if len(trained) > len(shown):
        click.echo(f"… {len(trained) - len(shown)} more in summary.csv")


def _show_refit(refitted: RefitResult) -> None:
    for winner in refitted.winners:
        chosen = {k: v for k, v in refitted.chosen(winner).items() if k != "task"}
        shown = "".join(f", {name} {short(value)}" for name, value in chosen.items())
        spread = f" ± {winner.deviation:.4f}" if len(winner.seeds) > 1 else ""
        click.echo(
            f"refit {winner.task}: {winner.member.method}{shown}, val {winner.score:.4f}{spread} "
            f"over {counted(len(winner.seeds), 'seed')}; trained on train + val with "
            f"{counted(len(refitted.seeds), 'seed')}: {refitted.run}"
        )


def _show_next(what: str, out: str, refitted: RefitResult | None) -> None:
    where = refitted.run if refitted else out
    click.echo(f"{what}. Next: sidecache evaluate {shlex.quote(where)}", err=True)


# --- the use of it ----------------------------------------------------------------------------


def show_evaluate(run: str, results: Sequence[Evaluation]) -> None:
    """A line a member, and one of the mean and deviation of several that learned the same task."""
    several = len({result.task for result in results}) > 1
    for result in results:
        named = f"{result.member} ({result.task})" if several else result.member
        scores = "".join(
            f"{titled(k)} {score_text(k, v) or '–'}, " for k, v in result.scores.items()
        )
        click.echo(
            f"{run} {named}, {'+'.join(result.split)}{' (live)' if result.live else ''}: "
            f"{scores}loss {loss_text(result.loss, 4) or '–'}, n = {result.n:,}"
        )
    for task, of_task in _spread(results).items():
        members = sum(result.task == task for result in results)
        told = ", ".join(
            f"{titled(k)} {' ± '.join(score_text(k, v) for v in both) if both else '–'}"
            for k, both in of_task.items()
        )
        click.echo(f"{run} mean of {counted(members, 'member')}{f', {task}' * several}: {told}")


def evaluate_json(results: Sequence[Evaluation]) -> dict[str, Any]:
    listed = [result.to_dict() for result in results]
    return listed[0] if len(listed) == 1 else {"members": listed, "mean": _spread(results)}


def _spread(
    results: Sequence[Evaluation],
) -> dict[str, dict[str, tuple[float, float] | None]]:
    """Mean and deviation of each score, of the tasks that several members learned."""
    from pipeline.evaluate import mean_and_deviation

    return {
        task: mean_and_deviation(same)
        for task in dict.fromkeys(r.task for r in results)
        if len(same := [r for r in results if r.task == task]) > 1
    }


def show_report(written: Written) -> None:
    for text in written.left_out:
        click.echo(f"left out: {text}", err=True)
    of = "" if written.runs == 1 else f" of {written.runs} runs"
    click.echo(f"{written.out}: {counted(written.members, 'member')}{of}")


def show_predict(predictions: Sequence[Prediction]) -> None:
    for p in _read(predictions):
        best = zip(p.classes, p.probabilities, strict=True)
        told = ", ".join(f"{name} {value:.1%}" for name, value in best)
        click.echo(f"{p.path}: {told if p.value is None else f'{p.value:.6g}'}")


def predict_json(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    return [
        {"path": p.path, "value": p.value}
        if p.value is not None
        else {"path": p.path, "classes": p.classes, "probabilities": p.probabilities}
        for p in _read(predictions)
    ]


def write_predictions(file: str, predictions: Sequence[Prediction]) -> None:
    """As CSV: a line for each class of each photograph, best first."""
    with Path(file).open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["path", "rank", "class", "probability"])
        for p in _read(predictions):
            if p.value is not None:
                writer.writerow([p.path, 1, f"{p.value:.6g}", ""])
            ranked = enumerate(zip(p.classes, p.probabilities, strict=True), start=1)
            writer.writerows([p.path, rank, c, f"{q:.6f}"] for rank, (c, q) in ranked)


def show_written(file: str, predictions: Sequence[Prediction]) -> None:
    click.echo(f"{file}: {len(_read(predictions)):,} photographs")


def show_unread(predictions: Sequence[Prediction]) -> bool:
    """Name the photographs that have no prediction; whether there are any."""
    errors = [p.error for p in predictions if p.error is not None]
    for error in errors:
        click.echo(f"sidecache: {error}", err=True)
    return bool(errors)


def _read(predictions: Sequence[Prediction]) -> list[Prediction]:
    return [p for p in predictions if p.error is None]


def show_demo(results: Sequence[Result]) -> None:
    print_columns(
        ["task", "method", "parameters", "val top-1", "test top-1"],
        [
            [r.task, r.method, f"{r.parameters:,}", f"{r.val_top1:.1%}", f"{r.test_top1:.1%}"]
            for r in results
        ],
    )
