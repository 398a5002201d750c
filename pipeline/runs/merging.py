"""One finished run put into another, as its later members: a sweep is made of its rounds so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.runs.events import FOLDER as EVENTS
from pipeline.runs.folder import copy_tree, replace_text
from pipeline.runs.run import ENVIRONMENT, MEMBERS, Run
from pipeline.runs.summary import member_id, position_of


def merge(part: Run, whole: Run, *, first: int, cost: Mapping[str, Any]) -> None:
    """Put the finished run `part` into `whole` as its members `first`, `first` + 1, …

    Done again after a kill, it leaves the same: what `whole` holds of members from `first` on is
    replaced, and `cost` is its cost.json from before. `whole` need not be there yet.
    """
    config, rows = part.config(), part.summary()
    ids = {row["id"]: later(row["id"], first) for row in rows}
    before = (
        [row for row in whole.summary() if position_of(row["id"]) < first] if whole.finished else []
    )
    earlier = whole.config().members[:first] if first else ()
    for folder in (MEMBERS, EVENTS):
        for old, new in ids.items():
            if (part.path / folder / old).exists():
                copy_tree(part.path / folder / old, whole.path / folder / new)
    lines = [line for line in whole.metrics() if position_of(line["member"]) < first]
    whole.write_metrics([*lines, *({**m, "member": ids[m["member"]]} for m in part.metrics())])
    replace_text(whole.path / ENVIRONMENT, (part.path / ENVIRONMENT).read_text(encoding="utf-8"))
    whole.write_config(replace(config, out=str(whole.path), members=(*earlier, *config.members)))
    spent = part.cost()
    lines_of_all = [*before, *({**row, "id": ids[row["id"]]} for row in rows)]
    whole.finish(lines_of_all, add_costs(cost, spent) if cost else spent)


def later(member: str, places: int) -> str:
    """The id of the member so many places behind this one."""
    return member_id(position_of(member) + places)


def add_costs(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """cost.json of two passes over one cache: sums, and the rates that follow from them."""
    total = dict(other)
    for name in ("seconds", "bytes_read", "members"):
        total[name] = one[name] + other[name]
    images = sum(cost["seconds"] * cost["images_per_second"] for cost in (one, other))
    total["images_per_second"] = images / max(total["seconds"], 1e-9)
    total["seconds_per_member"] = total["seconds"] / total["members"]
    return total
