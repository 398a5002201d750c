"""Classify photographs with a trained member: the use that all the rest is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.checkpoint import Run
from pipeline.device import pick_device
from pipeline.images import FileSource, Row, photos
from pipeline.live import go_live


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The most probable classes of one photograph, best first; or why it could not be read."""

    path: str
    classes: list[str] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    error: str | None = None


def predict(
    run: str | Path,
    paths: Sequence[str | Path],
    *,
    top_k: int = 5,
    member: str | None = None,
    weights: str | Path | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "auto",
    amp: bool | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Prediction]:
    """One `Prediction` a photograph, in order; folders are searched for images.

    An unreadable photograph gets an `error` and does not stop the others. Raises RunError,
    SourceError (nothing to predict) and BackboneError.
    """
    chosen = pick_device(device)
    trained = Run(run).load_member(member, chosen)
    files = list(dict.fromkeys(str(path) for path in photos(paths)))
    source = FileSource(
        rows=[Row(key=path, split="photos") for path in files],
        description="photographs",
        paths=files,
    )
    live = go_live(trained, weights=weights, device=chosen, amp=amp)
    out: list[Prediction] = []
    for start, logits, failures in live.batches(source, batch_size=batch_size, workers=workers):
        best = logits.softmax(dim=-1).topk(min(top_k, logits.shape[-1]), dim=-1)
        values, indices = best.values.tolist(), best.indices.tolist()
        for row in range(start, start + len(logits)):
            if row in failures:
                out.append(Prediction(path=files[row], error=failures[row]))
                continue
            names = [trained.classes[i] for i in indices[row - start]]
            out.append(
                Prediction(path=files[row], classes=names, probabilities=values[row - start])
            )
        report(len(out), len(files))
    return out
