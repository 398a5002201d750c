"""TensorBoard events are the lines of metrics.jsonl, also after a killed pass goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.runs import events
from pipeline.runs.events import Events


def line(epoch: int, member: str = "m0", **changes: Any) -> dict[str, Any]:
    values = {"lr": 0.1 / epoch, "train_loss": 2.0 / epoch, "val_loss": 3.0 / epoch}
    return {"epoch": epoch, "member": member, **values, "val_top1": epoch / 10, **changes}


def read_back(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """tag → (step, value), by TensorBoard's own reader."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_events_read_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with Events(tmp_path, ["m0", "m1"]) as written:
        written.add([line(1), line(1, "m1", val_top1=None)])
        written.add([line(2)])  # m1 was stopped
    found = read_back(tmp_path / "tensorboard" / "m0")
    assert set(found) == {"lr", "train/loss", "val/loss", "val/top1"}
    assert found["train/loss"] == [(1, 2.0), (2, 1.0)]
    assert found["val/top1"] == [(1, pytest.approx(0.1)), (2, pytest.approx(0.2))]
    other = read_back(tmp_path / "tensorboard" / "m1")
    assert set(other) == {"lr", "train/loss", "val/loss"} and len(other["lr"]) == 1


@pytest.mark.parametrize("epochs_done", [0, 1])
def test_epochs_that_are_trained_again_are_purged(tmp_path: Path, epochs_done: int) -> None:
    pytest.importorskip("tensorboard")
    with Events(tmp_path, ["m0"]) as written:
        for epoch in (1, 2, 3):
            written.add([line(epoch, train_loss=9.0)])
    with Events(tmp_path, ["m0"], epochs_done) as written:
        written.add([line(epochs_done + 1, train_loss=1.0)])
    found = read_back(tmp_path / "tensorboard" / "m0")["train/loss"]
    assert found == [(1, 9.0)] * epochs_done + [(epochs_done + 1, 1.0)]


def test_nothing_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "find_spec", lambda name: None)
    with Events(tmp_path, ["m0"]) as written:
        written.add([line(1)])
    assert not any(tmp_path.iterdir())


def test_nothing_for_a_grid_too_large_to_look_at(tmp_path: Path) -> None:
    with Events(tmp_path, [f"m{i}" for i in range(events.MOST_MEMBERS + 1)]):
        assert not any(tmp_path.iterdir())


def test_importing_it_loads_neither_torch_nor_tensorboard() -> None:
    code = "import sys, pipeline.runs.events; print('torch' in sys.modules, *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False")
    assert "tensorboard.backend" not in done.stdout.split()
