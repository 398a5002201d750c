"""Ask other things of a cache's rows: labels, splits, groups, folds. No feature is computed.

The labelling is replaced in one step; who trains from the cache just then goes on with the old one,
and runs remember which one they learned from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cache import Reader, Writer
from pipeline.config import LabelConfig
from pipeline.errors import SettingError
from pipeline.labelling.folds import draw_folds
from pipeline.labelling.questions import (
    Questions,
    columns,
    group_name,
    numbers_of,
    of_list,
    of_reader,
    of_source,
    refuse_strangers,
)
from pipeline.sources.open import open_source
from pipeline.sources.tables import SEPARATORS, read_table
from pipeline.tasks import exclusive


@dataclass(frozen=True, kw_only=True)
class LabelResult:
    """What `label` did. `labelling` is the digest; `changed` is False if all was so already;
    `unlisted` rows are in the cache and not in the list: they have no label and no split of it."""

    cache: str
    rows: int
    targets: list[str]
    splits: list[str]
    groups: list[str]
    folds: list[int]
    unlisted: int
    labelling: str
    changed: bool


def label(config: LabelConfig) -> LabelResult:
    """Replace the labelling of a cache, or parts of it, as `config` says.

    A list (.csv, .tsv) replaces the targets if it has label columns, the splits if it has a column
    `split`, the folds if it has a column `fold`; anything else that `extract` takes says targets
    and splits. Its rows are matched by key. Raises cache errors, SourceError for a list that does
    not fit (naming line or row), SettingError for folds that cannot be drawn.
    """
    with Reader(config.cache, allow_incomplete=True) as reader:
        asked, unlisted = of_reader(reader), 0
        if config.source is not None:
            news, unlisted = _news(config, reader)
            asked = asked.asking(news, add=config.add)
        if config.folds:
            asked = _with_folds(asked, config)
        digests = reader.source_sha256 if reader.has("source_sha256") else None
        digest = asked.digest(digests)
        changed = digest != reader.labelling_digest
        kept = reader.place_tables
    if changed:
        with Writer.resume(config.cache) as writer:
            labelling = replace(asked.labelling, notes={**asked.labelling.notes, "by": "label"})
            writer.label(labelling, {**asked.tables, **kept}, digest)
    folds = asked.tables["fold"] if asked.labelling.folds else np.zeros(0, np.int16)
    return LabelResult(
        cache=str(config.cache),
        rows=asked.labelling.rows,
        targets=[target.name for target in asked.labelling.targets],
        splits=list(asked.labelling.splits),
        groups=list(asked.labelling.groups),
        folds=np.bincount(folds[folds >= 0], minlength=asked.labelling.folds).tolist(),
        unlisted=unlisted,
        labelling=digest,
        changed=changed,
    )


def columns_of(location: str) -> dict[str, list[str]]:
    """The labelling of a cache as the columns of a list that `label` reads again: title → one text
    a row. Raises cache errors."""
    with Reader(location, allow_incomplete=True) as reader:
        return columns(reader)


def _news(config: LabelConfig, reader: Reader) -> tuple[Questions, int]:
    """What a list or source says of the cache's rows, and of how many it does not speak."""
    path = Path(str(config.source))
    if path.is_file() and path.suffix.lower() in SEPARATORS:
        table = read_table(path)
        # Paths as the cache was made from them; or its keys, written as paths
        keys = table.keys if set(table.keys) & set(reader.keys) else table.names
        news = of_list(table, keys, config.group)
        _refuse_a_group_that_is_nowhere(config, [*table.others], reader)
    else:
        source = open_source(
            str(config.source),
            data_dir=config.data_dir,
            input_key=config.input_key,
            target_key=config.target_key,
        )
        news = of_source(source)
    refuse_strangers(news.keys, numbers_of(news.keys, reader.keys), config.cache)
    numbers = numbers_of(reader.keys, news.keys)
    return news.rows(numbers, reader.keys), int((numbers < 0).sum())


def _refuse_a_group_that_is_nowhere(config: LabelConfig, titles: list[str], reader: Reader) -> None:
    if config.group in (None, *titles, *reader.labelling.groups):
        return
    there = ", ".join([*titles, *reader.labelling.groups]) or "none"
    raise SettingError(
        f"--group {config.group}: expected a column of {config.source}, or a group of the cache; "
        f"there is {there}"
    )


def _with_folds(asked: Questions, config: LabelConfig) -> Questions:
    """The same questions with folds drawn anew."""
    labelling = asked.labelling
    chosen = _divided(asked, config)
    groups = None
    if config.group is not None:
        name = group_name(config.group)
        if name not in labelling.groups:
            raise SettingError(
                f"--group {config.group}: the cache has {', '.join(labelling.groups) or 'none'}; "
                f"give a list that has it as a column"
            )
        groups = asked.groups(name)
    classes = None
    if config.stratify:
        of_class = exclusive(labelling.targets)
        if not of_class:
            raise SettingError("--stratify: expected a target of kind class in the cache")
        classes = asked.tables[f"labels/{of_class[0].name}"]
    fold = draw_folds(chosen, config.folds, seed=config.seed, groups=groups, classes=classes)
    drawn = {"count": config.folds, "seed": config.seed, "group": config.group}
    notes = {**labelling.notes, "folds": {**drawn, "stratified": config.stratify}}
    return Questions(
        keys=asked.keys,
        labelling=replace(labelling, folds=config.folds, notes=notes),
        tables={**asked.tables, "fold": fold},
    )


def _divided(asked: Questions, config: LabelConfig) -> np.ndarray:
    """Which rows folds divide, bool (N,): those of some splits, by default of all but test."""
    splits = asked.labelling.splits
    if not splits:
        return np.ones(asked.labelling.rows, bool)
    wanted = config.fold_split or tuple(split for split in splits if split != "test")
    if unknown := [split for split in wanted if split not in splits]:
        raise SettingError(
            f"--fold-split {', '.join(unknown)}: the cache's splits are {', '.join(splits)}"
        )
    return np.isin(asked.tables["split"], [splits.index(split) for split in wanted])
