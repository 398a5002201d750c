"""What was trained: records → leaderboards on stdout."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from pipeline.setting import varying
from pipeline.terminal.tables import (
    counted,
    loss_text,
    print_columns,
    print_json,
    score_text,
    short,
    titled,
)

if TYPE_CHECKING:
    from pipeline.records import (
        FoldsResult,
        MemberResult,
        RefitResult,
        SweepResult,
        TrainResult,
        TrialDone,
    )

ALONE = ("rank", "gap", "depth", "pool", "lr", "epochs", "seed")  # shown of a single member
BEST = 10  # trials that are shown


def show_train(out: str, result: TrainResult, refitted: RefitResult | None, as_json: bool) -> None:
    """A leaderboard a task, and what was refitted."""
    from pipeline.records import over_folds

    if as_json:
        found = dataclasses.asdict(result)
        found["members"] = [member.to_dict() for member in result.members]
        if folds := over_folds(result.members):
            found["folds"] = [vars(setting) for setting in folds]
        _print_with_refit(found, refitted)
        return
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


def show_sweep(out: str, result: SweepResult, refitted: RefitResult | None, as_json: bool) -> None:
    if as_json:
        _print_with_refit(dataclasses.asdict(result), refitted)
        return
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


def _print_with_refit(found: dict[str, Any], refitted: RefitResult | None) -> None:
    print_json(found | ({"refit": refitted.to_dict()} if refitted else {}))


def _show_next(what: str, out: str, refitted: RefitResult | None) -> None:
    where = refitted.run if refitted else out
    click.echo(f"{what}. Next: sidecache evaluate {shlex.quote(where)}", err=True)
