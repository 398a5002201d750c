"""Labellings made from sources and lists, and of one that is there: as a cache takes them.

A labelling here is a description (`cache.Labelling`) and its tables together, over rows that are
known by key. What this file does not know: where a cache lies, features.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cache import Labelling, Reader, Target, decode_keys, encode_keys, no_label
from pipeline.errors import SettingError, SourceError, some
from pipeline.sources.source import Source, TargetColumn
from pipeline.sources.splits import in_order
from pipeline.sources.tables import TableRows
from pipeline.tasks import task_of

FOLD = "fold"  # the column of a list that says it


@dataclass(frozen=True, kw_only=True, eq=False)
class Questions:
    """What is asked of N rows: `keys` names them, `tables` are those that `labelling` asks for."""

    keys: Sequence[str]
    labelling: Labelling
    tables: Mapping[str, np.ndarray]

    def digest(self, digests: np.ndarray | None) -> str:
        """The labelling's digest, with those of the rows' inputs, (N, 32)."""
        return self.labelling.digest(self.keys, digests, self.tables)

    def rows(self, numbers: np.ndarray, keys: Sequence[str]) -> Questions:
        """What is asked of other rows: of row n what is asked here of `numbers[n]`, nothing where
        that is -1."""
        there = numbers >= 0
        tables = {}
        for name, table in self._by_row().items():
            taken = table[np.where(there, numbers, 0)]
            taken[~there] = no_label(taken.dtype)
            tables[name] = taken
        for group in self.labelling.groups:
            names = self.groups(group)
            tables[f"groups/{group}"] = encode_keys([names[n] if n >= 0 else "" for n in numbers])
        labelling = replace(self.labelling, rows=len(keys))
        return Questions(keys=keys, labelling=labelling, tables=tables)

    def groups(self, name: str) -> list[str]:
        """The group of each row."""
        return decode_keys(self.tables[f"groups/{name}"])

    def asking(self, other: Questions, *, add: bool) -> Questions:
        """With the targets, splits, groups and folds of `other`, of the same rows.

        Splits, groups and folds that it does not speak of stay. So do, with `add`, the targets of
        other names; without it, they go if `other` has any. Raises SettingError where `add` would
        replace a target.
        """
        mine, theirs = self.labelling, other.labelling
        old = [] if theirs.targets and not add else list(mine.targets)
        if twice := {t.name for t in old} & {t.name for t in theirs.targets}:
            raise SettingError(
                f"target {', '.join(sorted(twice))} is there already: leave out --add to replace "
                f"the targets, or give the column another name, as in label:NAME"
            )
        targets = (*old, *theirs.targets)
        groups = tuple(dict.fromkeys([*mine.groups, *theirs.groups]))
        kept = {**self.tables, **other.tables}
        labelling = replace(
            mine,
            targets=targets,
            splits=theirs.splits or mine.splits,
            groups=groups,
            folds=theirs.folds or mine.folds,
            notes={**mine.notes, **theirs.notes},
        )
        names = {*labelling.tables, *(f"groups/{group}" for group in groups)}
        tables = {name: table for name, table in kept.items() if name in names}
        return Questions(keys=self.keys, labelling=labelling, tables=tables)

    def filled_from(self, other: Questions) -> Questions:
        """With what `other` says of those rows of which nothing is said here: its splits, and its
        targets of the same name and kind; classes and splits that are new come last."""
        theirs = other.labelling
        empty = np.ones(len(self.keys), bool)
        for table in self._by_row().values():
            empty &= _isno_label(table)
        tables, targets = dict(self.tables), []
        splits = (*self.labelling.splits, *(s for s in theirs.splits if s not in self.splits))
        if "split" in other.tables and "split" in tables:
            tables["split"] = tables["split"].copy()
            place = np.array([splits.index(split) for split in theirs.splits], np.int16)
            tables["split"][empty] = place[other.tables["split"][empty]]
        for target in self.labelling.targets:
            named = {t.name: t for t in theirs.targets if t.kind == target.kind}
            if (same := named.get(target.name)) is None:
                targets.append(target)
                continue
            values = other.tables[f"labels/{target.name}"]
            new = [name for name in same.classes if name not in target.classes]
            merged = replace(target, classes=(*target.classes, *new))
            mine = _renumbered(tables[f"labels/{target.name}"], target, merged)
            mine[empty] = _renumbered(values, same, merged)[empty]
            tables[f"labels/{target.name}"] = mine
            targets.append(merged)
        labelling = replace(self.labelling, targets=tuple(targets), splits=splits)
        return Questions(keys=self.keys, labelling=labelling, tables=tables)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return self.labelling.splits

    def _by_row(self) -> dict[str, np.ndarray]:
        return {name: self.tables[name] for name in self.labelling.tables}


def of_reader(reader: Reader) -> Questions:
    """What a cache asks of its rows now."""
    return Questions(
        keys=reader.keys, labelling=reader.labelling, tables=dict(reader.labelling_tables)
    )


def of_source(source: Source) -> Questions:
    """What a source says of its inputs, in its order."""
    splits = [source.splits.index(row.split) for row in source.rows]
    labelling = Labelling(
        rows=len(source.rows),
        targets=tuple(_target(target) for target in source.targets),
        splits=source.splits,
        notes={"labels": source.description},
    )
    tables = {f"labels/{target.name}": target.values for target in source.targets}
    tables["split"] = np.array(splits, np.int16)
    return Questions(keys=[row.key for row in source.rows], labelling=labelling, tables=tables)


def of_list(table: TableRows, keys: Sequence[str], group: str | None) -> Questions:
    """What a list says of its rows, which a cache calls `keys`; `group` is the title of a column.

    A column `fold` says folds. Raises SourceError for a fold that is no number, or no such column.
    """
    splits = in_order(table.splits or ())
    tables = {f"labels/{target.name}": target.values for target in table.targets}
    if table.splits is not None:
        tables["split"] = np.array([splits.index(split) for split in table.splits], np.int16)
    names: tuple[str, ...] = ()
    if group is not None and group in table.others:
        names = (group_name(group),)
        tables[f"groups/{names[0]}"] = encode_keys(table.column(group))
    folds = 0
    if FOLD in table.others:
        tables["fold"] = _folds(table)
        folds = int(tables["fold"].max()) + 1
    labelling = Labelling(
        rows=len(keys),
        targets=tuple(_target(target) for target in table.targets),
        splits=splits,
        groups=names,
        folds=max(folds, 2) if FOLD in table.others else 0,
        notes={"labels": table.description},
    )
    return Questions(keys=keys, labelling=labelling, tables=tables)


def numbers_of(keys: Sequence[str], among: Iterable[str]) -> np.ndarray:
    """Where each key is `among` others, int64, -1 where it is not."""
    place = {key: number for number, key in enumerate(among)}
    return np.array([place.get(key, -1) for key in keys], np.int64)


def group_name(title: str) -> str:
    """A column's title as a cache names a group: `Patient ID` → `patient_id`."""
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_") or "group"


