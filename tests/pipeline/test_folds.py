"""Folds: each is held out by members that never see it, and all of them share one pass."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import extract_config, paint, train_config

import cli
from cache import Reader, Writer
from pipeline.config import LabelConfig, Member
from pipeline.errors import RunError, SettingError
from pipeline.evaluate import CacheChanged
from pipeline.extract import extract
from pipeline.label import label
from pipeline.labelling.questions import of_reader
from pipeline.records import over_folds
from pipeline.runs.run import Run
from pipeline.train import refit, train
from sidecache import evaluate

FOLDS = range(5)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 rows in five folds, and 6 for the test."""
    folder = tmp_path_factory.mktemp("folds")
    out = folder / "features.zarr"
    extract(extract_config(paint(folder / "images", train=8, val=2, test=2), out))
    label(LabelConfig(cache=str(out), folds=5, stratify=True))
    return out


def last(fold: int | None, **changes: object) -> Member:
    settings = {"rank": 4}
    return Member(method="last", epochs=3, warmup_epochs=1, settings=settings, fold=fold,
                  drop_path=0.2, **changes)  # fmt: skip


def weights(run: Path, member: str) -> dict[str, torch.Tensor]:
    return dict(Run(run).load_member(member, CPU).network.named_parameters())


def lines(run: Path, member: str) -> list[dict[str, object]]:
    return [line for line in Run(run).metrics() if line["member"] == member]


def test_five_folds_in_one_pass_equal_five_trainings(folded: Path, tmp_path: Path) -> None:
    """The same losses and scores, epoch by epoch. Weights are not compared: a key's bias changes
    nothing, so its gradient is rounding noise, which Adam makes as large as any other."""
    members = [dataclasses.replace(last(fold), epochs=8) for fold in FOLDS]
    train(train_config(folded, tmp_path / "all", *members))
    for fold in FOLDS:
        alone = tmp_path / f"fold{fold}"
        train(train_config(folded, alone, members[fold]))
        for one, other in zip(lines(tmp_path / "all", f"m{fold}"), lines(alone, "m0"), strict=True):
            assert one.pop("member") == f"m{fold}" and other.pop("member") == "m0"
            assert one == pytest.approx(other, rel=1e-4)


def relabelled(source: Path, out: Path, rows: Sequence[int]) -> Path:
    """A copy of a cache in which some rows have another class."""
    shutil.copytree(source, out)
    with Reader(out) as reader:
        asked, kept = of_reader(reader), reader.place_tables
    labels = asked.tables["labels/label"].copy()
    labels[rows] = (labels[rows] + 1) % 3
    with Writer.resume(out) as writer:
        tables = {**asked.tables, **kept, "labels/label": labels}
        writer.label(asked.labelling, tables, asked.digest(None))
    return out


def test_a_member_never_sees_its_fold(folded: Path, tmp_path: Path) -> None:
    with Reader(folded) as reader:
        own = np.flatnonzero(reader.folds == 2)
        others = np.flatnonzero(reader.folds == 3)
    train(train_config(folded, tmp_path / "run", last(2)))
    before = weights(tmp_path / "run", "m0")
    for rows, same in ((own, True), (others, False)):
        changed = relabelled(folded, tmp_path / f"changed-{same}.zarr", rows.tolist())
        train(train_config(changed, tmp_path / f"run-{same}", last(2)))
        after = weights(tmp_path / f"run-{same}", "m0")
        assert all(torch.equal(after[name], before[name]) for name in before) == same


def test_a_fold_is_scored_on_its_own_rows(folded: Path, tmp_path: Path) -> None:
    """All labels of fold 1 wrong: its member alone is scored low."""
    with Reader(folded) as reader:
        own = np.flatnonzero(reader.folds == 1).tolist()
    changed = relabelled(folded, tmp_path / "changed.zarr", own)
    members = [Member(method="linear", epochs=30, lr=1e-2, fold=fold) for fold in (0, 1)]
    result = train(train_config(changed, tmp_path / "run", *members))
    assert result.members[0].score > 0.8 > 0.3 > result.members[1].score


def test_mean_and_deviation_over_folds(folded: Path, tmp_path: Path) -> None:
    members = [last(fold, lr=lr) for lr in (1e-3, 1e-5) for fold in FOLDS]
    result = train(train_config(folded, tmp_path / "run", *members))
    best, worst = over_folds(result.members)
    scores = [member.score for member in result.members[:5]]
    first = best if best.members[0] == "m0" else worst
    assert first.mean == pytest.approx(np.mean(scores))
    assert first.deviation == pytest.approx(np.std(scores, ddof=1))
    chosen = Run(tmp_path / "run").best_members()
    assert set(chosen) == set(best.members)
    scored = evaluate(tmp_path / "run")
    assert [score.member for score in scored] == chosen
    refitted = refit(str(tmp_path / "run"), [0, 1])
    assert refitted.winners[0].member.fold is None
    assert len(evaluate(tmp_path / "run" / "refit")) == 2


def test_what_folds_refuse(folded: Path, zarr_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"fold = 5: expected one of 0 to 4"):
        train(train_config(folded, tmp_path / "a", last(5)))
    with pytest.raises(SettingError, match=r"fold = None.*for every member or for none"):
        train(train_config(folded, tmp_path / "b", last(0), last(None)))
    with pytest.raises(KeyError, match=r"has no folds.*sidecache label --folds"):
        train(train_config(zarr_cache, tmp_path / "c", last(0)))
    train(train_config(folded, tmp_path / "d", last(0)))
    with pytest.raises(RunError, match=r"folds divide val: it has seen most of it"):
        evaluate(tmp_path / "d", split=("val",))


def test_the_command_line_tells_folds(folded: Path, tmp_path: Path) -> None:
    arguments = ["train", str(folded), "--method", "linear", "--lr", "1e-3,1e-2", "--epochs", "2",
                 "--fold", "0,1,2,3,4", "--device", "cpu", "--no-amp"]  # fmt: skip
    shown = CliRunner().invoke(cli.main, [*arguments, "--out", str(tmp_path / "run")])
    assert shown.exit_code == 0, shown.output
    assert "over folds" in shown.stdout and "5 folds" in shown.stdout and " ± " in shown.stdout
    again = CliRunner().invoke(cli.main, [*arguments, "--out", str(tmp_path / "run"), "--json"])
    settings = json.loads(again.stdout)["folds"]
    assert [len(setting["members"]) for setting in settings] == [5, 5]
    assert "fold" not in settings[0]["settings"]


def test_evaluate_says_what_has_changed_since(folded: Path, tmp_path: Path) -> None:
    place = tmp_path / "mine.zarr"
    shutil.copytree(folded, place)
    train(train_config(place, tmp_path / "run", Member(method="linear", epochs=1)))
    told: list[object] = []
    evaluate(tmp_path / "run", report=told.append)
    assert told == []
    label(LabelConfig(cache=str(place), folds=3))
    evaluate(tmp_path / "run", report=told.append)
    assert told == [CacheChanged(features=False, labelling=True)]
    with pytest.raises(RunError, match=r"labelling: labels, splits or rows"):
        train(train_config(place, tmp_path / "run", Member(method="linear", epochs=1)))
