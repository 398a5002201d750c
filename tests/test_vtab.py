"""examples/vtab.py on small stand-ins for three of the 19 tasks: numbers, resuming, refusals."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import cli

SCRIPT = Path(__file__).parent.parent / "examples" / "vtab.py"
SMALL = ["--model", "test_vit", "--extract=--no-pretrained --img-size 32", "-j", "0"]
GRID = ["--", "--lr", "1e-2,3e-2", "--epochs", "2", "--warmup-epochs", "0"]
TASKS = ("cifar", "dtd", "kitti")  # none is specialized


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("vtab", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


vtab = load_script()


class Sidecache:
    """The commands in this process, which saves loading torch for each; remembers them.

    `before` and `after` see each command's words, and may kill the script by an exception.
    """

    def __init__(
        self,
        before: Callable[[list[str]], None] = lambda words: None,
        after: Callable[[list[str]], None] = lambda words: None,
    ) -> None:
        self.before, self.after, self.commands = before, after, []

    def __call__(self, words: list[str]) -> dict[str, Any]:
        self.before(words)
        self.commands.append(words)
        result = CliRunner().invoke(cli.main, words)
        assert result.exit_code == 0, result.output
        self.after(words)
        return json.loads(result.stdout)

    @property
    def names(self) -> list[str]:
        return [words[0] for words in self.commands]


def paint_task(folder: Path, seed: int) -> None:
    """Noise with a weak tint that tells three classes apart, in NOAH's layout."""
    random = np.random.default_rng(seed)
    lines: dict[str, list[str]] = {}
    for name, count in (("train800", 12), ("val200", 6), ("test", 9 + seed)):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 200, (32, 32, 3), dtype=np.uint8)
            pixels[..., number % 3] += 15
            path = f"images/{name}/{number:06d}.png"
            Image.fromarray(pixels).save(folder / path)
            lines.setdefault(name, []).append(f"{path} {number % 3}")
    lines["train800val200"] = lines["train800"] + lines["val200"]
    for name, listed in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(listed) + "\n")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vtab-1k")
    for seed, task in enumerate(TASKS):
        paint_task(root / task, seed)
    (root / "cifar10").mkdir()
    return root


def arguments(folder: Path, out: Path, *flags: str, seeds: str = "3,4") -> list[str]:
    ours = [str(folder), *SMALL, "--out", str(out), "--method", "linear", "--seeds", seeds]
    return [*ours, "--device", "cpu", *flags, *GRID]


