"""Members of one or several runs side by side: who may be compared, who is best, and why.

Reads run files and counts a cache's rows; predicts nothing. Members are ranked within one task on
the same images and splits, by summary.csv alone: test numbers cannot enter, they are not in it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cache import CacheError, Reader
from pipeline.config import Member, TrainConfig
from pipeline.errors import RunError
from pipeline.records import rank
from pipeline.runs.run import Run
from pipeline.runs.summary import loss_of, position_of, score_of
from pipeline.tasks import Task, task_from

FEW_VALUES = 6  # of a setting: so many have means, even if each was scored once
PERCENT = "\N{NO-BREAK SPACE}%"


@dataclass(kw_only=True)
class Trained:
    """One member as its run's files tell it. `place` names it in the page."""

    place: str
    run: int
    id: str
    config: TrainConfig
    member: Member
    task: Task
    settings: dict[str, Any]
    parameters: int
    score: float | None
    loss: float | None
    stopped: str
    curves: dict[str, list[float | None]]

    @property
    def rank(self) -> tuple[bool, float, float]:
        """Sorts members of one task, best first. As `Run.best_member` does."""
        return rank(self.score, self.loss, stopped=bool(self.stopped))


@dataclass(kw_only=True)
class Loaded:
    """One run directory read, its cache open if it is still there."""

    run: Run
    number: int
    name: str
    config: TrainConfig
    environment: dict[str, Any]
    cost: dict[str, Any]
    evaluations: list[dict[str, Any]]
    reader: Reader | None
    members: list[Trained] = field(default_factory=list)


def load(path: Path, number: int, opened: ExitStack, left_out: list[str]) -> Loaded:
    run = Run(path)
    summary, config, environment = run.summary(), run.config(), run.environment()
    try:
        reader = opened.enter_context(Reader(run.cache()))
        reason = _changed(reader, environment)
    except (CacheError, RunError) as error:
        reason = str(error)
    if reason:
        left_out.append(f"{path}: no look at predictions: {reason}")
    loaded = Loaded(
        run=run,
        number=number,
        name=path.resolve().name,
        config=config,
        environment=environment,
        cost=run.cost(),
        evaluations=run.evaluations(),
        reader=None if reason else reader,
    )
    curves = _curves(run.metrics())
    for row in summary:
        member = config.members[position_of(row["id"])]
        task = task_from(run.card(row["id"])["target"])
        loaded.members.append(
            Trained(
                place=f"r{number}-{row['id']}",
                run=number,
                id=row["id"],
                config=config,
                member=member,
                task=task,
                settings=_settings(config, member),
                parameters=int(row["parameters"]),
                score=score_of(row),
                loss=loss_of(row),
                stopped=row["stopped"],
                curves={
                    "score": _rounded(curves.get((row["id"], f"val_{task.metric}"), {})),
                    "val_loss": _rounded(curves.get((row["id"], "val_loss"), {})),
                    "train_loss": _rounded(curves.get((row["id"], "train_loss"), {})),
                },
            )
        )
    return loaded


def _changed(reader: Reader, environment: Mapping[str, Any]) -> str:
    """What a cache is no longer, beside what a run noted of it; "" if it is the same."""
    if not reader.is_known_as(environment["fingerprint"]):
        return f"the features of {reader.location} are others now than those trained on"
    if environment.get("labelling", reader.labelling_digest) != reader.labelling_digest:
        told = "asked other things now (labels, splits, rows) than when it was trained on"
        return f"{reader.location} is {told}"
    return ""


def _settings(config: TrainConfig, member: Member) -> dict[str, Any]:
    """All that decides a member's result, flat; a setting that does not apply is not there."""
    own = {name: value for name, value in member.all_settings.items() if name != "task"}
    of_the_pass = {
        "batch_size": config.batch_size,
        "order_seed": config.order_seed,
        "taps": config.taps,
        "train_split": "+".join(config.train_split),
        "cache": Path(config.cache).name,
    }
    return {"method": member.method, **own, **of_the_pass}