def columns(reader: Reader) -> dict[str, list[str]]:
    """The labelling as the columns of a list that `label` reads again: title → one text a row."""
    found: dict[str, list[str]] = {"key": list(reader.keys)}
    if reader.labelling.splits:
        splits = (*reader.labelling.splits, "")  # -1: the last
        found["split"] = [splits[split] for split in reader.split.tolist()]
    only = [(t.name, t.kind) for t in reader.labelling.targets] == [("label", "class")]
    for target in reader.labelling.targets:
        task = task_of(target)
        title = "label" if only else f"{task.column}:{target.name}"
        found[title] = [task.written(label) for label in reader.labels(target.name)]
    for group in reader.labelling.groups:
        found[group] = reader.groups(group)
    if reader.labelling.folds:
        found[FOLD] = ["" if fold < 0 else str(fold) for fold in reader.folds.tolist()]
    return found


def _target(column: TargetColumn) -> Target:
    return Target(name=column.name, kind=column.kind, classes=column.classes)


def _folds(table: TableRows) -> np.ndarray:
    folds = []
    for text, place in zip(table.column(FOLD), table.places, strict=True):
        if text and not text.isdecimal():
            raise SourceError(f"{place}: fold {text!r}; expected 0, 1, 2 … or an empty cell")
        folds.append(int(text) if text else -1)
    if max(folds) < 0:
        raise SourceError(f"{table.description}: its column {FOLD} is empty; fill or remove it")
    return np.array(folds, np.int16)


def _isno_label(table: np.ndarray) -> np.ndarray:
    """Which rows of a labelling's table say nothing, bool (N,)."""
    flat = table.reshape(len(table), -1)
    nothing = np.isnan(flat) if flat.dtype.kind == "f" else flat == no_label(flat.dtype)
    return nothing.all(axis=1)


def _renumbered(values: np.ndarray, old: Target, new: Target) -> np.ndarray:
    """A copy of a target's values as they are among the classes of `new`, which has them all."""
    place = [new.classes.index(name) for name in old.classes]
    return task_of(old).renumbered(values, place, new.classes)


def refuse_strangers(names: Sequence[str], numbers: np.ndarray, cache: str) -> None:
    """Raise SourceError if some of the rows that a list names are not the cache's."""
    strangers = [name for name, number in zip(names, numbers.tolist(), strict=True) if number < 0]
    if strangers:
        raise SourceError(
            f"{len(strangers)} of {len(names)} rows are not in {cache}: {some(strangers)}; "
            f"expected its keys (`sidecache label {cache} --show` lists them). New inputs come by "
            f"`sidecache extract --update`"
        )
