"""Members that diverge: every JSON stays JSON, and what is left of them is ranked and told."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import train_config

import cli
from pipeline.config import Member
from pipeline.evaluate import mean_and_deviation
from pipeline.runs.run import Run
from pipeline.train import train
from sidecache import evaluate, report

TASKS = ("colour", "marks", "warmth")  # a class, classes at once, a number
ENDLESS = 1e30  # a learning rate after whose first step no output is finite


def strict(text: str) -> Any:
    """The value of a JSON text. Python alone takes NaN and Infinity for JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def run_json(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    return strict(result.stdout)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def train_command(cache: Path, out: Path) -> list[object]:
    return [
        "train", cache, "--method", "last", "--rank", 4, "--task", ",".join(TASKS),
        "--lr", f"{ENDLESS},1e-2", "--epochs", 4, "--warmup-epochs", 0, "--device", "cpu",
        "--out", out,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tasks_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run of two members a task, the first of which diverges; what `train` printed. Read-only."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, run_json(*train_command(tasks_cache, out))


@pytest.fixture
def diverged(trained: tuple[Path, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


@pytest.fixture
def last_step(tasks_cache: Path, tmp_path: Path) -> Path:
    """A member a task that diverges in its last step: no loss told of it, it was not stopped."""
    members = [
        Member(method="last", lr=ENDLESS, epochs=1, warmup_epochs=0, settings={"rank": 4}, task=t)
        for t in TASKS
    ]
    train(train_config(tasks_cache, tmp_path / "last_step", *members, batch_size=64))
    return tmp_path / "last_step"


# --- every JSON is JSON -----------------------------------------------------------------------


def test_what_is_printed(trained: tuple[Path, Any], diverged: Path, tasks_cache: Path) -> None:
    _, printed = trained
    members = {member["id"]: member for member in printed["members"]}
    assert all(members[bad]["val_loss"] is None for bad in ("m0", "m2", "m4"))
    assert [members["m0"]["val_top1"], members["m2"]["val_map"], members["m4"]["val_r2"]] == [
        None, None, None,
    ]  # fmt: skip
    assert members["m5"]["val_r2"] > 0.5
    assert all("scores" not in member for member in printed["members"])  # they stand in it, once
    again = run_json(*train_command(tasks_cache, diverged))  # read back from summary.csv
    assert again["members"] == printed["members"]
    scores = run_json("evaluate", diverged, "--member", "all", "--device", "cpu")
    assert [one["loss"] is None for one in scores["members"]] == [True, False] * 3
    assert all("scores" not in one for one in scores["members"])
    assert scores["mean"]["warmth"] == {"r2": None, "mae": None}
    run_json("evaluate", diverged, "--member", "m4", "--device", "cpu")
    run_json("report", diverged, "--member", "m4", "--device", "cpu")
    run_json("inspect", tasks_cache)


def test_what_is_written(diverged: Path) -> None:
    evaluate(diverged, members=["all"], device="cpu")
    report([diverged], device="cpu")
    files = [path for path in diverged.rglob("*") if path.suffix in (".json", ".jsonl")]
    assert {path.name for path in files} == {
        "environment.json", "metrics.jsonl", "cost.json", "evaluations.jsonl",
        "side_network.json",
    }  # fmt: skip
    for path in files:
        text = path.read_text(encoding="utf-8")
        for document in text.splitlines() if path.suffix == ".jsonl" else [text]:
            strict(document)
    page = (diverged / "report.html").read_text(encoding="utf-8")
    data = re.search(r'id="data">(.*?)</script>', page, re.S)
    assert data is not None and len(strict(data[1])["boards"]) == 3
    with (diverged / "summary.csv").open(newline="") as file:
        bad = [row for row in csv.DictReader(file) if row["id"] in ("m0", "m2", "m4")]
    names = [name for name in bad[0] if name.startswith("val_")]
    assert len(names) == 6 and all(row[name] == "" for row in bad for name in names)


def test_what_a_sweep_prints_and_writes(tasks_cache: Path, tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(
        f"method: last\nlr: [{ENDLESS}, 1.0e-2]\nrank: 4\nepochs: 3\nwarmup_epochs: 0\n"
        "task: warmth\n"
    )
    out = tmp_path / "sweep"
    result = run_json("sweep", tasks_cache, "--space", space, "--sampler", "grid",
                      "--device", "cpu", "--out", out)  # fmt: skip
    assert (result["best"], result["failed"]) == ("m1", 1)
    assert result["trials"][-1]["score"] is None and result["trials"][-1]["loss"] is None
    for line in (out / "metrics.jsonl").read_text().splitlines():
        strict(line)


def test_a_page_refuses_what_is_no_json(diverged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nothing but a number or null can come into it, from wherever it may come."""
    monkeypatch.setattr("pipeline.pages.leaderboard.loss_of", lambda _: float("nan"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        report([diverged], device="cpu")


# --- ranked and told --------------------------------------------------------------------------


def test_they_rank_behind_the_others(diverged: Path) -> None:
    assert [Run(diverged).best_member(task) for task in TASKS] == ["m1", "m3", "m5"]


def test_outputs_that_are_not_finite_have_no_score(last_step: Path) -> None:
    """Of classes too, where hits could be counted: they would be chance."""
    rows = Run(last_step).summary()
    assert [row["stopped"] for row in rows] == ["", "", ""]
    assert [row[name] for row in rows for name in ("val_top1", "val_map", "val_r2")] == [""] * 9
    found = evaluate(last_step, members=["all"], device="cpu")
    assert [set(one.scores.values()) for one in found] == [{None}] * 3
    assert [one.loss for one in found] == [None] * 3 and found[0].n == 5


def test_a_mean_does_not_hide_a_member_without_score(diverged: Path) -> None:
    good, bad = evaluate(diverged, members=["m5", "m4"], device="cpu")
    assert mean_and_deviation([good])["r2"] == (good.scores["r2"], 0.0)
    assert mean_and_deviation([good, bad])["r2"] is None
    told = run("evaluate", diverged, "--member", "m4,m5", "--device", "cpu").stdout.splitlines()
    assert told[0].endswith("m4, test: r2 –, mae –, loss –, n = 6")
    assert told[2].endswith("mean of 2 members: r2 –, mae –")


@pytest.mark.usefixtures("no_hub")
def test_predict_names_a_photograph_without_finite_outputs(diverged: Path, images: Path) -> None:
    photo = images / "test" / "red" / "0.png"
    for member in ("m0", "m2", "m4"):
        result = run("predict", diverged, photo, "--member", member, "--device", "cpu", "--json")
        assert (result.exit_code, strict(result.stdout)) == (1, [])
        assert result.stderr == f"sidecache: {photo}: the outputs of {member} are not finite\n"


def test_a_report_says_why_there_is_no_look_and_no_best(last_step: Path) -> None:
    evaluate(last_step, members=["m2"], device="cpu")
    written = report([last_step], device="cpu")
    assert [text.rpartition(": ")[2] for text in written.left_out] == [
        f"the outputs of m{i} are not finite on {rows} of {rows} rows"
        for i, rows in enumerate((11, 12, 12))
    ]
    page = Path(written.out).read_text(encoding="utf-8")
    assert page.count("No validation score is finite: no member can be called the best.") == 3
    assert "R² –, mean absolute error –, loss –" in page  # what `evaluate` found


def test_runs_of_earlier_versions_are_read(diverged: Path, tasks_cache: Path) -> None:
    """They hold NaN where these have null, or an empty cell."""
    metrics, summary = diverged / "metrics.jsonl", diverged / "summary.csv"
    metrics.write_text(metrics.read_text().replace("null", "NaN"))
    with summary.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[4] |= {"val_r2": "nan", "val_mae": "nan", "val_loss": "nan"}
    for row in rows[:2]:
        row |= {"val_top1": "0.5", "val_top5": "1.0", "val_loss": "nan"}
    with summary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    members = run_json(*train_command(tasks_cache, diverged))["members"]
    assert (members[0]["val_top1"], members[0]["val_loss"], members[4]["val_r2"]) == (
        0.5,
        None,
        None,
    )
    page = Path(report([diverged], device="cpu").out).read_text(encoding="utf-8")
    assert "m1 is best on validation (lr 0.01): top-1 50.0\N{NO-BREAK SPACE}%, loss –." in page
    data = re.search(r'id="data">(.*?)</script>', page, re.S)
    assert data is not None
    boards = strict(data[1])["boards"]
    assert [board["members"][-1]["loss"] for board in boards] == [None] * 3
    assert [board["members"][-1]["curves"]["val_loss"] for board in boards] == [[]] * 3
