"""Several tasks in one pass; refit; a judge that stops members: what a search is made of."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from conftest import extract_config, paint, train_config

from cache import NameMissing, Reader
from pipeline.config import Member
from pipeline.errors import RunError, SettingError
from pipeline.evaluate import mean_and_deviation
from pipeline.extract import extract
from pipeline.records import MemberStopped
from pipeline.runs.run import Run
from pipeline.runs.summary import score_of
from pipeline.search.winners import winners
from pipeline.train import refit, train
from sidecache import evaluate, predict

LAST = Member(method="last", epochs=6, warmup_epochs=1, lr=1e-2, settings={"rank": 4})
TASKS = ("colour", "marks", "warmth")
KINDS = {"colour": "val_top1", "marks": "val_map", "warmth": "val_r2"}


def of_task(name: str) -> Member:
    return dataclasses.replace(LAST, task=name, epochs=20)


def losses(run: Path, member: str) -> list[float]:
    return [line["train_loss"] for line in Run(run).metrics() if line["member"] == member]


def test_every_kind_is_learned_in_one_pass(tasks_cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train(train_config(tasks_cache, run, *map(of_task, TASKS)))
    for member, task in zip(result.members, TASKS, strict=True):
        assert member.settings["task"] == task and member.metric == KINDS[task]
        assert member.score is not None and member.score > 0.9, task
        row = Run(run).summary()[int(member.id[1:])]
        assert score_of(row) == pytest.approx(member.score)
    assert train(train_config(tasks_cache, run, *map(of_task, TASKS))).members == result.members

    found = evaluate(run, device="cpu", amp=False)
    assert [(e.member, e.task) for e in found] == [("m0", "colour"), ("m1", "marks"),
                                                   ("m2", "warmth")]  # fmt: skip
    assert [next(iter(e.scores)) for e in found] == ["top1", "map", "r2"]
    records = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert records[1]["map"] == found[1].scores["map"] and records[1]["task"] == "marks"
    with pytest.raises(RunError, match="expected one of its tasks, colour, marks, warmth"):
        Run(run).best_member()
    assert [e.member for e in evaluate(run, task="warmth", device="cpu")] == ["m2"]


def test_a_task_among_others_is_the_task_alone(tasks_cache: Path, tmp_path: Path) -> None:
    train(train_config(tasks_cache, tmp_path / "all", *map(of_task, TASKS)))
    for position, task in enumerate(TASKS):
        train(train_config(tasks_cache, tmp_path / task, of_task(task)))
        together = losses(tmp_path / "all", f"m{position}")
        assert together == pytest.approx(losses(tmp_path / task, "m0"), rel=1e-4)


@pytest.mark.usefixtures("no_hub")
def test_predictions_speak_the_tasks_language(tasks_cache: Path, tmp_path: Path) -> None:
    train(train_config(tasks_cache, tmp_path / "run", *map(of_task, TASKS)))
    paint(tmp_path / "new", train=1, val=1, test=1)
    photo = tmp_path / "new" / "train" / "red" / "0.png"

    def one(task: str) -> object:
        return predict(tmp_path / "run", [photo], task=task, device="cpu", amp=False)[0]

    colour, marks, warmth = map(one, TASKS)
    assert colour.classes[0] == "red" and sum(colour.probabilities) == pytest.approx(1)
    assert set(marks.classes[:2]) == {"warm", "bright"} and min(marks.probabilities[:2]) > 0.5
    assert warmth.value == pytest.approx(30, abs=6) and warmth.classes == []
    with pytest.raises(RunError, match="expected one of its tasks"):
        predict(tmp_path / "run", [photo], device="cpu")


def test_bad_tasks_are_named(tasks_cache: Path, tmp_path: Path) -> None:
    def run(member: Member) -> None:
        train(train_config(tasks_cache, tmp_path / "run", member))

    with pytest.raises(NameMissing, match=r"no target 'size' .* it holds colour, marks, warmth"):
        run(of_task("size"))
    with pytest.raises(SettingError, match=r"smoothing = 0\.1: expected 0 for a regression"):
        run(dataclasses.replace(of_task("warmth"), smoothing=0.1))
    assert not (tmp_path / "run").exists()


def test_rows_without_any_label_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = paint(tmp_path / "images")
    files = sorted(folder.rglob("*.png"))
    lines = [
        f"{p.relative_to(folder)},{'' if n % 4 == 0 else p.parent.name},{p.parent.parent.name}"
        for n, p in enumerate(files)
    ]
    (folder / "list.csv").write_text("path,label:colour,split\n" + "\n".join(lines) + "\n")
    extract(extract_config(folder / "list.csv", tmp_path / "c.zarr"))
    records: list[object] = []
    train(train_config(tmp_path / "c.zarr", tmp_path / "run", LAST), records.append)
    (start,) = [r for r in records if hasattr(r, "left_out")]
    with Reader(tmp_path / "c.zarr") as reader:
        rows = reader.split_rows("train", "val")
        missing = int((reader.labels()[rows] < 0).sum())
    assert missing and start.left_out == missing
    assert start.train_rows + start.val_rows == len(rows) - missing


def test_a_judge_stops_members_and_the_others_do_not_notice(
    zarr_cache: Path, tmp_path: Path
) -> None:
    members = [dataclasses.replace(LAST, seed=seed, drop_path=0.2) for seed in range(5)]
    short = dataclasses.replace(LAST, epochs=2, seed=9)
    seen: list[tuple[int, list[str]]] = []

    def judge(epoch: int, scores: Mapping[str, float | None]) -> list[str]:
        seen.append((epoch, list(scores)))
        return ["m1", "m3"] if epoch == 3 else []

    records: list[object] = []
    run = tmp_path / "judged"
    result = train(train_config(zarr_cache, run, *members, short), records.append, judge)
    assert [m.stopped for m in result.members] == [
        None, "pruned after epoch 3", None, "pruned after epoch 3", None, None]  # fmt: skip
    assert [len(losses(run, f"m{i}")) for i in range(6)] == [6, 3, 6, 3, 6, 2]
    assert dict(seen)[1] == ["m0", "m1", "m2", "m3", "m4", "m5"]
    assert dict(seen)[2] == ["m0", "m1", "m2", "m3", "m4"], "m5 has ended by itself"
    assert dict(seen)[4] == ["m0", "m2", "m4"] and 6 not in dict(seen)
    assert [r.pruned for r in records if isinstance(r, MemberStopped)] == [True, True]
    train(train_config(zarr_cache, tmp_path / "free", *members, short))
    for member in ("m0", "m2", "m4", "m5"):
        assert losses(run, member) == pytest.approx(losses(tmp_path / "free", member), rel=1e-5)
    assert losses(run, "m1") == pytest.approx(losses(tmp_path / "free", "m1")[:3], rel=1e-5)
    assert evaluate(run, members=["m1"], device="cpu")[0].n == 6, "its weights are kept"
    assert Run(run).best_member() not in ("m1", "m3")


def test_refit_trains_the_best_setting_on_train_and_val(zarr_cache: Path, tmp_path: Path) -> None:
    """Chosen by the mean over seeds, so one lucky seed of a bad setting does not win."""
    grid = [
        dataclasses.replace(LAST, lr=lr, seed=seed, epochs=12) for lr in (1e-6, 1e-2)
        for seed in (0, 1)
    ]  # fmt: skip
    train(train_config(zarr_cache, tmp_path / "run", *grid))
    run = Run(tmp_path / "run")
    (winner,) = winners(run)
    assert (winner.member.lr, winner.seeds) == (1e-2, (0, 1))
    rows = [score_of(row) for row in run.summary()]
    assert winner.score == np.mean(rows[2:]) and winner.scores == tuple(rows[2:])

    result = refit(run.path, [3, 4, 5])
    assert result.winners == [winner] and result.open_settings == ["lr"]
    config = Run(result.run).config()
    assert (config.train_split, config.val_split) == (("train", "val"), ())
    assert [m.seed for m in config.members] == [3, 4, 5]
    assert {m.lr for m in config.members} == {1e-2}
    assert refit(run.path, [3, 4, 5]).epochs_trained == 0, "done once"
    found = evaluate(result.run, device="cpu")
    assert [e.member for e in found] == ["m0", "m1", "m2"], "no best member: all"
    mean, deviation = mean_and_deviation(found)["top1"]
    each = [e.scores["top1"] for e in found]
    assert (mean, deviation) == (np.mean(each), pytest.approx(np.std(each, ddof=1)))
    with (tmp_path / "run" / "refit" / "summary.csv").open() as file:
        assert all(row["val_top1"] == "" for row in csv.DictReader(file))
    with pytest.raises(RunError, match="expected members with a validation score"):
        winners(Run(result.run))
    with pytest.raises(SettingError, match=r"refit = \[1, 1\]: expected one seed or more"):
        refit(run.path, [1, 1])


def test_costs_are_kept(zarr_cache: Path, tmp_path: Path) -> None:
    train(train_config(zarr_cache, tmp_path / "ram", LAST, resident="ram"))
    train(train_config(zarr_cache, tmp_path / "disk", LAST, resident="disk"))
    ram, disk = (json.loads((tmp_path / n / "cost.json").read_text()) for n in ("ram", "disk"))
    with Reader(zarr_cache) as reader:
        row = reader.manifest.slot_nbytes
        assert ram["cache_bytes"] == reader.manifest.nbytes
        assert ram["extraction_seconds"] == reader.seconds
    assert ram["bytes_read"] == 18 * row, "12 rows of train and 6 of val, once"
    assert disk["bytes_read"] == 6 * 18 * row, "each epoch again"
    assert ram["members"] == 1 and ram["seconds"] == ram["seconds_per_member"] > 0
