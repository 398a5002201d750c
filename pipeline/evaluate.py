"""Measure a trained member on a split it has not seen: from a cache, or live from images.

The test split is read here and nowhere else. What was measured is appended to the run's
`evaluations.jsonl`, so that a second look at the test split leaves a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cache import Reader
from pipeline.batches import Batches, feature_spec, labelled_rows
from pipeline.checkpoint import Run, TrainedMember
from pipeline.device import pick_device, pick_precision
from pipeline.errors import ImageError, RunError
from pipeline.members import score
from pipeline.metrics import Scores, Tally


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of one member on some splits of a cache or of images (`live`)."""

    run: str
    member: str
    split: tuple[str, ...]
    live: bool
    top1: float
    top5: float
    loss: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Reported after each batch of live images."""

    rows: int
    total: int


def evaluate(
    run: str | Path,
    *,
    split: Sequence[str] = ("test",),
    member: str | None = None,
    cache: str | Path | None = None,
    images: str | None = None,
    weights: str | Path | None = None,
    batch_size: int = 64,
    workers: int = 2,
    device: str = "auto",
    amp: bool | None = None,
    report: Callable[[Evaluated], None] = lambda _: None,
) -> Evaluation:
    """Score `member` (None: the best on validation) on `split`.

    Reads `cache`, by default the one it was trained from, or, with `images`, runs the backbone
    (whose `weights` file may be given). Raises RunError if run, member, backbone or classes do
    not fit, and the errors of the cache, the source and the backbone.
    """
    directory = Run(run)
    chosen = pick_device(device)
    trained = directory.load_member(member, chosen)
    if images is not None:
        scores = _live(trained, images, split, weights, batch_size, workers, chosen, amp, report)
    else:
        location = cache or directory.config().cache
        scores = _cached(trained, location, split, chosen, amp)
    result = Evaluation(
        run=str(run), member=trained.id, split=tuple(split), live=images is not None, **vars(scores)
    )
    source = str(images if images is not None else location)
    directory.write_evaluation({**asdict(result), "source": source})
    return result


def _cached(
    trained: TrainedMember,
    location: str | Path,
    split: Sequence[str],
    device: torch.device,
    amp: bool | None,
) -> Scores:
    with Reader(location) as reader:
        _check_fit(trained, reader)
        rows, labels = labelled_rows(reader, split)
        dtype = pick_precision(device, amp)
        batches = Batches(reader, rows, labels, [trained.network], device=device, dtype=dtype)
        return score([trained.network], batches)[0][0]


def _live(
    trained: TrainedMember,
    images: str,
    split: Sequence[str],
    weights: str | Path | None,
    batch_size: int,
    workers: int,
    device: torch.device,
    amp: bool | None,
    report: Callable[[Evaluated], None],
) -> Scores:
    from pipeline.live import go_live  # stage two must not need these
    from pipeline.sources import open_source

    source = open_source(images, splits=tuple(split), classes={"label": tuple(trained.classes)})
    live = go_live(trained, weights=weights, device=device, amp=amp)
    labels = torch.from_numpy(source.target("label").values).to(device)
    tally = Tally(1, device)
    for start, logits, failures in live.batches(source, batch_size=batch_size, workers=workers):
        if failures:
            raise ImageError(next(iter(failures.values())))
        stop = start + len(logits)
        tally.add(logits[None], labels[start:stop])
        report(Evaluated(rows=stop, total=len(source.rows)))
    return tally.scores()[0]


def _check_fit(trained: TrainedMember, reader: Reader) -> None:
    """Another cache will do if it was made the same way, for the same classes."""
    card, manifest = trained.card, reader.manifest
    if card["cache_fingerprint"] == reader.fingerprint:
        return
    learned = trained.network.spec.taps
    found = feature_spec(reader, len(trained.classes)).taps
    both = [tap for tap in learned if tap in found]
    pairs: dict[str, tuple[Any, Any]] = {
        "backbone": (card["backbone"], manifest.identity["backbone"]),
        "preprocessing": (card["preprocessing"], manifest.identity["preprocessing"]),
        "classes": (card["classes"], list(manifest.targets[0].classes)),
        "shapes": ([learned[tap] for tap in both], [found[tap] for tap in both]),
    }
    differing = [name for name, (learned, came) in pairs.items() if learned != came]
    if differing:
        told = "\n  ".join(
            f"{name}: {pairs[name][0]} learned, {pairs[name][1]} here" for name in differing
        )
        raise RunError(
            f"member {trained.id} learned from another kind of cache than "
            f"{reader.location}:\n  {told}"
        )
