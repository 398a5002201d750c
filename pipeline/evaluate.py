"""Measure a trained member on a split it has not seen: from a cache, or live from images.

The test split is read here and nowhere else. What was measured is appended to the run's
`evaluations.jsonl`, so that a second look at the test split leaves a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

import torch

from cache import Reader
from pipeline.config import EvaluateConfig
from pipeline.device import pick_device, pick_precision, without_tf32
from pipeline.errors import ImageError, RunError
from pipeline.features.labelled import feature_spec, labelled_rows
from pipeline.features.operands import Batches
from pipeline.runs.card import TrainedMember
from pipeline.runs.run import Run
from pipeline.sources.open import opener
from pipeline.sources.source import Source
from pipeline.tasks import Scores
from pipeline.training.scoring import score
from pipeline.training.workers import Workers


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of one member on some splits of a cache or of images (`live`).

    `scores` are those of the task's kind, the one that ranks first (`pipeline.tasks`). They
    and the loss are None where the member's outputs are not finite.
    """

    run: str
    member: str
    task: str
    split: tuple[str, ...]
    live: bool
    scores: dict[str, float | None]
    loss: float | None
    n: int

    def to_dict(self) -> dict[str, Any]:
        """With the scores beside the rest, as evaluations.jsonl and `--json` hold it."""
        values = dict(vars(self))
        scores = values.pop("scores")
        return {**values, **scores}


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Reported after each batch of live images."""

    rows: int
    total: int


@dataclass(frozen=True, kw_only=True)
class CacheChanged:
    """Reported if the cache is not what the run was trained from: whether its `features` are
    others, whether other things are asked of its rows (`labelling`)."""

    features: bool
    labelling: bool


@without_tf32()
def evaluate(
    config: EvaluateConfig, report: Callable[[Evaluated | CacheChanged], None] = lambda _: None
) -> list[Evaluation]:
    """Score members of a run on a split; by default the best on validation, of each task or of one.

    A run without validation (as a refit leaves it) has no best member: all are scored, "all" asks
    for that anywhere. Reads the config's `cache`, by default the one it was trained from, or, with
    `images`, runs the backbone. Raises RunError if run, member, backbone or classes do not fit, and
    the errors of the cache, the source and the backbone.
    """
    open_images = opener(
        config.images,
        data_dir=config.data_dir,
        input_key=config.input_key,
        target_key=config.target_key,
    )
    run, device = Run(config.run), pick_device(config.device)
    trained = [run.load_member(id, device) for id in _choose(run, config)]
    if open_images is not None:
        source = str(config.images)
        scores = [_live(member, open_images, config, device, report) for member in trained]
    else:
        source = str(config.cache or run.cache())
        scores = _cached(trained, source, config, device, run.environment(), report)
    results = []
    for member, found in zip(trained, scores, strict=True):
        result = Evaluation(
            run=config.run,
            member=member.id,
            task=member.task.name,
            split=config.split,
            live=config.images is not None,
            scores=found.values,
            loss=found.loss,
            n=found.n,
        )
        run.write_evaluation({**result.to_dict(), "source": source})
        results.append(result)
    return results


def mean_and_deviation(
    evaluations: Sequence[Evaluation],
) -> dict[str, tuple[float, float] | None]:
    """Mean and standard deviation (0 of one) of each score over members of one task; None if a
    member has none: a mean of the others would hide it."""
    found: dict[str, tuple[float, float] | None] = {}
    for name in evaluations[0].scores:
        each = [evaluation.scores[name] for evaluation in evaluations]
        values = [value for value in each if value is not None]
        spread = stdev(values) if len(values) > 1 else 0.0
        found[name] = (mean(values), spread) if len(values) == len(each) else None
    return found


def _choose(run: Run, config: EvaluateConfig) -> list[str]:
    members, task = config.members, config.task
    rows = run.summary()
    if members == ("all",) or not (members or run.config().val_split):
        return [row["id"] for row in rows if task in (None, row["task"])]
    if members:
        return list(members)
    tasks = [task] if task else run.tasks()
    return [member for name in tasks for member in run.best_members(name)]


def _cached(
    trained: Sequence[TrainedMember],
    location: str,
    config: EvaluateConfig,
    device: torch.device,
    noted: Mapping[str, Any],
    report: Callable[[Evaluated | CacheChanged], None],
) -> list[Scores]:
    with Reader(location) as reader, Workers(len(trained), device) as workers:
        changed = CacheChanged(
            features=not reader.is_known_as(noted["fingerprint"]),
            labelling=noted.get("labelling", reader.labelling_digest) != reader.labelling_digest,
        )
        if changed.features or changed.labelling:
            report(changed)
        for member in trained:
            _check_fit(member, reader)
            _refuse_learned_rows(member, reader, config.split)
        tasks = list(dict.fromkeys(member.task.name for member in trained))
        rows = labelled_rows(reader, config.split, tasks)
        networks = [member.network for member in trained]
        dtype = trained[0].precision
        if config.amp is not None:
            dtype = pick_precision(device, config.amp)
        batches = Batches(reader, rows, networks, device=device, dtype=dtype)
        entries = [(i, m.network, replace(m.task, fold=None)) for i, m in enumerate(trained)]
        return [scores for (scores,) in score(entries, batches, workers)]


def _live(
    trained: TrainedMember,
    open_images: Callable[..., Source],
    config: EvaluateConfig,
    device: torch.device,
    report: Callable[[Evaluated], None],
) -> Scores:
    from pipeline.backbones.behind import go_live  # stage two must not need it

    task = trained.task
    source = open_images(splits=config.split, classes={task.name: task.classes})
    live = go_live(trained, weights=config.weights, device=device, amp=config.amp)
    labels = torch.from_numpy(source.target(task.name).values).to(device)
    tally = task.tally(1, device)
    batches = live.batches(source, batch_size=config.batch_size, workers=config.workers)
    for start, outputs, failures in batches:
        if failures:
            raise ImageError(next(iter(failures.values())))
        stop = start + len(outputs)
        tally.add(outputs[None], labels[start:stop])
        report(Evaluated(rows=stop, total=len(source.rows)))
    return tally.scores()[0]


def _refuse_learned_rows(trained: TrainedMember, reader: Reader, split: Sequence[str]) -> None:
    """A member that learned by folds has seen the rows of the others."""
    if trained.task.fold is None or not reader.labelling.folds:
        return
    if (reader.folds[reader.split_rows(*split)] >= 0).any():
        raise RunError(
            f"member {trained.id} learned by folds, and folds divide {' + '.join(split)}: it has "
            f"seen most of it. Expected a split outside of the folds, such as test"
        )


def _check_fit(trained: TrainedMember, reader: Reader) -> None:
    """Another cache will do if it was made the same way, for the same target."""
    card, manifest, task = trained.card, reader.manifest, trained.task
    target = reader.target(task.name)
    pairs: dict[str, tuple[Any, Any]] = {
        "classes": (list(task.classes), list(target.classes)),
        "kind of target": (task.kind, target.kind),
    }
    if not reader.is_known_as(card["cache_fingerprint"]):
        learned = trained.network.spec.taps
        found = feature_spec(reader, task.outputs).taps
        both = [tap for tap in learned if tap in found]
        pairs |= {
            "backbone": (card["backbone"], manifest.identity["backbone"]),
            "preprocessing": (card["preprocessing"], manifest.identity["preprocessing"]),
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
