"""Classify photographs with a trained member: the use that all the rest is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pipeline.backbones.behind import go_live
from pipeline.config import PredictConfig
from pipeline.device import pick_device
from pipeline.runs.card import TrainedMember
from pipeline.runs.run import Run
from pipeline.sources.folders import photos
from pipeline.sources.source import REPAIR, FileSource, Row
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
    config: PredictConfig, report: Callable[[int, int], None] = lambda done, total: None
) -> list[Prediction]:
    """One `Prediction` a photograph, in order; folders are searched for images.

    Predicts with the member that is named, or the best on validation (of the task, which a run of
    several needs). A photograph with an `error` does not stop the others. Raises RunError,
    SourceError (nothing to predict) and BackboneError.
    """
    device, run = pick_device(config.device), Run(config.run)
    trained = run.load_member(config.member or run.best_member(config.task), device)
    files = list(dict.fromkeys(str(path) for path in photos(config.photos)))
    source = FileSource(
        rows=[Row(key=path, split="photos") for path in files],
        description="photographs",
        paths=files,
        advice=REPAIR,
    )
    live = go_live(trained, weights=config.weights, device=device, amp=config.amp)
    batches = live.batches(source, batch_size=config.batch_size, workers=config.workers)
    out: list[Prediction] = []
    for start, outputs, failures in batches:
        for row, output in enumerate(outputs.cpu(), start):
            if row in failures:
                out.append(Prediction(path=files[row], error=failures[row]))
            else:
                out.append(_prediction(files[row], output, trained, config.top_k))
        report(len(out), len(files))
    return out


def _prediction(path: str, output: Tensor, trained: TrainedMember, top_k: int) -> Prediction:
    if not output.isfinite().all():
        return Prediction(path=path, error=f"{path}: the outputs of {trained.id} are not finite")
    return Prediction(path=path, **vars(trained.task.answer(output, top_k)))