def _curves(lines: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], dict[int, float]]:
    """(member, name) → epoch → value, of metrics.jsonl."""
    curves: dict[tuple[str, str], dict[int, float]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in ("member", "epoch") and value is not None:
                curves.setdefault((line["member"], name), {})[line["epoch"]] = value
    return curves


def _rounded(curve: Mapping[int, float]) -> list[float | None]:
    """Values of epochs 1, 2, …; five digits are more than a plot can show."""
    found = (curve.get(epoch) for epoch in range(1, max(curve, default=0) + 1))
    return [None if value is None else float(f"{value:.5g}") for value in found]


# --- comparing --------------------------------------------------------------------------------


def comparable(loaded: Sequence[Loaded]) -> list[list[Trained]]:
    """Members in groups that may be ranked together: one task on the same images and splits."""
    groups: dict[str, list[Trained]] = {}
    for one in loaded:
        now = one.reader.labelling_digest if one.reader else None
        same = one.environment.get("labelling") or now or one.environment.get("fingerprint")
        for trained in one.members:
            same_task = [same, one.config.val_split, *_identity(trained.task)]
            key = json.dumps(same_task, sort_keys=True, allow_nan=False)
            groups.setdefault(key, []).append(trained)
    return [sorted(group, key=lambda t: t.rank) for group in groups.values()]


def _identity(task: Task) -> list[Any]:
    """What makes scores comparable; how a regression was standardised does not."""
    return [task.name, task.kind, task.classes]


def board(number: int, group: list[Trained], loaded: Sequence[Loaded]) -> dict[str, Any]:
    """One leaderboard: `group` is ranked, its members learned one task."""
    task = group[0].task
    names = list(dict.fromkeys(name for trained in group for name in trained.settings))
    values = {n: {str(t.settings[n]): t for t in group if n in t.settings} for n in names}
    differing = [n for n in names if len(values[n]) > 1]
    equal = {n: next(iter(values[n].values())).settings[n] for n in names if n not in differing}
    counted = [trained for trained in group if trained.score is not None and not trained.stopped]
    return {
        "id": f"b{number}",
        "score_name": task.scores[task.metric],
        "percent": task.percent,
        "title": _title(task, group, loaded),
        "sentence": _sentence(group, differing, loaded),
        "differing": differing,
        "equal": [(n, shown(value)) for n, value in equal.items() if value is not None],
        "several_runs": len({trained.run for trained in group}) > 1,
        "several_methods": len({trained.member.method for trained in group}) > 1,
        "members": [
            {
                "place": trained.place,
                "id": trained.id,
                "run": loaded[trained.run].name,
                "settings": {n: shown(trained.settings.get(n)) for n in differing},
                "sort": {n: trained.settings.get(n) for n in differing},
                "parameters": trained.parameters,
                "score": trained.score,
                "score_text": score_text(task, trained.score),
                "loss": trained.loss,
                "stopped": trained.stopped,
                "curves": trained.curves,
            }
            for trained in group
        ],
        "any_stopped": any(trained.stopped for trained in group),
        "seeds": _over_seeds(counted, [n for n in differing if n != "seed"]),
        "effects": _effects(differing, counted),
        "in_effects": len(counted),
    }


def _title(task: Task, group: list[Trained], loaded: Sequence[Loaded]) -> str:
    caches = dict.fromkeys(Path(loaded[trained.run].config.cache).stem for trained in group)
    named = [] if task.name == "label" else [task.name]
    if not named or len({one.config.cache for one in loaded}) > 1:
        named.insert(0, " and ".join(caches))
    return f"{': '.join(named)} ({task.described})"


def _sentence(group: list[Trained], differing: Sequence[str], loaded: Sequence[Loaded]) -> str:
    best = group[0]
    if best.score is None:
        why = "No validation score is finite" if best.config.val_split else "Nothing was validated"
        return f"{why}: no member can be called the best."
    told = [
        f"{spaced(n)} {shown(best.settings[n])}"
        for n in differing
        if best.settings.get(n) is not None
    ]
    text = f"{best.id} is best on validation"
    if told:
        text += f" ({', '.join(told)})"
    task, reader = best.task, loaded[best.run].reader
    score = score_text(task, best.score)
    text += f": {task.scores[task.metric]} {score}, loss {loss_text(best.loss)}."
    if len(group) == 1 or reader is None:
        return text
    labels = reader.labels(task.name)[reader.split_rows(*best.config.val_split)]
    rows = int(task.known(torch.from_numpy(labels)).sum())
    error = task.standard_error(best.score, rows)
    if error is None:
        return text
    near = sum(t.score is not None and t.score >= best.score - error for t in group[1:])
    return text + (
        f" One standard error of {rows:,} validation rows is {100 * error:.1f} points: "
        f"{near or 'no'} other {'member lies' if near == 1 else 'members lie'} that close."
    )


def _over_seeds(counted: Sequence[Trained], names: Sequence[str]) -> list[dict[str, Any]]:
    """Mean and deviation of each setting that was trained with several seeds; best mean first."""
    groups: dict[str, list[Trained]] = {}
    for trained in counted:
        rest = {n: v for n, v in trained.settings.items() if n != "seed"}
        key = json.dumps(rest, sort_keys=True, default=str, allow_nan=False)
        groups.setdefault(key, []).append(trained)
    lines: list[dict[str, Any]] = []
    for group in groups.values():
        scores = [trained.score for trained in group if trained.score is not None]
        if len(scores) < 2:
            continue
        task = group[0].task
        mean, deviation = statistics.fmean(scores), statistics.stdev(scores)
        lines.append(
            {
                "settings": [shown(group[0].settings.get(n)) for n in names],
                "names": list(names),
                "n": len(scores),
                "mean": mean,
                "text": _mean_and_deviation(task, mean, deviation),
                "range": f"{score_text(task, min(scores))} to {score_text(task, max(scores))}",
            }
        )
    return sorted(lines, key=lambda line: -line["mean"])


def _effects(names: Sequence[str], counted: Sequence[Trained]) -> list[dict[str, Any]]:
    """Scores by the values of each setting, within each method: what suits one says nothing of
    another. A setting of which fewer than two values were scored is left out."""
    methods = list(dict.fromkeys(trained.member.method for trained in counted))
    effects = [_effect("method", "method", counted)] if "method" in names else []
    for name in names:
        for method in methods if name != "method" else ():
            title = f"{spaced(name)} of {method}" if len(methods) > 1 else spaced(name)
            having = [t for t in counted if t.member.method == method]
            effects.append(_effect(name, title, having))
    return [effect for effect in effects if len(effect["labels"]) > 1]


def _effect(name: str, title: str, members: Sequence[Trained]) -> dict[str, Any]:
    """`points` are (index of the value, score, place). `values` where they are placed by size:
    on a logarithmic axis if they span a decade, and where they were drawn at random, as in a
    search, each value about once, which leaves no means to draw."""
    having = [trained for trained in members if trained.settings.get(name) is not None]
    values = list(dict.fromkeys(trained.settings[name] for trained in having))
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    values.sort(key=(lambda v: v) if numeric else str)
    scores = [[t.score for t in having if t.settings[name] == value] for value in values]
    log = numeric and len(values) > 1 and values[0] > 0 and values[-1] / values[0] >= 10
    drawn = numeric and len(values) > FEW_VALUES and len(having) < 2 * len(values)
    return {
        "name": title,
        "log": log,
        "values": values if log or drawn else None,
        "joined": numeric and not name.endswith("seed"),
        "labels": [shown(value) for value in values],
        "means": []
        if drawn
        else [statistics.fmean(s for s in group if s is not None) for group in scores],
        "points": [[values.index(t.settings[name]), t.score, t.place] for t in having],
    }


# --- words ------------------------------------------------------------------------------------


def spaced(name: str) -> str:
    return name.replace("_", " ")


def shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def score_text(kind: Task | type[Task], value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}{PERCENT}" if kind.percent else f"{value:.3f}"


def loss_text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _mean_and_deviation(task: Task, mean: float, deviation: float) -> str:
    if task.percent:
        return f"{100 * mean:.1f} ± {100 * deviation:.1f}{PERCENT}"
    return f"{mean:.3f} ± {deviation:.3f}"
