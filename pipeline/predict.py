"""Classify photographs with a trained member: the use that all the rest is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pipeline.backbones.behind import go_live
from pipeline.device import pick_device
from pipeline.runs.card import TrainedMember
from pipeline.runs.run import Run
from pipeline.sources.decode import REPAIR
from pipeline.sources.folders import photos
from pipeline.sources.source import FileSource, Row
from pipeline.tasks import Answer


@dataclass(frozen=True, kw_only=True)
class Prediction(Answer):
    """The most probable classes of one photograph, best first; or the `error` in their place: it
    could not be read, or the member's outputs for it are not finite.

    A multilabel task's probabilities are each class's own; a regression has a `value` alone.
    """

    path: str
    error: str | None = None


def predict(
    run: str | Path,
    paths: Sequence[str | Path],
    *,
    top_k: int = 5,
    member: str | None = None,
    task: str | None = None,
    weights: str | Path | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "auto",
    amp: bool | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Prediction]:
    """One `Prediction` a photograph, in order; folders are searched for images.

    Predicts with `member`, or the best on validation (of `task`, which a run of several tasks
    needs). A photograph with an `error` does not stop the others. Raises RunError,
    SourceError (nothing to predict) and BackboneError.
    """
    chosen, directory = pick_device(device), Run(run)
    trained = directory.load_member(member or directory.best_member(task), chosen)
    files = list(dict.fromkeys(str(path) for path in photos(paths)))
    source = FileSource(
        rows=[Row(key=path, split="photos") for path in files],
        description="photographs",
        paths=files,
        advice=REPAIR,
    )
    live = go_live(trained, weights=weights, device=chosen, amp=amp)
    out: list[Prediction] = []
    for start, outputs, failures in live.batches(source, batch_size=batch_size, workers=workers):
        for row, output in enumerate(outputs.cpu(), start):
            if row in failures:
                out.append(Prediction(path=files[row], error=failures[row]))
            else:
                out.append(_prediction(files[row], output, trained, top_k))
        report(len(out), len(files))
    return out


def _prediction(path: str, output: Tensor, trained: TrainedMember, top_k: int) -> Prediction:
    if not output.isfinite().all():
        return Prediction(path=path, error=f"{path}: the outputs of {trained.id} are not finite")
    return Prediction(path=path, **vars(trained.task.answer(output, top_k)))