def test_table_averages_and_a_second_call(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, sidecache = tmp_path / "out", Sidecache()
    vtab.main(arguments(folder, out), sidecache)
    printed = capsys.readouterr()
    assert sidecache.names == ["extract", "train", "evaluate"] * 3
    assert "cifar10 not used" in printed.err
    assert f"{out / 'caches'}: " in printed.err and "--delete-caches removes them" in printed.err
    lines = [json.loads(line) for line in (out / "linear/results.jsonl").read_text().splitlines()]
    tests = {}
    for number, (task, line) in enumerate(zip(TASKS, lines, strict=False)):
        refit = out / "linear" / task / "run" / "refit"
        records = [json.loads(r) for r in (refit / "evaluations.jsonl").read_text().splitlines()]
        tests[task] = [record["top1"] for record in records]
        assert [r["member"] for r in records] == ["m0", "m1"]
        assert line["task"] == task and line["each"] == tests[task]
        assert line["n"] == records[0]["n"] == 9 + number
        assert line["members_tried"] == 2 and set(line["chosen"]) == {"lr"}
        told = f"{100 * mean(tests[task]):.2f} ± {100 * stdev(tests[task]):.2f}"
        (row,) = [text for text in printed.out.splitlines() if text.split()[0] == task]
        assert told in row and f"lr {line['chosen']['lr']}" in row
    assert len({str(each) for each in tests.values()}) > 1, "tasks too alike to tell rows apart"
    of_tasks, of_groups = lines[3:]
    assert of_tasks["average"] == "mean over 3 of the 19 tasks"
    assert of_tasks["top1"] == pytest.approx(mean(mean(each) for each in tests.values()))
    natural, structured = (mean(tests["cifar"]) + mean(tests["dtd"])) / 2, mean(tests["kitti"])
    assert of_groups["average"] == "mean of 2 of the three group means (no specialized)"
    assert of_groups["top1"] == pytest.approx((natural + structured) / 2)
    assert of_groups["groups"]["natural"]["top1"] == pytest.approx(natural)
    assert of_groups["missing"] == of_tasks["missing"] and len(of_tasks["missing"]) == 16
    assert "svhn" in of_tasks["missing"] and "= specialized (0 of 4 tasks)" in printed.out
    assert f"{of_groups['average']}: {100 * of_groups['top1']:.2f} ± " in printed.out
    assert "16 of 19 tasks missing (caltech101, oxford_flowers102" in printed.out

    again = subprocess.run(  # in a process of its own: needs no sidecache, let alone torch
        [sys.executable, SCRIPT, *arguments(folder, out, "--sidecache", "/none")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert again.stdout == printed.out and "$ sidecache" not in again.stderr


def test_the_refit_learns_from_all_and_the_grid_does_not(folder: Path, tmp_path: Path) -> None:
    sidecache = Sidecache()
    vtab.main(arguments(folder, tmp_path, "--tasks", "dtd"), sidecache)
    extract, train, _ = sidecache.commands
    assert extract[extract.index("--crop-mode") + 1] == "squash"
    assert train[train.index("--refit") + 1] == "3,4"
    rows = {
        name: json.loads((tmp_path / "linear/dtd" / name / "cost.json").read_text())["rows"]
        for name in ("run", "run/refit")
    }
    assert rows == {"run": 12, "run/refit": 18}


class Killed(BaseException):
    pass


def test_killed_anywhere_it_goes_on_and_tests_once(folder: Path, tmp_path: Path) -> None:
    """Before a test is read; after it; and with one of two members in evaluations.jsonl."""

    def kill(words: list[str]) -> None:
        if words[0] == "evaluate":
            raise Killed

    call = arguments(folder, tmp_path, "--tasks", "cifar,kitti")
    with pytest.raises(Killed):
        vtab.main(call, Sidecache(before=kill))
    with pytest.raises(Killed):
        vtab.main(call, Sidecache(after=kill))
    file = tmp_path / "linear/cifar/run/refit/evaluations.jsonl"
    before = file.read_text()
    assert len(before.splitlines()) == 2

    def keep_one(words: list[str]) -> None:
        if words[0] == "train" and "kitti" in words[1]:
            refit = tmp_path / "linear/kitti/run/refit"
            other = {"member": "m1", "split": ["test"], "source": "other.zarr", "top1": 9.0}
            mine = {"member": "m1", "split": ["test"], "source": "kitti.zarr", "top1": 0.5, "n": 11}
            again = {**mine, "top1": 0.75}  # a second look by hand does not count
            lines = [json.dumps(record) + "\n" for record in (other, mine, again)]
            (refit / "evaluations.jsonl").write_text("".join(lines))

    last = Sidecache(after=keep_one)
    vtab.main(call, last)
    assert last.names == ["extract", "train", "extract", "train", "evaluate"]
    assert file.read_text() == before
    evaluate = last.commands[-1]
    assert evaluate[evaluate.index("--member") + 1] == "m0"
    kitti = json.loads((tmp_path / "linear/kitti/result.json").read_text())
    assert kitti["each"][1] == 0.5


def test_caches_are_deleted_if_asked_and_other_settings_refused(
    folder: Path, tmp_path: Path
) -> None:
    call = arguments(folder, tmp_path, "--tasks", "cifar")
    vtab.main(call, Sidecache())
    assert (tmp_path / "caches/cifar.zarr").exists()
    vtab.main(arguments(folder, tmp_path, "--tasks", "cifar", "--delete-caches"), Sidecache())
    assert not list((tmp_path / "caches").iterdir())
    nothing = Sidecache()
    vtab.main(call, nothing)
    assert nothing.names == []
    with pytest.raises(
        SystemExit, match=r"(?s)cifar was done with other settings.*seeds: \[3, 4\]"
    ):
        vtab.main(arguments(folder, tmp_path, "--tasks", "cifar", seeds="3"), nothing)


def test_input_is_refused_before_anything_runs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(folder: Path, *flags: str) -> str:
        with pytest.raises(SystemExit) as caught:
            vtab.main(arguments(folder, tmp_path / "out", *flags), Sidecache(before=pytest.fail))
        return f"{caught.value}{capsys.readouterr().err}"

    assert "no task cifar100; there are cifar, " in refused(folder, "--tasks", "cifar100")
    assert "no folder svhn" in refused(folder, "--tasks", "svhn")
    assert "no such folder" in refused(folder / "none")
    assert "none of the folders cifar" in refused(folder / "cifar")
    assert "--overwrite after `--`" in refused(folder, "--", "--overwrite")
    (tmp_path / "svhn").mkdir()
    (tmp_path / "svhn" / "train800.txt").write_text("a.png 0\n")
    assert "svhn/val200.txt, " in refused(tmp_path)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="ended with exit code 1"):
        vtab.main(arguments(folder, tmp_path / "out", "--sidecache", "false"))


def test_both_averages_of_all_tasks() -> None:
    """Groups of 7, 4 and 8: the averages differ, and over seeds they have a deviation."""
    value = {"natural": 0.8, "specialized": 0.5, "structured": 0.2}
    records = [
        {"task": task, "group": group, "each": [value[group], value[group] + 0.1]}
        for task, group in vtab.GROUP_OF.items()
    ]
    of_tasks, of_groups = vtab.averages(records)
    assert [len(tasks) for tasks in vtab.GROUPS.values()] == [7, 4, 8]
    assert of_tasks["average"] == "mean over the 19 tasks" and not of_tasks["missing"]
    assert of_tasks["top1"] == pytest.approx((7 * 0.8 + 4 * 0.5 + 8 * 0.2) / 19 + 0.05)
    assert of_groups["average"] == "mean of the three group means"
    assert of_groups["top1"] == pytest.approx(0.55)
    assert of_groups["deviation"] == pytest.approx(stdev([0.5, 0.6]))
    of_tasks, of_groups = vtab.averages(records[1:])
    assert of_tasks["average"] == "mean over 18 of the 19 tasks"
    assert "natural 6 of 7" in of_groups["average"] and of_groups["missing"] == ["cifar"]
