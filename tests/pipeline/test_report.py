"""The report: what its data say, what it never reads, and that a browser draws it."""

from __future__ import annotations

import csv
import dataclasses
import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from conftest import extract_config, paint, train_config

import cli
import pipeline.train as stage
from cache import Reader
from pipeline.config import Member, TrainConfig
from pipeline.errors import RunError, SourceError
from pipeline.extract import extract
from pipeline.report import Written, command_of
from pipeline.runs.run import Run
from pipeline.side import METHODS
from pipeline.tasks.classes import ClassTask
from pipeline.tasks.multilabel import MultilabelTask
from pipeline.tasks.regression import RegressionTask
from pipeline.train import train
from pipeline.training.members import method_settings
from sidecache import report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
EPOCHS = 3


def member(lr: float = 1e-2, seed: int = 0, **settings: Any) -> Member:
    shape = {"rank": 4, **settings}
    return Member(method="last", lr=lr, seed=seed, epochs=EPOCHS, warmup_epochs=0, settings=shape)


GRID = [member(lr, seed) for lr in (1e-4, 1e-3, 1e-2) for seed in (0, 1)]


@pytest.fixture(scope="module")
def trained(zarr_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six members. Read-only: tests take a `copy`."""
    out = tmp_path_factory.mktemp("runs") / 'a "first" run'
    train(train_config(zarr_cache, out, *GRID))
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / trained.name))


def page_of(written: Written) -> str:
    return Path(written.out).read_text(encoding="utf-8")


def data_of(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


def edit_summary(run: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    path = run / "summary.csv"
    with path.open(newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    change(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def browse(page: Path | str, *scripts: str) -> str:
    """The page's DOM after its script, and then `scripts`, have run in a real browser."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs a browser on PATH: {', '.join(BROWSERS)}")
    page = Path(page)
    if scripts:
        more = "".join(f"<script>{script}</script>" for script in scripts)
        text = page.read_text(encoding="utf-8").replace("</body>", f"{more}</body>")
        page = page.with_name("scripted.html")
        page.write_text(text, encoding="utf-8")
    profile = page.parent / "profile"
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    done = subprocess.run(
        [browser, *flags, "--window-size=1280,900", "--dump-dom", page.absolute().as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    head = re.search(r"<html[^>]*>", done.stdout)
    assert head is not None and 'data-ready="true"' in head[0], head
    assert "data-error" not in head[0], head
    return done.stdout


# --- what the page says -----------------------------------------------------------------------


def test_one_file_says_it_all(run: Path, images: Path) -> None:
    written = report([run], images=str(images))
    assert written == Written(out=str(run / "report.html"), runs=1, members=6, left_out=[])
    page = page_of(written)
    outside = re.findall(r'(?:src|href)="(?!data:)|url\((?!#|`|")|@import|https?://', page)
    assert outside == ["http://"]  # the name of SVG's namespace
    assert "default-src 'none'" in page
    (board,) = data_of(page)["boards"]
    assert board["differing"] == ["lr", "seed"]
    assert len(board["members"]) == 6
    scores = [one["score"] for one in board["members"]]
    assert scores == sorted(scores, reverse=True)
    assert all(len(one["curves"]["score"]) == EPOCHS for one in board["members"])
    for fact in ("test_vit", "features.zarr", "12 train, 6 validation", "6 (last)", "float32"):
        assert fact in page
    assert "no test row was read" in page
    assert "<i>rank</i> 4" in page  # equal for all: once above
    assert not (run / "report.html.partial").exists()


def test_best_first_as_evaluate_chooses(run: Path) -> None:
    (board,) = data_of(page_of(report([run])))["boards"]
    assert board["members"][0]["id"] == Run(run).best_member()


def test_test_numbers_are_shown_and_rank_nothing(run: Path) -> None:
    before = data_of(page_of(report([run])))
    worst = before["boards"][0]["members"][-1]["id"]
    line = {"member": worst, "split": ["test"], "live": False, "top1": 0.987, "loss": 0.1, "n": 6}
    (run / "evaluations.jsonl").write_text(json.dumps(line) + "\n")
    page = page_of(report([run]))
    assert data_of(page) == before
    assert "top-1 98.7\N{NO-BREAK SPACE}%, loss 0.100" in page


def test_no_test_row_is_read(run: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[int] = set()
    splits: set[str] = set()
    read_into, split_rows = Reader.read_into, Reader.split_rows

    def spy_rows(self: Reader, rows: Any, *arguments: Any, **named: Any) -> None:
        read.update(map(int, rows))
        read_into(self, rows, *arguments, **named)

    def spy_splits(self: Reader, *names: str) -> np.ndarray:
        splits.update(names)
        return split_rows(self, *names)

    monkeypatch.setattr(Reader, "read_into", spy_rows)
    monkeypatch.setattr(Reader, "split_rows", spy_splits)
    report([run], images=str(images))
    monkeypatch.undo()
    with Reader(Run(run).config().cache) as reader:
        assert read == set(reader.split_rows("val").tolist())
    assert splits == {"train", "val"}


def test_a_run_validated_on_test_is_not_looked_into(zarr_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(train_config(zarr_cache, out, member(), val_split=("test",)))
    (told,) = report([out]).left_out
    assert "validated on the test split" in told


def test_several_seeds_and_values(run: Path) -> None:
    page = page_of(report([run]))
    (board,) = data_of(page)["boards"]
    lr, seed = board["effects"]
    assert lr["name"] == "lr" and lr["values"] == [1e-4, 1e-3, 1e-2]  # decades: logarithmic
    assert seed["values"] is None and seed["labels"] == ["0", "1"]
    assert [point[0] for point in sorted(lr["points"])] == [0, 0, 1, 1, 2, 2]
    by_value = [[p[1] for p in lr["points"] if p[0] == i] for i in range(3)]
    assert lr["means"] == [pytest.approx(sum(group) / 2) for group in by_value]
    assert "Over seeds" in page and page.count("±") >= 3


def test_values_drawn_at_random_have_no_means(run: Path) -> None:
    """As a search leaves them: each learning rate once, on an axis by size."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    for number in range(6, 9):  # more members than it had
        config["members"].append(dict(config["members"][0]))
        shutil.copytree(run / "members" / "m0", run / "members" / f"m{number}")
    for number, one in enumerate(config["members"]):
        one.update(lr=0.1 + 0.0123 * number, seed=0)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    edit_summary(run, lambda rows: rows.extend({**rows[0], "id": f"m{n}"} for n in range(6, 9)))
    written = report([run])
    (board,) = data_of(page_of(written))["boards"]
    (effect,) = board["effects"]
    assert effect["means"] == [] and len(effect["values"]) == 9 and not effect["log"]
    dom = browse(written.out)
    assert dom.count('class="mean-dot"') == 0 and "Over seeds" not in dom


def test_stopped_members_say_so_and_count_in_no_mean(run: Path) -> None:
    def stop(rows: list[dict[str, Any]]) -> None:
        rows[0]["stopped"] = "pruned after epoch 1"
        rows[2] |= {"stopped": "loss not finite at step 3", "val_top1": "", "val_loss": "nan"}

    edit_summary(run, stop)
    page = page_of(report([run]))
    (board,) = data_of(page)["boards"]
    assert "pruned after epoch 1" in page and "loss not finite at step 3" in page
    assert board["members"][-1]["id"] == "m2"
    assert len(board["effects"][0]["points"]) == 4


def test_runs_on_the_same_images_share_a_board(
    run: Path, zarr_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Member(method="linear", epochs=EPOCHS, warmup_epochs=0)
    train(train_config(zarr_cache, tmp_path / "second", other, batch_size=6))
    painted = paint(tmp_path / "images", train=3)
    extract(extract_config(painted, tmp_path / "other.zarr"))
    train(train_config(tmp_path / "other.zarr", tmp_path / "third", member()))
    monkeypatch.chdir(tmp_path)
    written = report([run, tmp_path / "second", tmp_path / "third"])
    assert written.out == "report.html" and written.members == 8
    page = page_of(written)
    first, second = data_of(page)["boards"]
    assert {one["run"] for one in first["members"]} == {run.name, "second"}
    assert [one["run"] for one in second["members"]] == ["third"]
    assert {"method", "batch_size"} <= set(first["differing"])
    assert {effect["name"] for effect in first["effects"]} == {
        "method",
        "lr of last",
        "seed of last",
    }


def test_cost_is_shown_where_it_is_known(run: Path) -> None:
    (run / "cost.json").unlink()
    assert ">Cost<" not in page_of(report([run]))
    cost = {"seconds": 125.0, "bytes_read": 2_000_000_000, "extraction_seconds": None}
    (run / "cost.json").write_text(json.dumps(cost))
    page = page_of(report([run]))
    assert "2 min 05 s" in page and "6 × 2.00 GB = 12.00 GB read" in page
    assert "extraction" not in page
    edit_summary(run, lambda rows: rows[0].update(stopped="pruned after epoch 1"))
    assert "12.00 GB" not in page_of(report([run]))  # alone, it would have read less


def test_nothing_validated(zarr_cache: Path, tmp_path: Path) -> None:
    train(train_config(zarr_cache, tmp_path / "run", member(), val_split=()))
    page = page_of(report([tmp_path / "run"]))
    assert "Nothing was validated" in page
    browse(tmp_path / "run" / "report.html")


# --- what can be missing ----------------------------------------------------------------------


def test_a_cache_that_is_gone_is_left_out(run: Path, tmp_path: Path) -> None:
    text = (run / "config.yaml").read_text()
    cache = Run(run).config().cache
    (run / "config.yaml").write_text(text.replace(cache, str(tmp_path / "moved.zarr")))
    written = report([run])
    assert len(written.left_out) == 1 and "moved.zarr" in written.left_out[0]
    assert len(data_of(page_of(written))["boards"][0]["members"]) == 6


def test_another_cache_in_its_place_is_not_read(images: Path, run: Path, tmp_path: Path) -> None:
    extract(extract_config(images, tmp_path / "other.zarr", img_size=(64, 64)))
    text = (run / "config.yaml").read_text()
    cache = Run(run).config().cache
    (run / "config.yaml").write_text(text.replace(cache, str(tmp_path / "other.zarr")))
    (told,) = report([run]).left_out
    assert "others now than those trained on" in told


def test_images_that_changed_or_are_gone_are_left_out(tmp_path: Path) -> None:
    images = paint(tmp_path / "images")
    extract(extract_config(images, tmp_path / "c.zarr"))
    untrained = dataclasses.replace(member(), lr=1e-9)
    train(train_config(tmp_path / "c.zarr", tmp_path / "run", untrained))
    page = page_of(report([tmp_path / "run"], images=str(images)))
    shown = re.findall(r'class="key" title="([^"]+)"', page)
    assert len(shown) >= 2 and page.count("data:image/jpeg") == len(shown)
    (images / shown[0]).unlink()
    shutil.copy(images / "train" / "red" / "0.png", images / shown[1])
    written = report([tmp_path / "run"], images=str(images))
    assert page_of(written).count("data:image/jpeg") == len(shown) - 2
    told = " ".join(written.left_out)
    assert (
        f"1 of {len(shown)} thumbnails: not in folder" in told
        and "changed since the cache was made" in told
    )
    with pytest.raises(SourceError, match="nothing there"):
        report([tmp_path / "run"], images=str(tmp_path / "nowhere"))


def test_what_is_no_finished_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no member 'm9'"):
        report([run], member="m9")
    (run / "summary.csv").unlink()
    with pytest.raises(RunError, match="not finished"):
        report([run])
    with pytest.raises(RunError, match="expected a run directory"):
        report([tmp_path / "nothing"])


def test_it_needs_neither_timm_nor_torchvision(run: Path) -> None:
    code = (
        "import sys; sys.modules.update(timm=None, torchvision=None, matplotlib=None)\n"
        f"from sidecache import report; report([{str(run)!r}], device='cpu')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (run / "report.html").exists()


# --- the command that trains one member alone -------------------------------------------------


@pytest.fixture
def through_click(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], TrainConfig]:
    """The TrainConfig that a command line comes to."""
    asked: list[TrainConfig] = []

    def note(config: TrainConfig, *_: Any, **__: Any) -> None:
        asked.append(config)
        raise RunError("not trained: only its configuration is wanted")

    monkeypatch.setattr(stage, "train", note)

    def come_to(command: list[str]) -> TrainConfig:
        result = CliRunner().invoke(cli.main, command)
        assert asked, result.output
        return asked.pop()

    return come_to


ODD = [
    Member(method="last", settings={"rank": 3, "gap": 2}, lr=1.7e-5, seed=7, smoothing=0.1),
    Member(method="lst", settings={"keep_layers": "1,2,4", "init": "pruned"}, drop_path=0.25),
    Member(method="miet", settings={"gather": "normsum", "k": 4}, sched="constant"),
    Member(method="attentive", settings={"mlp_ratio": 0.5}, weight_decay=3e-9),
    Member(method="linear", settings={"pool": "clsmean", "last_n": 2}, epochs=7, warmup_epochs=0),
]


@pytest.mark.parametrize("changes", [{}, {"val_split": (), "amp": True}])
@pytest.mark.parametrize("wanted", ODD, ids=lambda one: one.method)
def test_the_command_trains_the_same_member(
    wanted: Member, changes: Any, through_click: Callable[[list[str]], TrainConfig]
) -> None:
    resolved = dataclasses.replace(wanted, settings=vars(method_settings(wanted)))
    config = TrainConfig(
        cache="a b/it's.zarr", out="runs/x/", members=(member(), resolved), order_seed=3,
        batch_size=7, taps="0,2,4", train_split=("train", "more"), **changes,
    )  # fmt: skip
    came = through_click(command_of(config, resolved))
    (only,) = came.members
    assert dataclasses.replace(only, settings=vars(method_settings(only))) == resolved
    expected = dataclasses.replace(config, members=came.members, out="runs/x-m1")
    assert came == expected


def test_every_setting_has_a_flag() -> None:
    flags = {parameter.name for parameter in cli.main.commands["train"].params}
    shaping = {f.name for m in METHODS.values() for f in dataclasses.fields(m.settings_class)}
    learning = {f.name for f in dataclasses.fields(Member)} - {"settings"}
    assert shaping | learning <= flags


# --- mistakes ---------------------------------------------------------------------------------


def test_confusion_counts_and_orders() -> None:
    labels = np.array([0, 0, 1, 2])
    logits = np.array([[5.0, 0, 0], [0, 3, 0], [0, 4, 0], [9, 0, 0]])
    task = ClassTask(name="x", classes=("a", "b", "c"))
    found = task.examine(labels, logits)
    assert found["matrix"] == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert found["correct"] == 2
    assert [one["position"] for one in found["mistakes"]] == [3, 1]  # the surest first
    pairs = [(pair["truth"], pair["predicted"], pair["count"]) for pair in found["pairs"]]
    assert pairs == [("a", "b", 1), ("c", "a", 1)]


def test_many_classes_show_pairs() -> None:
    names = [f"class {i}" for i in range(40)]
    logits = np.eye(40)[[1, 1, 2]]
    task = ClassTask(name="x", classes=tuple(names))
    found = task.examine(np.array([0, 0, 5]), logits)
    assert found["matrix"] is None
    assert found["pairs"][0] == {"truth": "class 0", "predicted": "class 1", "count": 2, "of": 2}


def test_average_precision_by_definition() -> None:
    random = np.random.default_rng(0)
    labels = (random.random((50, 3)) < [0.5, 0.1, 0.0]).astype(np.int8)
    scores = random.normal(size=(50, 3)).round(1)  # with ties
    task = MultilabelTask(name="x", classes=("a", "b", "none"))
    found = task.examine(labels, scores)
    table = {line["name"]: line["ap"] for line in found["table"]}
    for c, name in enumerate("ab"):
        own = scores[:, c]
        positives = np.flatnonzero(labels[:, c])
        expected = np.mean([labels[own >= own[i], c].mean() for i in positives])
        assert table[name] == pytest.approx(expected)
    assert table["none"] is None and found["table"][-1]["name"] == "none"
    sure = [one["confidence"] for one in found["mistakes"]]
    assert sure == sorted(sure, reverse=True) and min(sure) >= 0.5
    for one in found["mistakes"]:
        assert not labels[one["position"], ["a", "b", "none"].index(one["predicted"])]


def test_deviations_show_the_largest() -> None:
    labels, predicted = np.array([1.0, 2.0, 3.0]), np.array([[1.5], [2.0], [1.0]])
    found = RegressionTask(name="x").examine(labels, predicted)
    assert [one["position"] for one in found["mistakes"]] == [2, 0, 1]
    assert found["mistakes"][0]["error"] == -2.0 and found["mae"] == pytest.approx(2.5 / 3)


# --- in a browser -----------------------------------------------------------------------------


def test_a_browser_draws_it(run: Path, images: Path) -> None:
    dom = browse(report([run], images=str(images)).out)
    assert dom.count('class="line') == 6
    assert len(re.findall(r'<tr data-place="r0-m\d"', dom)) == 6
    assert dom.count('class="mean-dot"') == 5  # three rates, two seeds
    assert dom.count('<tr data-place="') == 6 and dom.count("line near selected") == 1


def test_sorting_choosing_and_switching(run: Path) -> None:
    written = report([run])
    (board,) = data_of(page_of(written))["boards"]
    other = board["members"][3]
    dom = browse(
        written.out,
        "const head = [...document.querySelectorAll('.leaderboard th')]"
        ".find((th) => th.textContent === 'lr');"
        "head.querySelector('button').click(); head.querySelector('button').click();",
        f"document.querySelector('tr[data-place={other['place']}]').click();",
        "document.querySelector('[data-metric=train_loss]').click();",
        "const plot = document.querySelector('.curves svg'), box = plot.getBoundingClientRect();"
        "const place = {clientX: box.left + box.width / 2, clientY: box.top + box.height / 2};"
        "plot.dispatchEvent(new PointerEvent('pointermove', place));",
    )
    rates = re.findall(r'<tr data-place="[^"]*"[^>]*>.*?<td data-value="([\d.]+)"', dom, re.S)
    assert [float(rate) for rate in rates] == [1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4]
    assert 'aria-sort="descending"' in dom
    assert re.search(r'class="tip shown"[^>]*><b>m\d</b> [\d.]+ after epoch 2<div>lr', dom)
    assert f'<span class="chosen">{other["id"]}</span>' in dom
    shown = re.search(r'<pre class="command">(.*?)</pre>', dom, re.S)
    assert shown is not None
    assert html.unescape(re.sub("<[^>]+>", "", shown[1])) == " ".join(other["command"])
    assert 'aria-label="train loss over epochs of 6 members"' in dom


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    images = paint(tmp_path / "images")
    evil = '<img src=x onerror="document.title=1"><script>x<'
    for split in ("train", "val", "test"):
        (images / split / "red").rename(images / split / evil)
    extract(extract_config(images, tmp_path / "c.zarr"))
    out = tmp_path / 'it\'s "quoted" & <u>'
    train(train_config(tmp_path / "c.zarr", out, dataclasses.replace(member(), lr=1e-9)))
    written = report([out], images=str(images))
    page = page_of(written)
    assert page.count("<script") == 2 and "<img src=x" not in page and "<u>" not in page
    dom = browse(written.out)
    assert html.escape(evil, quote=False) in dom
    assert 'it\'s "quoted" &amp; &lt;u&gt;</h1>' in dom


def test_tasks_of_other_kinds_each_have_a_board(images: Path, tmp_path: Path) -> None:
    """One pass, three tasks: a class, names that apply together, a number."""
    random = np.random.default_rng(0)
    lines = ["path,split,label:colour,labels:parts,value:age"]
    for path in sorted(images.rglob("*.png")):
        split, colour, _ = path.relative_to(images).parts
        parts = ";".join(name for name in ("left", "right") if random.random() < 0.5)
        lines.append(f"{path},{split},{colour},{parts},{random.normal(40, 9):.1f}")
    table = tmp_path / "images.csv"
    table.write_text("\n".join(lines) + "\n")
    extract(extract_config(table, tmp_path / "c.zarr"))
    tasks = ("colour", "parts", "age")
    members = [dataclasses.replace(member(), task=task) for task in tasks]
    run = tmp_path / "run"
    train(train_config(tmp_path / "c.zarr", run, *members))
    written = report([run], images=str(table))
    assert written.left_out == []
    boards = data_of(page_of(written))["boards"]
    assert [board["score_name"] for board in boards] == ["top-1", "mAP", "R²"]
    assert all(len(board["members"]) == 1 for board in boards)
    rows = {row["id"]: row for row in Run(run).summary()}
    dom = browse(written.out)
    assert "weakest class first" in dom and "Largest errors" in dom
    assert dom.count('class="dot"') == 6  # of the scatter plot: validation rows
    error = re.search(r"Mean absolute error (\d+\.\d+)", dom)
    with (run / "metrics.jsonl").open() as file:
        last = [json.loads(line) for line in file][-1]
    assert error is not None and float(error[1]) == pytest.approx(last["val_mae"], rel=1e-3)
    precision = [float(text) for text in re.findall(r'"number">([\d.]+) %</td>', dom)]
    assert np.mean(precision) == pytest.approx(100 * float(rows["m1"]["val_map"]), abs=0.1)


def test_a_browser_draws_what_diverged_members_leave(tasks_cache: Path, tmp_path: Path) -> None:
    """m0 has no finite loss at all; m1 has one, far from the others', and then none."""
    rates = (1e30, 3e2, 1e-3, 1e-2)
    members = [dataclasses.replace(member(lr), task="warmth") for lr in rates]
    train(train_config(tasks_cache, tmp_path / "run", *members))
    curves = data_of(page_of(written := report([tmp_path / "run"])))["boards"][0]["members"]
    (first,) = [one["curves"]["score"] for one in curves if one["id"] == "m1"]
    assert len(first) == 1 and first[0] < -1e6

    def labels(dom: str) -> dict[str, float]:
        found = re.findall(r'<text class="label[^"]*" x="[^"]*" y="([^"]*)">(m\d)</text>', dom)
        return {name: float(y) for y, name in found}

    named = labels(browse(written.out))
    assert named.keys() == {"m2", "m3"} and all(0 < y < 400 for y in named.values())
    order = browse(
        written.out,
        "document.querySelector('[data-metric=val_loss]').click();"
        "[...document.querySelectorAll('.leaderboard th')].find((th) => th.textContent === "
        "'val loss').querySelector('button').click();",
    )
    assert re.findall(r'<tr data-place="r0-(m\d)"', order)[:2] == ["m3", "m2"]
    assert order.count('class="end') == 1 and labels(order).keys() == {"m1", "m2", "m3"}
    plot = order.partition('<figure class="curves">')[2].partition("</figure>")[0]
    ticks = re.findall(r'text-anchor="end">([\de.-]+)</text>', plot)
    assert len(ticks) >= 5 and any(re.fullmatch(r"1e\d+", tick) for tick in ticks)


def test_each_scatter_plot_shows_its_own_task(images: Path, tmp_path: Path) -> None:
    """Two runs of two numbers: boards stand by task, and a look at each run stands in each."""
    lines = ["path,split,value:age,value:mass"]
    for number, path in enumerate(sorted(images.rglob("*.png"))):
        split = path.relative_to(images).parts[0]
        lines.append(f"{path},{split},{number % 7},{1000 + 10 * number}")
    table = tmp_path / "images.csv"
    table.write_text("\n".join(lines) + "\n")
    extract(extract_config(table, tmp_path / "c.zarr"))
    runs = [tmp_path / "first", tmp_path / "second"]
    for seed, run in enumerate(runs):
        members = [dataclasses.replace(member(seed=seed), task=task) for task in ("age", "mass")]
        train(train_config(tmp_path / "c.zarr", run, *members))
    written = report(runs, out=tmp_path / "page.html")
    scatters = data_of(page_of(written))["scatters"]
    truths = {place: [truth for truth, _ in points] for place, points in scatters.items()}
    assert {place: max(values) < 7 for place, values in truths.items()} == {
        "r0-m0": True, "r1-m0": True, "r0-m1": False, "r1-m1": False,
    }  # fmt: skip
    dom = browse(written.out)
    figures = re.findall(r'<figure class="scatter" data-place="([^"]*)">(.*?)</figure>', dom, re.S)
    assert [place for place, _ in figures] == ["r0-m0", "r1-m0", "r0-m1", "r1-m1"]
    for place, figure in figures:
        ticks = [float(text) for text in re.findall(r">(-?[\d.]+)</text>", figure)]
        assert (max(ticks) > 1000) == place.endswith("m1"), place


def test_a_summary_in_another_order_is_read_by_id(run: Path) -> None:
    """As a spreadsheet may leave it."""
    before = page_of(report([run]))
    edit_summary(run, lambda rows: rows.sort(key=lambda row: float(row["val_loss"])))
    shuffled = [row["id"] for row in Run(run).summary()]
    assert shuffled != sorted(shuffled)
    assert data_of(page_of(report([run]))) == data_of(before)
    again = train(dataclasses.replace(Run(run).config(), out=str(run)))  # finished: it is read
    assert {one.id: (one.settings["lr"], one.settings["seed"]) for one in again.members} == {
        f"m{i}": (one.lr, one.seed) for i, one in enumerate(GRID)
    }
