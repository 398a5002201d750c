"""What finished runs were used for: records → lines on stdout."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.terminal.tables import (
    counted,
    loss_text,
    print_columns,
    print_json,
    score_text,
    titled,
)

if TYPE_CHECKING:
    from pipeline.demo.tour import Result
    from pipeline.evaluate import Evaluation
    from pipeline.predict import Prediction
    from pipeline.report import Written


def show_evaluate(run: str, results: Sequence[Evaluation], as_json: bool) -> None:
    """A line a member, and one of the mean and deviation of several that learned the same task."""
    spread = _spread(results)
    if as_json:
        listed = [result.to_dict() for result in results]
        print_json(listed[0] if len(listed) == 1 else {"members": listed, "mean": spread})
        return
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
    for task, of_task in spread.items():
        members = sum(result.task == task for result in results)
        told = ", ".join(
            f"{titled(k)} {' ± '.join(score_text(k, v) for v in both) if both else '–'}"
            for k, both in of_task.items()
        )
        click.echo(f"{run} mean of {counted(members, 'member')}{f', {task}' * several}: {told}")


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


def show_report(written: Written, as_json: bool) -> None:
    for text in written.left_out:
        click.echo(f"left out: {text}", err=True)
    if as_json:
        print_json(dataclasses.asdict(written))
        return
    of = "" if written.runs == 1 else f" of {written.runs} runs"
    click.echo(f"{written.out}: {counted(written.members, 'member')}{of}")


def show_predict(predictions: Sequence[Prediction], csv_file: str | None, as_json: bool) -> None:
    """What is said of each photograph, in `csv_file` or here; those without an answer on stderr."""
    read = [p for p in predictions if p.error is None]
    if csv_file:
        _write_csv(csv_file, read)
    if as_json:
        print_json([_prediction_json(p) for p in read])
    elif csv_file:
        click.echo(f"{csv_file}: {len(read):,} photographs")
    else:
        for p in read:
            best = zip(p.classes, p.probabilities, strict=True)
            told = ", ".join(f"{name} {value:.1%}" for name, value in best)
            click.echo(f"{p.path}: {told if p.value is None else f'{p.value:.6g}'}")
    for p in predictions:
        if p.error is not None:
            click.echo(f"sidecache: {p.error}", err=True)


def _prediction_json(p: Prediction) -> dict[str, Any]:
    if p.value is not None:
        return {"path": p.path, "value": p.value}
    return {"path": p.path, "classes": p.classes, "probabilities": p.probabilities}


def _write_csv(file: str, predictions: Sequence[Prediction]) -> None:
    """As CSV: a line for each class of each photograph, best first."""
    with Path(file).open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["path", "rank", "class", "probability"])
        for p in predictions:
            if p.value is not None:
                writer.writerow([p.path, 1, f"{p.value:.6g}", ""])
            ranked = enumerate(zip(p.classes, p.probabilities, strict=True), start=1)
            writer.writerows([p.path, rank, c, f"{q:.6f}"] for rank, (c, q) in ranked)


def show_demo(results: Sequence[Result]) -> None:
    print_columns(
        ["task", "method", "parameters", "val top-1", "test top-1"],
        [
            [r.task, r.method, f"{r.parameters:,}", f"{r.val_top1:.1%}", f"{r.test_top1:.1%}"]
            for r in results
        ],
    )
