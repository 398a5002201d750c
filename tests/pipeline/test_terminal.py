"""Flags that are made from settings, and the command lines that settings are made into."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click
import pytest

from pipeline import config
from pipeline.config import (
    CopyConfig,
    EvaluateConfig,
    ExtractConfig,
    LabelConfig,
    Member,
    PassConfig,
    PredictConfig,
    ReportConfig,
    SweepConfig,
    VerifyConfig,
)
from pipeline.setting import settings_of
from pipeline.side import METHODS
from pipeline.terminal.flags import flags, member_flags

SPACE = str(Path(__file__))  # any file that is there
EXTRACT = {"images": "a b", "model": "m", "out": "c.zarr"}
CONFIGS: list[Any] = [
    ExtractConfig(**EXTRACT),
    ExtractConfig(
        **EXTRACT, pretrained=False, split=("train", "val"), data_dir="d", dataset_download=True,
        gather="normsum", gather_k=3, gather_groups=2, gather_pooled=True, dtype="int8",
        img_size=(224, 196), crop_pct=0.875, crop_mode="squash", mean=(0.5, 0.25, 0.125),
        batch_size=7, workers=0, amp=True, on_error="skip", overwrite=True,
    ),
    CopyConfig(src="a", dst="b", taps="0,2"),
    LabelConfig(cache="c", source="l.csv", folds=5, stratify=True, fold_split=("train",)),
    VerifyConfig(cache="c", repair="i", pretrained=False),
    PassConfig(cache="c", out="o", val_split=(), train_split=("train", "more"), amp=False),
    SweepConfig(cache="c", out="o", space=SPACE, trials=3, sampler="random", halving=True),
    EvaluateConfig(run="r"),
    EvaluateConfig(run="r", images="i", members=("m0", "m1"), split=("val", "test")),
    ReportConfig(runs=("r", "s"), out="p.html"),
    PredictConfig(run="r", photos=("a.jpg", "b.jpg"), top_k=1),
]  # fmt: skip


@pytest.mark.parametrize("asked", CONFIGS, ids=lambda asked: type(asked).__name__)
def test_flags_make_the_configuration_that_words_describe(asked: Any) -> None:
    arguments: list[str] = []
    words: list[str] = []
    for name, about in settings_of(type(asked)).items():
        value = getattr(asked, name)
        if not about.argument:
            words += about.words(value)
        elif value is not None:
            arguments += value if isinstance(value, tuple) else [value]
    command = click.Command("made", params=flags(type(asked)))
    found = command.make_context("made", [*arguments, *words]).params
    assert type(asked)(**found) == asked


@pytest.mark.parametrize("name", [n for n in config.__all__ if n.endswith("Config")])
def test_every_field_of_a_configuration_is_a_setting(name: str) -> None:
    owner = getattr(config, name)
    others = {field.name for field in dataclasses.fields(owner)} - settings_of(owner).keys()
    assert others == ({"members"} if name == "TrainConfig" else set())


@pytest.mark.parametrize("asked", CONFIGS, ids=lambda asked: type(asked).__name__)
def test_defaults_are_the_configurations(asked: Any) -> None:
    required = [p for p in flags(type(asked)) if p.required]
    line = [word for p in required if isinstance(p, click.Option) for word in (p.opts[0], SPACE)]
    line += [p.human_readable_name for p in required if isinstance(p, click.Argument)]
    found = click.Command("made", params=flags(type(asked))).make_context("made", line).params
    for name, about in settings_of(type(asked)).items():
        if not about.required:
            assert found[name] == about.default, name


def test_a_flag_of_several_methods_says_what_each_makes_of_it() -> None:
    told = {flag.name: flag for flag in member_flags()}
    assert told["method"].help == f"{', '.join(METHODS)}."
    assert "last, miet: rank R" in str(told["rank"].help)
    pool = str(told["pool"].help)
    assert pool.startswith("last, lst, miet") and "; linear: mean, cls or clsmean (both)" in pool
    assert "[default: mean; linear: cls" in pool
    assert "[default: 30; linear" in str(told["epochs"].help)
    assert settings_of(Member).keys() <= told.keys()
