"""What the benchmarks say of themselves: on which machine, in which precision, by which command."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline import device

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
Load = Callable[[str], Any]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """A script as a module; they import each other by name, as when one is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.parametrize(
    ("flags", "hardware", "precision"),
    [
        ([], True, "bfloat16"),
        ([], False, "float32"),
        (["--precision", "bfloat16"], False, "bfloat16"),
        (["--precision", "float32"], True, "float32"),
    ],
)
def test_a_line_names_its_machine(
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    hardware: bool,
    precision: str,
) -> None:
    monkeypatch.setattr(device, "_cpu_has_bfloat16", lambda: hardware)
    monkeypatch.setattr(sys, "argv", ["benchmarks/some.py", "--device", "cpu", *flags])
    measure, parser = load("measure"), argparse.ArgumentParser()
    measure.add_compute_flags(parser)
    measure.print_line("some", computing=parser.parse_args(), ratio=1 / 3)
    line = json.loads(capsys.readouterr().out)
    assert (line["benchmark"], line["ratio"]) == ("some", 0.3333)
    assert line["precision"] == precision
    assert line["device"].startswith("cpu (")
    assert line["torch"] == torch.__version__
    assert line["command"] == " ".join(["python benchmarks/some.py --device cpu", *flags])
    assert set(line) > {"cpu", "cpu_bfloat16", "cpus", "python", "commit", "date"}


@pytest.mark.parametrize(
    ("flags", "known"),
    [
        ("fpu avx2 avx512_bf16 amx_bf16", "amx_bf16"),
        ("fpu avx512_bf16", "avx512_bf16"),
        ("fpu avx2", "none"),
        ("", "unknown"),
    ],
)
def test_instructions_for_bfloat16(
    load: Load, monkeypatch: pytest.MonkeyPatch, flags: str, known: str
) -> None:
    measure = load("measure")
    monkeypatch.setattr(measure, "_cpu_fact", {"flags": flags}.get)
    assert measure._cpu_bfloat16() == known


class Products(TorchDispatchMode):
    """The types of all matrix products while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
            self.types.add(out.dtype)
        return out


@pytest.mark.parametrize("hardware", [True, False])
@pytest.mark.parametrize("system", ["ours", "live", "lora", "matrix"])
def test_all_systems_compute_in_one_precision(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str, hardware: bool
) -> None:
    """No baseline in emulated bfloat16, where ours is in float32; none in float32, where ours is
    in bfloat16."""
    if system == "lora":
        pytest.importorskip("peft")
    monkeypatch.setattr(device, "_cpu_has_bfloat16", lambda: hardware)
    train, systems = load("train"), load("systems")
    sizes = {"model": "vit_tiny_patch16_224", "dim": 192, "taps": 13, "tokens": 197}
    sizes |= {"batch_size": 2, "rows": 2, "epochs": 1, "steps": 1}
    options = argparse.Namespace(**sizes, device="cpu", precision="auto", folder=tmp_path)

    def build(options: argparse.Namespace, cache: Path) -> None:
        run, _ = train.SYSTEMS[system](options, cache, torch.device("cpu"))
        with Products() as products:
            run()
        wanted = torch.bfloat16 if hardware else torch.float32
        assert wanted in products.types
        if not hardware:
            assert products.types == {torch.float32}

    systems.with_cache(options, build)


def test_accuracy_computes_as_its_line_says(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracy = load("accuracy")
    member = {"id": "m0", "val_top1": 0.5, "val_loss": 1.0, "settings": {"lr": 1, "pool": "cls"}}
    answer = json.dumps({"members": [member], "top1": 0.5})
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command[1:])
        return SimpleNamespace(stdout=answer)

    flags = ["--data", "images", "--work", str(tmp_path), "--sets", "signs", "--model", "test_vit"]
    flags += ["--systems", "linear", "--seeds", "0", "--device", "cpu", "--precision", "float32"]
    monkeypatch.setattr(sys, "argv", ["benchmarks/accuracy.py", *flags])
    with monkeypatch.context() as patched:
        patched.setattr(accuracy.subprocess, "run", run)
        patched.setattr(load("measure"), "commit", lambda: None)
        accuracy.main()
    line = json.loads(capsys.readouterr().out)
    assert (line["precision"], line["sizes"]["dim"]) == ("float32", 64)
    assert [command[0] for command in commands] == ["extract", "train", "evaluate"]
    assert all(command[-4:] == ["--device", "cpu", "--no-amp", "--json"] for command in commands)


# --- gpu.sh ---------------------------------------------------------------------------------------

PYTHON = """#!/usr/bin/env bash
# A Python that sees a GPU, and in which one benchmark fails.
case $1 in
    -c) exit 0 ;;
    benchmarks/train.py) exit 3 ;;
    *) echo "{\\"benchmark\\": \\"$1\\", \\"command\\": \\"$*\\"}" ;;
esac
"""


def gpu_sh(python: str | Path, out: Path) -> subprocess.CompletedProcess[str]:
    given = {"PYTHON": str(python), "OUT": str(out), "COMMIT": "c0ffee", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [BENCHMARKS / "gpu.sh"], env={**os.environ, **given}, capture_output=True, text=True
    )


def test_gpu_sh_runs_the_tests_first_and_goes_on_after_a_failure(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    done = gpu_sh(python, tmp_path / "out")
    assert done.returncode == 1
    (results,) = (tmp_path / "out").iterdir()
    assert results.name.endswith("-gpu.jsonl")
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    names = [line["benchmark"].removeprefix("benchmarks/").removesuffix(".py") for line in lines]
    assert names == ["gpu_tests", "extract", "extract", "read", "train", "members", "stream"]
    (failed,) = (line for line in lines if "failed" in line)
    assert "benchmarks/train.py --device cuda" in failed["failed"]
    assert failed["commit"] == "c0ffee"
    assert all("--device cuda" in line["command"] for line in lines[:3])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_sh_without_a_gpu_measures_nothing(tmp_path: Path) -> None:
    done = gpu_sh(sys.executable, tmp_path / "out")
    assert done.returncode == 1
    assert f"torch {torch.__version__} sees no GPU" in done.stderr
    assert not any((tmp_path / "out").iterdir())
