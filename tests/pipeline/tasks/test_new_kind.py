"""A kind of target that the program does not know: one class, and it trains, scores and is told."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import extract_config, paint, train_config
from torch import Tensor

import cli
from cache import Reader, labelling
from pipeline.config import Member
from pipeline.errors import SettingError, SourceError
from pipeline.extract import extract
from pipeline.runs.run import Run
from pipeline.runs.summary import number_of, score_of
from pipeline.tasks import KINDS
from pipeline.tasks.contract import Answer, Parsed, Task, Where
from pipeline.train import train
from sidecache import evaluate, predict, report

LAST = Member(method="last", epochs=20, warmup_epochs=1, lr=1e-2, settings={"rank": 4})
SPOTS = {"red": 9, "green": 3, "blue": 1}


class CountTask(Task):
    """How many of something: the output is the logarithm of a Poisson rate."""

    kind = "count"
    column = "count"
    cell = "how many"
    scores: ClassVar[Mapping[str, str]] = {"nearness": "nearness of counts"}
    percent = False
    smooths = False
    outputs = 1
    described = "how many"

    @classmethod
    def parse(cls, cells: Sequence[str], known: tuple[str, ...] | None, where: Where) -> Parsed:
        for row, cell in enumerate(cells):
            if cell and not cell.isdecimal():
                raise SourceError(f"{where(row)}: expected a count, found {cell!r}")
        return (), np.array([float(cell or "nan") for cell in cells], np.float32)

    def written(self, label: Any) -> str:
        return "" if np.isnan(label) else f"{label:.0f}"

    def known(self, labels: Tensor) -> Tensor:
        return ~labels.isnan()

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        log_rate = outputs[..., 0]
        return log_rate.exp() - labels.nan_to_num() * log_rate

    def measure(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return {"nearness": -float(np.abs(np.exp(outputs[:, 0]) - labels).mean())}

    def answer(self, output: Tensor, top_k: int) -> Answer:
        return Answer(value=float(output[0].exp()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Images with counts, `counted.zarr` of them, and a `run`; the kind is known meanwhile."""
    folder = paint(tmp_path_factory.mktemp("counts"), train=8, val=4)
    lines = ["path,count:spots,split"]
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        count = "" if number % 9 == 0 else SPOTS[path.parent.name]
        lines.append(f"{path.relative_to(folder)},{count},{path.parent.parent.name}")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:  # the two lines that a new kind takes
        patch.setitem(KINDS, "count", CountTask)
        patch.setitem(labelling.LABEL_DTYPES, "count", "float32")
        extract(extract_config(folder / "list.csv", folder / "counted.zarr"))
        train(train_config(folder / "counted.zarr", folder / "run", LAST))
        yield folder


@pytest.mark.usefixtures("no_hub")
def test_a_new_kind_learns_and_predicts(folder: Path) -> None:
    run = Run(folder / "run")
    with Reader(folder / "counted.zarr") as reader:
        assert [(t.name, t.kind) for t in reader.labelling.targets] == [("spots", "count")]
    (row,) = run.summary()
    score = score_of(row)
    assert score == number_of(row["val_nearness"]) and score is not None and score > -1.5
    assert run.best_member() == "m0" and run.card("m0")["target"]["kind"] == "count"

    (found,) = evaluate(run.path, device="cpu", amp=False)
    assert found.scores["nearness"] is not None and found.scores["nearness"] > -1.5
    listed = str(folder / "list.csv")
    (live,) = evaluate(run.path, images=listed, device="cpu", amp=False)
    assert live.scores == pytest.approx(found.scores, abs=1e-4)
    photo = folder / "test" / "red" / "1.png"
    (prediction,) = predict(run.path, [photo], device="cpu", amp=False)
    assert prediction.value == pytest.approx(9, abs=2)


def test_a_new_kind_is_told(folder: Path) -> None:
    def said(*words: str | Path) -> str:
        result = CliRunner().invoke(cli.main, list(map(str, words)))
        assert result.exit_code == 0, result.output
        return result.output

    run = folder / "run"
    evaluated = said("evaluate", run, "--device", "cpu", "--no-amp")
    assert re.search(r"nearness -\d\.\d{4}, loss", evaluated)
    page = Path(report([run], device="cpu").out).read_text()
    assert re.search(r"nearness of counts -\d\.\d{3}, loss", page)
    found = json.loads(said("inspect", folder / "counted.zarr", "--json"))
    assert found["kinds"] == {"spots": "count"}
    listed = said("label", folder / "counted.zarr", "--show")
    assert "key,split,count:spots" in listed and "test/red/1.png,test,9" in listed


def test_a_new_kind_refuses_in_its_own_words(folder: Path, tmp_path: Path) -> None:
    smooth = dataclasses.replace(LAST, smoothing=0.1)
    with pytest.raises(SettingError, match=r"smoothing = 0\.1: expected 0 for a count"):
        train(train_config(folder / "counted.zarr", tmp_path / "r", smooth))
    listed = tmp_path / "list.csv"
    listed.write_text("path,count:spots\ntest/red/0.png,many\n")
    with pytest.raises(SourceError, match=r"line 2, count:spots: expected a count, found 'many'"):
        extract(extract_config(listed, tmp_path / "other.zarr"))
    listed.write_text("path,Counts:spots\ntest/red/0.png,3\n")
    with pytest.raises(SourceError, match=r"value:NAME \(a number\) or count:NAME \(how many\)"):
        extract(extract_config(listed, tmp_path / "other.zarr"))
