"""One page about one or several runs, complete in itself: no network, no fonts, no libraries.

Python gathers plain data and renders tables (`pages/report.html.jinja`); a small script in the page
draws the curves as SVG. Members are ranked by summary.csv alone, within one task on the same
images; predictions are those of the validation split (`mistakes.py`), and test numbers are shown
as `evaluate` wrote them down, never used.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cache import CacheError
from pipeline.config import Member, PassConfig, ReportConfig, TrainConfig
from pipeline.device import pick_device
from pipeline.errors import PipelineError, RunError, needed_for
from pipeline.pages.leaderboard import (
    Loaded,
    Trained,
    board,
    comparable,
    load,
    loss_text,
    score_text,
    spaced,
)
from pipeline.pages.mistakes import add_thumbnails, examine
from pipeline.runs.folder import replace_text
from pipeline.runs.run import PAGE, SUMMARY
from pipeline.runs.summary import member_id
from pipeline.setting import settings_of
from pipeline.side import METHODS
from pipeline.sources.open import opener
from pipeline.sources.source import Source
from pipeline.tasks import KINDS

with needed_for("a report", extra="report"):
    import jinja2
    import PIL  # noqa: F401  for thumbnails: told before anything is computed

PAGES = Path(__file__).parent / "pages"


@dataclass(frozen=True, kw_only=True)
class Written:
    """The page `out`, what is in it, and what had to be left out of it and why."""

    out: str
    runs: int
    members: int
    left_out: list[str]


def report(config: ReportConfig) -> Written:
    """Write a page about finished runs; by default to RUN/report.html, or, if they are several, to
    report.html here.

    A member is looked at closely, by default the best of each task on validation; with `images` its
    mistakes are shown. A cache that is gone, or images that are not those of the cache, are left
    out and named in the result. Raises RunError if a run is not finished or has no such member,
    SourceError if the images cannot be opened.
    """
    pick_device(config.device)
    open_images = opener(
        config.images,
        data_dir=config.data_dir,
        input_key=config.input_key,
        target_key=config.target_key,
    )
    left_out: list[str] = []
    with ExitStack() as opened:
        loaded = [
            load(Path(path), number, opened, left_out)
            for number, path in enumerate(dict.fromkeys(config.runs))
        ]
        groups = comparable(loaded)
        boards = [board(number, group, loaded) for number, group in enumerate(groups)]
        pairs = list(zip(boards, groups, strict=True))
        details = [
            _detail(chosen, loaded[chosen.run], open_images, config, left_out)
            | {"board": next(made["id"] for made, group in pairs if chosen in group)}
            for chosen in _chosen(loaded, config.member)
        ]
    for made, group in pairs:
        for line, one in zip(made["members"], group, strict=True):
            line["command"] = _in_parts(command_of(one.config, one.member))
    target = Path(config.out or (loaded[0].run.path / PAGE if len(loaded) == 1 else PAGE))
    page = _render(loaded, boards, details, left_out)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_text(target, page)
    return Written(
        out=str(target),
        runs=len(loaded),
        members=sum(len(one.members) for one in loaded),
        left_out=left_out,
    )


def command_of(config: TrainConfig, member: Member) -> list[str]:
    """The command line that trains `member` of `config` alone, without the leading `sidecache`.

    Every setting is written out, so that later defaults change nothing.
    """
    out = f"{config.out.rstrip('/')}-{member_id(config.members.index(member))}"
    values = {**member.all_settings, **vars(config), "out": out, "overwrite": False}
    line = ["train", config.cache, "--method", member.method]
    for owner in (METHODS[member.method].settings_class, Member, PassConfig):
        for name, about in settings_of(owner).items():
            if not about.argument:
                line += about.words(values.get(name))
    return line


# --- one member, closely ----------------------------------------------------------------------


def _chosen(loaded: Sequence[Loaded], member: str | None) -> list[Trained]:
    """`member` of each run, or the best member of each run's tasks."""
    chosen = []
    for one in loaded:
        if member is not None:
            found = [trained for trained in one.members if trained.id == member]
            if not found:
                known = ", ".join(trained.id for trained in one.members[:8])
                raise RunError(f"{one.run.path}: no member {member!r}; it has {known}")
            chosen += found
            continue
        tasks: dict[str, list[Trained]] = {}
        for trained in one.members:
            tasks.setdefault(trained.task.name, []).append(trained)
        chosen += [min(group, key=lambda t: t.rank) for group in tasks.values()]
    return chosen


def _detail(
    chosen: Trained,
    one: Loaded,
    open_images: Callable[..., Source] | None,
    config: ReportConfig,
    left_out: list[str],
) -> dict[str, Any]:
    """A close look at one member, `found` None if there is nothing to look at."""
    detail: dict[str, Any] = {"trained": chosen, "run": one.name, "found": None, "why": ""}
    if one.reader is None:
        return detail | {"why": "The cache that it learned from is not there."}
    if not one.config.val_split:
        return detail | {"why": "Nothing was validated."}
    try:
        trained = one.run.load_member(chosen.id, pick_device("cpu"))
        found = examine(trained, one.config, one.reader, config.device, config.amp)
    except (CacheError, PipelineError) as error:
        left_out.append(f"{one.run.path}: no look at predictions: {error}")
        return detail | {"why": f"Left out: {error}."}
    if open_images is not None and found["mistakes"]:
        source = open_images(splits=one.config.val_split)
        missing = add_thumbnails(found["mistakes"], source, one.reader)
        left_out += [f"{one.run.path}: {text}" for text in missing]
    return detail | {"found": found}


