"""The command line as its users and their scripts meet it."""

from __future__ import annotations

import ast
import csv
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import paint
from test_house import sources

from cli import main
from pipeline import __version__
from pipeline.demo.tour import WEIGHTS
from pipeline.errors import SourceError
from pipeline.sources.timm_sets import TimmOptions
from pipeline.terminal.reference import reference

ROOT = Path(__file__).parent.parent
SMALL = ["--model", "test_vit", "--no-pretrained", "--img-size", "32", "-j", "0", "--device", "cpu"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def run_json(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"sidecache {command}" in result.output or command == "demo"


def test_the_reference_says_what_the_code_says() -> None:
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == reference(main), "run `make docs/cli.md`"


def test_the_whole_way(images: Path, tmp_path: Path) -> None:
    """extract, inspect, verify, train, evaluate by their JSON; the keys that scripts rely on."""
    cache, out = tmp_path / "c.zarr", tmp_path / "run"
    first = run_json("extract", images, *SMALL, "--out", cache)
    assert first["rows"] == 24 and first["complete"] and first["images_per_second"] > 0
    assert {"bytes", "fingerprint", "content", "seconds"} <= first.keys()
    second = run("extract", images, *SMALL, "--out", cache)
    assert "already complete, nothing to do (24 rows)" in second.stdout
    found = run_json("inspect", cache)
    assert {k: found[k] for k in ("rows", "bytes", "complete", "fingerprint", "content")} == {
        k: first[k] for k in ("rows", "bytes", "complete", "fingerprint", "content")
    }
    text = run("inspect", cache).stdout
    assert "backbone.name" in text and "blue 8, green 8, red 8" in text
    assert run_json("verify", cache)["ok"]
    trained = run_json(
        "train", cache, "--method", "last", "--rank", 4, "--epochs", 20, "--warmup-epochs", 1,
        "--lr", "1e-2", "--out", out, "--device", "cpu",
    )  # fmt: skip
    assert trained["run"] == str(out) and trained["images_per_second"] > 0
    (member,) = trained["members"]
    assert member["id"] == "m0" and member["method"] == "last" and member["val_top1"] == 1.0
    assert member["settings"]["lr"] == 0.01
    scores = run_json("evaluate", out, "--device", "cpu")
    assert {"top1", "top5", "loss", "n"} <= scores.keys() and scores["n"] == 6
    again = run("train", cache, "--method", "last", "--rank", 4, "--epochs", 20,
                "--warmup-epochs", 1, "--lr", "1e-2", "--out", out, "--device", "cpu")  # fmt: skip
    assert "already finished, nothing to do" in again.stdout


def test_a_timm_data_set_is_extracted_evaluated_and_shown(images: Path, tmp_path: Path) -> None:
    cache, out = tmp_path / "c.zarr", tmp_path / "run"
    named = ["torch/image_folder", "--data-dir", images]
    backbone = ["--model", "test_vit", "--weights", WEIGHTS, "--img-size", 32]
    splits = ["--split", "train,val,test"]
    found = run_json("extract", *named, *splits, *backbone, "-j", 0, "--device", "cpu",
                     "--out", cache)  # fmt: skip
    assert found["rows"] == 24
    result = run("train", cache, "--method", "linear", "--epochs", 1, "--warmup-epochs", 0,
                 "--lr", "1e-9", "--device", "cpu", "--out", out)  # fmt: skip
    assert result.exit_code == 0, result.output
    live = run_json("evaluate", out, *named, "--weights", WEIGHTS, "-j", 0, "--device", "cpu")
    assert live["n"] == 6 and live["live"]
    flags = ["--images", *named, "--device", "cpu", "--out", tmp_path / "page.html"]
    assert run_json("report", out, *flags)["left_out"] == []
    assert "data:image" in (tmp_path / "page.html").read_text()


def test_what_is_said_of_a_timm_data_set_reaches_timm(
    zarr_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, tuple[str, ...], TimmOptions]] = []

    def refuse(name: str, *, splits: tuple[str, ...], options: TimmOptions, **_: Any) -> None:
        asked.append((name, splits, options))
        raise SourceError("enough")

    monkeypatch.setattr("pipeline.sources.timm_sets.open_timm", refuse)
    out = tmp_path / "run"
    run("train", zarr_cache, "--method", "linear", "--epochs", 1, "--warmup-epochs", 0,
        "--lr", "1e-9", "--device", "cpu", "--out", out)  # fmt: skip
    flags = ["--data-dir", "d", "--input-key", "img", "--target-key", "fine"]
    calls = [
        [
            "extract",
            "hfds/cifar10",
            *flags,
            "--dataset-download",
            *SMALL,
            "--out",
            tmp_path / "c.h5",
        ],
        ["evaluate", out, "hfds/cifar10", "--split", "test", *flags, "--device", "cpu"],
        ["report", out, "--images", "hfds/cifar10", *flags, "--device", "cpu"],
    ]
    for call in calls:
        assert "enough" in run(*call).stderr
    options = [TimmOptions("d", "img", "fine", download) for download in (True, False, False)]
    splits = [("train",), ("test",), ("val",)]
    assert asked == [("hfds/cifar10", s, o) for s, o in zip(splits, options, strict=True)]
    for call in (["evaluate", out, *flags], ["report", out, *flags]):
        result = run(*call)
        assert result.exit_code == 1
        assert "--data-dir, --input-key and --target-key say how images are opened" in result.stderr


FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def flags_named(text: str) -> set[str]:
    """The flags in the string literals of a module: in its messages, help texts and docstrings."""
    literals = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    return {flag for text in literals if isinstance(text, str) for flag in FLAG.findall(text)}


def test_every_flag_that_a_message_recommends_exists() -> None:
    known = {"--help", "--version"}
    for command in main.commands.values():
        known |= {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}
    unknown = {module: flags_named(text) - known for module, text in sources().items()}
    assert {module: flags for module, flags in unknown.items() if flags} == {}
    planted = 'raise ValueError(f"{path}: see --data-dir, --no-such or --on-error skip")'
    assert flags_named(planted) - known == {"--no-such"}


def test_the_edges_way(images: Path, tmp_path: Path) -> None:
    """Server: extract with LST's start, copy the int8 sum. Device: train MIET on it; and LST."""
    full, small = tmp_path / "full.zarr", tmp_path / "sums.h5"
    run_json("extract", images, *SMALL, "--out", full, "--ladder-init", "magnitude",
             "--reduction", 4)  # fmt: skip
    copied = run_json("copy", full, small, "--gather", "sum", "--dtype", "int8")
    assert {"rows", "bytes", "fingerprint", "content", "seconds"} <= copied.keys()
    assert copied["bytes"] * 10 < copied["source_bytes"]
    assert "already complete" in run("copy", full, small, "--gather", "sum",
                                     "--dtype", "int8").stdout  # fmt: skip
    text = run("inspect", small).stdout
    assert "z0..z6" in text and "rounding error" in text and "of int8" in text
    quick = ["--epochs", 2, "--warmup-epochs", 0, "--device", "cpu"]
    for cache, flags in (
        (small, ["--method", "mist", "--modules", "2,3"]),
        (full, ["--method", "lst", "--reduction", 4, "--init", "random,pruned"]),
        (full, ["--method", "miet", "--gather", "normsum", "--groups", 2]),
        (full, ["--method", "attentive,linear", "--taps", "last:2"]),
    ):
        out = tmp_path / f"run{len(flags)}{cache.stem}{flags[1]}"
        trained = run_json("train", cache, *flags, *quick, "--out", out)
        assert all(member["val_top1"] is not None for member in trained["members"])
        assert run_json("evaluate", out, "--device", "cpu")["n"] == 6
    refused = run("train", small, "--method", "last", "--out", tmp_path / "no")
    assert refused.exit_code == 1 and "miet alone reads" in refused.stderr


def test_the_searchers_way(zarr_cache: Path, images: Path, tmp_path: Path) -> None:
    """A grid and a sweep, both refitted, evaluated with mean and deviation, and reported."""
    quick = ["--device", "cpu", "--no-amp"]
    grid = ["--method", "linear", "--lr", "1e-3,1e-2", "--seed", "0,1", "--epochs", 3]
    out = tmp_path / "grid"
    text = run("train", zarr_cache, *grid, "--warmup-epochs", 0, "--refit", "3,4,5",
               "--out", out, *quick)  # fmt: skip
    assert text.exit_code == 0, text.output
    assert "over 2 seeds; trained on train + val with 3 seeds" in text.stdout
    scored = run_json("evaluate", out / "refit", "--device", "cpu")
    assert [member["member"] for member in scored["members"]] == ["m0", "m1", "m2"]
    assert len(scored["mean"]["label"]["top1"]) == 2, "mean and deviation"
    assert "mean of 3 members: top-1 " in run("evaluate", out / "refit", "--device", "cpu").stdout

    space = tmp_path / "space.yaml"
    space.write_text("method: linear\nlr: {low: 1e-3, high: 1e-1, log: true}\nepochs: 3\n"
                     "warmup_epochs: 0\n")  # fmt: skip
    swept = tmp_path / "sweep"
    found = run_json("sweep", zarr_cache, "--space", space, "--trials", 5, "--at-once", 2,
                     "--refit", "0,1", "--out", swept, *quick)  # fmt: skip
    assert (found["done"], len(found["trials"]), found["refit"]["seeds"]) == (5, 5, [0, 1])
    assert run_json("evaluate", swept, "--device", "cpu")["member"] == found["best"]
    again = run("sweep", zarr_cache, "--space", space, "--trials", 5, "--out", swept, *quick)
    assert "already finished, nothing to do" in again.stdout

    page = tmp_path / "page.html"
    written = run_json("report", out, swept, "--out", page, "--images", images, "--device", "cpu")
    assert (written["runs"], written["members"], written["left_out"]) == (2, 9, [])
    assert page.read_text().startswith("<!doctype html>")


def test_progress_goes_to_stderr_and_results_to_stdout(images: Path, tmp_path: Path) -> None:
    result = run("extract", images, *SMALL, "--out", tmp_path / "c.h5")
    assert result.stdout.startswith(f"{tmp_path / 'c.h5'}: 24 rows")
    assert "24 images" in result.stderr and "spent waiting for" in result.stderr


@pytest.mark.usefixtures("no_hub")
def test_predict_prints_json_csv_and_text(zarr_cache: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run("train", zarr_cache, "--method", "linear", "--epochs", 3, "--warmup-epochs", 0,
        "--out", out, "--device", "cpu")  # fmt: skip
    photos = [images / "test" / "red", "--device", "cpu", "--top-k", 2]
    answer = run_json("predict", out, *photos)
    assert [sorted(photo) for photo in answer] == [["classes", "path", "probabilities"]] * 2
    assert len(answer[0]["classes"]) == 2
    assert "red" in run("predict", out, *photos).stdout
    run("predict", out, *photos, "--csv", tmp_path / "p.csv")
    with (tmp_path / "p.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4 and lines[0]["rank"] == "1"
    (tmp_path / "bad.jpg").write_bytes(b"")
    result = run("predict", out, tmp_path / "bad.jpg", images / "test" / "red" / "0.png",
                 "--device", "cpu")  # fmt: skip
    assert result.exit_code == 1 and "bad.jpg" in result.stderr and "red" in result.stdout


def test_damage_is_named(images: Path, tmp_path: Path) -> None:
    cache = tmp_path / "c.h5"
    run("extract", images, *SMALL, "--out", cache)
    from cache import Reader

    with Reader(cache) as reader:
        stored = reader.read([20]).tobytes()
    data = bytearray(cache.read_bytes())
    data[data.index(stored) + 100] ^= 1
    cache.write_bytes(data)
    result = run("verify", cache)
    assert result.exit_code == 1
    assert "val/green/0.png" in result.stdout or "row 20" in result.stdout
    assert run("verify", cache, "--json").exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["extract", "{images}", *SMALL, "--out", "{tmp}/c.npz"], 1, ".zarr"),
        (["extract", "{images}", *SMALL], 2, "Missing option '--out'"),
        (["extract", "{tmp}/none", *SMALL, "--out", "{tmp}/c.zarr"], 1, "nothing there"),
        (["extract", "{images}", *SMALL, "--out", "{tmp}/c.zarr", "--taps", "0,9"], 1, "no tap z9"),
        (["extract", "{images}", *SMALL, "--out", "{tmp}/c.zarr", "--split", "dev"], 1, "dev"),
        (["extract", "{images}", *SMALL[:-1], "tpu", "--out", "{tmp}/c.zarr"], 1, "'tpu' is not"),
        (["extract", "{images}", *SMALL, "--img-size", "x", "--out", "{tmp}/c.h5"], 2, "one side"),
        (["inspect", "{tmp}/none.zarr"], 1, "none.zarr"),
        (["copy", "{tmp}/none.zarr", "{tmp}/c.zarr"], 1, "none.zarr"),
        (["copy", "{cache}", "{tmp}/c.zarr", "--taps", "9"], 1, "no tap z9"),
        (["copy", "{cache}", "{tmp}/c.zarr", "--gather-k", "3"], 1, "gather_k = 3: expected none"),
        (["copy", "{cache}", "{cache}"], 1, "the same place"),
        (
            [
                "train",
                "{cache}",
                "--method",
                "lst",
                "--init",
                "pruned",
                "--reduction",
                "4",
                "--out",
                "{tmp}/r",
            ],
            1,
            "--ladder-init",
        ),
        (
            ["train", "{cache}", "--method", "lst", "--reduction", "5", "--out", "{tmp}/r"],
            1,
            "expected a divisor of the width",
        ),
        (["train", "{cache}", "--method", "last", "--taps", "0,2,9", "--out", "{tmp}/r"], 1, "z9"),
        (
            ["train", "{cache}", "--method", "last", "--taps", "0,2,4", "--out", "{tmp}/r"],
            1,
            "z1, z3 are lacking",
        ),
        (["train", "{tmp}/none.h5", "--method", "last", "--out", "{tmp}/r"], 1, "none.h5"),
        (
            ["train", "{cache}", "--method", "lasso", "--out", "{tmp}/r"],
            1,
            "expected last, lst, miet",
        ),
        (["train", "{cache}", "--method", "last", "--lr", "big", "--out", "{tmp}/r"], 2, "float"),
        (["train", "{cache}", "--method", "last", "--gap", "5", "--out", "{tmp}/r"], 1, "divisor"),
        (
            ["train", "{cache}", "--method", "last", "--epochs", "0", "--out", "{tmp}/r"],
            1,
            "epochs",
        ),
        (["evaluate", "{tmp}"], 1, "expected a run directory"),
        (["predict", "{tmp}", "{tmp}/none.jpg"], 1, "run directory"),
    ],
)
def test_bad_input_is_answered_in_one_line(
    zarr_cache: Path, images: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    places = {"images": images, "cache": zarr_cache, "tmp": tmp_path}
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    if code == 1:
        assert result.stderr.strip().startswith("sidecache: ")


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    images = paint(tmp_path / "images", train=1, val=1, test=1)
    (images / "train" / "violet").mkdir()
    result = run("extract", images, *SMALL, "--out", tmp_path / "c.zarr")
    assert result.exit_code == 1 and "violet" in result.stderr


def test_a_full_disk_is_refused_before_anything_is_written(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache.files.free_bytes", lambda path: 1000)
    result = run("extract", images, *SMALL, "--out", tmp_path / "c.zarr")
    assert result.exit_code == 1 and "1,000" in result.stderr.replace("_", ",")
    assert not (tmp_path / "c.zarr").exists()


def test_config_file_fills_defaults_and_flags_win(zarr_cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("method: linear\nepochs: 4\nwarmup-epochs: 0\ndevice: cpu\nlr: [1e-2, 1e-3]\n")
    out = tmp_path / "run"
    found = run_json("train", zarr_cache, "--config", file, "--epochs", 2, "--out", out)
    assert [m["settings"]["lr"] for m in found["members"]] == [0.01, 0.001]
    assert {m["settings"]["epochs"] for m in found["members"]} == {2}
    file.write_text("learning: 3\n")
    result = run("train", zarr_cache, "--config", file, "--method", "last", "--out", out)
    assert (
        result.exit_code == 2
        and "unknown key learning; known are cache, method, out" in result.stderr
    )


UNINSTALLED = """
import importlib.metadata as metadata, sys

def without(name, real=metadata.distribution):
    if name == "sidecache":
        raise metadata.PackageNotFoundError(name)
    return real(name)

metadata.distribution = without
import cli
cli.main(sys.argv[1:], prog_name="sidecache")
"""


def test_a_clone_that_is_not_installed_works(
    zarr_cache: Path, images: Path, tmp_path: Path
) -> None:
    """No metadata of ours is found: every command that writes the version down, and --version."""

    def clone(*arguments: object) -> str:
        line = [sys.executable, "-c", UNINSTALLED, *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout

    assert clone("--version") == f"sidecache {__version__}\n"
    clone("extract", images, *SMALL, "--out", tmp_path / "c.zarr")
    clone("copy", tmp_path / "c.zarr", tmp_path / "d.zarr", "--taps", "last:1")
    clone("train", zarr_cache, "--method", "linear", "--epochs", 1, "--warmup-epochs", 0,
          "--device", "cpu", "--out", tmp_path / "run")  # fmt: skip
    written = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert written["sidecache"] == __version__
    setup = (ROOT / "setup.cfg").read_text()
    assert "\nversion = attr: pipeline.__version__\n" in setup
    assert version("sidecache") == __version__  # here it is installed


def test_few_epochs_need_no_flag_for_their_warm_up(zarr_cache: Path, tmp_path: Path) -> None:
    """The first thing that everybody types, alone and in lists; what came of it is written down."""
    for number, (flags, warmups) in enumerate({
        ("--method", "last", "--epochs", "1"): [0],
        ("--method", "linear", "--epochs", "5"): [1],
        ("--method", "linear,last", "--epochs", "2,10", "--drop-path", "0,0.1"): [0, 2, 0, 0, 2, 2],
    }.items()):  # fmt: skip
        out = tmp_path / f"run{number}"
        found = run_json("train", zarr_cache, *flags, "--device", "cpu", "--out", out)
        written = yaml.safe_load((out / "config.yaml").read_text())["members"]
        assert [member["warmup_epochs"] for member in written] == warmups
        assert [m["settings"]["warmup_epochs"] for m in found["members"]] == warmups
    file = tmp_path / "c.yaml"
    file.write_text("method: last\nepochs: 2\ndevice: cpu\n")
    assert run("train", zarr_cache, "--config", file, "--out", tmp_path / "c").exit_code == 0
    refused = run(
        "train", zarr_cache, "--config", file, "--warmup-epochs", 3, "--out", tmp_path / "d"
    )
    assert refused.exit_code == 1 and "warmup_epochs = 3: expected" in refused.stderr
    inert = run(
        "train", zarr_cache, "--method", "linear", "--drop-path", 0.1, "--out", tmp_path / "e"
    )
    assert inert.exit_code == 1 and not (tmp_path / "e").exists()
    assert "drop_path = 0.1: decides nothing, as linear has no residual branch" in inert.stderr


def test_help_is_instant_and_the_module_runs() -> None:
    done = subprocess.run(
        [sys.executable, "cli.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "sidecache extract" in done.stdout