# --- the page ---------------------------------------------------------------------------------


def _render(
    loaded: Sequence[Loaded],
    boards: Sequence[dict[str, Any]],
    details: Sequence[dict[str, Any]],
    left_out: Sequence[str],
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(flag=spaced, loss=loss_text)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "allow_nan": False}
    drawn = ("id", "score_name", "percent", "members", "effects", "differing")
    scatters = {
        detail["trained"].place: detail["found"]["points"]
        for detail in details
        if detail["found"] and "points" in detail["found"]
    }
    parts = {  # what a kind of target shows of a member
        kind: environment.get_template(f"{kind}.html.jinja").module
        for kind in {detail["trained"].task.kind for detail in details}
        if (PAGES / f"{kind}.html.jinja").exists()
    }
    return environment.get_template(f"{PAGE}.jinja").render(
        title=_listed([one.name for one in loaded]),
        runs=[_facts(one) for one in loaded],
        boards=boards,
        details=details,
        parts=parts,
        costs=_costs(loaded),
        evaluations=[_evaluation(one, line) for one in loaded for line in one.evaluations],
        left_out=left_out,
        data={
            "boards": [{name: board[name] for name in drawn} for board in boards],
            "scatters": scatters,
        },
        style=(PAGES / "report.css").read_text(encoding="utf-8"),
        script=(PAGES / "report.js").read_text(encoding="utf-8"),
    )


def _facts(one: Loaded) -> dict[str, Any]:
    """What was trained on what."""
    card = one.run.card(one.members[0].id)
    finished = datetime.fromtimestamp((one.run.path / SUMMARY).stat().st_mtime).astimezone()
    facts = {"cache": Path(one.config.cache).name, "backbone": card["backbone"]["name"], "rows": ""}
    if one.reader is not None:
        splits = [("train", one.config.train_split), ("validation", one.config.val_split)]
        counts = [(len(one.reader.split_rows(*s)), name) for name, s in splits if s]
        facts["rows"] = ", ".join(f"{count:,} {name}" for count, name in counts)
    elif "rows" in one.cost:
        facts["rows"] = f"{one.cost['rows']:,} train"
    methods = list(dict.fromkeys(trained.member.method for trained in one.members))
    facts["members"] = f"{len(one.members):,} ({', '.join(methods)})"
    machine = [one.environment.get(name) for name in ("device", "precision")]
    facts["device"] = ", ".join(str(part) for part in machine if part)
    facts["finished"] = f"{finished:%Y-%m-%d %H:%M %Z}"
    return {"name": one.name, "cache": one.config.cache, "facts": facts}


def _costs(loaded: Sequence[Loaded]) -> list[dict[str, Any]]:
    """One table, a column a run: what is known of its cost."""
    names = {
        "extraction_seconds": ("extraction, once", _duration),
        "cache_bytes": ("cache", _size),
        "seconds": ("training, all members", _duration),
        "seconds_per_member": ("training, a member", _duration),
        "images_per_second": (
            "images a second, each for all members",
            lambda value: f"{value:,.0f}",
        ),
        "bytes_read": ("read from the cache", _size),
    }
    lines = []
    for key, (name, text) in names.items():
        values = [one.cost.get(key) for one in loaded]
        if any(value is not None for value in values):
            cells = ["–" if value is None else text(value) for value in values]
            lines.append({"name": name, "cells": cells})
    alone = [_separately(one) for one in loaded]
    if any(alone):
        lines.append({"name": "one member at a time", "cells": [text or "–" for text in alone]})
    return lines


def _separately(one: Loaded) -> str:
    """Bytes that the members would have read one by one; empty where that is not K times the pass:
    if they read different taps, or for different numbers of epochs."""
    count, size = len(one.members), one.cost.get("bytes_read")
    reads = {
        str(
            [
                t.member.method,
                t.member.epochs,
                *(t.settings.get(name) for name in METHODS[t.member.method].settings_class.reads()),
            ]
        )
        for t in one.members
    }
    if count < 2 or not size or len(reads) > 1 or any(t.stopped for t in one.members):
        return ""
    return f"{count} × {_size(size)} = {_size(count * size)} read"


def _evaluation(one: Loaded, line: Mapping[str, Any]) -> dict[str, str]:
    told = [
        f"{title} {score_text(kind, line[name])}"
        for kind in KINDS.values()
        for name, title in kind.scores.items()
        if name in line
    ]
    if "loss" in line:
        told.append(f"loss {loss_text(line['loss'])}")
    return {
        "run": one.name,
        "member": str(line.get("member", "")),
        "split": "+".join(line.get("split", ())) + (" (live)" if line.get("live") else ""),
        "scores": ", ".join(told),
        "n": f"{line['n']:,}" if "n" in line else "",
        "source": str(line.get("source", "")),
    }


def _in_parts(command: Sequence[str]) -> list[str]:
    """A command line for the shell, each flag together with its value."""
    parts = ["sidecache"]
    for word in command:
        if word.startswith("--"):
            parts.append(word)
        else:
            parts[-1] += f" {shlex.quote(word)}"
    return parts


def _listed(names: Sequence[str]) -> str:
    if len(names) > 4:
        return f"{len(names)} runs"
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _size(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
