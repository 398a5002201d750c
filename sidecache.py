"""sidecache for Python: run a frozen backbone once, train side networks on its layers for ever.

    >>> import sidecache
    >>> done = sidecache.extract("photos", model="test_vit", pretrained=False, out="photos.zarr")
    >>> done.rows
    24
    >>> run = sidecache.train("photos.zarr", method=["linear", "last"], epochs=3, out="runs/first")
    >>> [member.method for member in run.members]
    ['linear', 'last']
    >>> [score] = sidecache.evaluate("runs/first")
    >>> score.n
    6

Functions take what the commands of the same names take, with `_` for `-`; where a command takes a
comma list, they take a list. What they return are records (`pipeline.records` and beside each
command), what they report on the way goes to `report`. Nothing here is loaded before it is used:
importing this module loads no torch. Errors are `errors.PipelineError` and
`cache.CacheError`, and their kinds.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import __version__, errors

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from pipeline.backbones.behind import SideTuned
    from pipeline.copy import CopyResult
    from pipeline.evaluate import Evaluation
    from pipeline.extract import ExtractResult
    from pipeline.features.dataset import Features
    from pipeline.label import LabelResult
    from pipeline.predict import Prediction
    from pipeline.records import TrainResult
    from pipeline.report import Written
    from pipeline.sweep import SweepResult

__all__ = [
    "__version__",
    "copy",
    "errors",
    "evaluate",
    "extract",
    "from_arrays",
    "label",
    "load",
    "open",
    "predict",
    "report",
    "sweep",
    "train",
]

Location = str | Path
Report = Callable[[Any], None]


def _silent(_record: Any) -> None:
    """What is reported on the way is not wanted."""


def extract(
    images: Location, *, model: str, out: Location, report: Report = _silent, **settings: Any
) -> ExtractResult:
    """Run the frozen backbone over `images` once and write its layers' tokens to the cache `out`.

    `images` is a folder with a folder per class, a CSV, a VTAB-1K task folder, a .tar or a timm
    dataset string; `settings` are those of `sidecache extract` (`pipeline.config.ExtractConfig`).
    Run again, it goes on where it stopped; `update=True` computes what is new or changed alone.

        >>> import sidecache
        >>> sidecache.extract(
        ...     "photos", model="test_vit", pretrained=False,
        ...     gather="sum", dtype="int8", out="sums.h5",
        ... ).extracted_rows
        24
    """
    from pipeline.config import ExtractConfig
    from pipeline.extract import extract as stage

    return stage(ExtractConfig(images=str(images), model=model, out=str(out), **settings), report)


def label(cache: Location, source: Location | None = None, **settings: Any) -> LabelResult:
    """Replace labels, splits, groups or folds of `cache`; no feature is computed.

    `source` is a list (.csv, .tsv) or anything that `extract` takes; `settings` are those of
    `sidecache label` (`pipeline.config.LabelConfig`).

        >>> import sidecache
        >>> sidecache.label("photos.zarr", folds=3, stratify=True).folds
        [6, 6, 6]
    """
    from pipeline.config import LabelConfig
    from pipeline.label import label as stage

    source = None if source is None else str(source)
    return stage(LabelConfig(cache=str(cache), source=source, **settings))


def copy(src: Location, dst: Location, *, report: Report = _silent, **settings: Any) -> CopyResult:
    """Make a smaller cache: fewer taps, their sum, another storage type, some splits.

    >>> import sidecache
    >>> sidecache.copy("photos.zarr", "small.h5", taps="last:2", dtype="int8").copied_rows
    24
    """
    from pipeline.config import CopyConfig
    from pipeline.copy import copy as stage

    return stage(CopyConfig(src=str(src), dst=str(dst), **settings), report)


def train(
    cache: Location,
    *,
    out: Location,
    method: str | Sequence[str] = "last",
    report: Report = _silent,
    **settings: Any,
) -> TrainResult:
    """Train side networks from `cache` alone into the run directory `out`, all in one pass.

    `settings` are those of `sidecache train`. A setting of a member may be a list; lists multiply.

        >>> import sidecache
        >>> run = sidecache.train(
        ...     "photos.zarr", method="last", rank=[4, 8], lr=[1e-3, 3e-3], epochs=2,
        ...     out="runs/grid",
        ... )
        >>> len(run.members)
        4
    """
    from pipeline.config import PassConfig, TrainConfig
    from pipeline.setting import settings_of
    from pipeline.train import train as stage
    from pipeline.training.members import make_members

    shared = {name: settings.pop(name) for name in settings_of(PassConfig) if name in settings}
    axes = {name: _listed(value) for name, value in settings.items()}
    members = make_members(_listed(method), axes)
    return stage(TrainConfig(members=members, cache=str(cache), out=str(out), **shared), report)


def sweep(
    cache: Location,
    *,
    space: Location | Mapping[str, Any],
    out: Location,
    report: Report = _silent,
    **settings: Any,
) -> SweepResult:
    """Search the settings in `space` (a YAML file, or what it would hold): propose, train, repeat.

    `settings` are those of `sidecache sweep` (`pipeline.config.SweepConfig`).

        >>> import sidecache
        >>> space = {"method": "linear", "lr": [1e-3, 1e-2], "epochs": 2}
        >>> found = sidecache.sweep("photos.zarr", space=space, sampler="grid", out="runs/sweep")
        >>> found.done
        2
    """
    from pipeline.config import SweepConfig
    from pipeline.sweep import sweep as stage

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        if isinstance(space, Mapping):
            json.dump(space, file, allow_nan=False)  # every JSON is a YAML
            file.flush()
        place = file.name if isinstance(space, Mapping) else str(space)
        return stage(SweepConfig(cache=str(cache), space=place, out=str(out), **settings), report)


def evaluate(
    run: Location, images: Location | None = None, *, report: Report = _silent, **settings: Any
) -> list[Evaluation]:
    """Score trained members of `run` on a split: from the cache, or live from `images`.

    `settings` are those of `sidecache evaluate` (`pipeline.config.EvaluateConfig`).

        >>> import sidecache
        >>> [score] = sidecache.evaluate("runs/first", split="val")
        >>> sorted(score.scores)
        ['top1', 'top5']
    """
    from pipeline.config import EvaluateConfig
    from pipeline.evaluate import evaluate as stage

    for name in ("split", "members"):
        if name in settings:
            settings[name] = tuple(_listed(settings[name]))
    source = None if images is None else str(images)
    return stage(EvaluateConfig(run=str(run), images=source, **settings), report)


def predict(
    run: Location,
    photos: Location | Iterable[Location],
    *,
    report: Callable[[int, int], None] = lambda done, total: None,
    **settings: Any,
) -> list[Prediction]:
    """Classify `photos` (files or folders) with a trained member of `run`; see `load` for more.

    `settings` are those of `sidecache predict` (`pipeline.config.PredictConfig`).
    """
    from pipeline.config import PredictConfig
    from pipeline.predict import predict as stage

    return stage(PredictConfig(run=str(run), photos=_paths(photos), **settings), report)


def report(runs: Location | Iterable[Location], **settings: Any) -> Written:
    """Write one HTML page about finished `runs`.

    `settings` are those of `sidecache report` (`pipeline.config.ReportConfig`).

        >>> import sidecache
        >>> sidecache.report("runs/first").members
        2
    """
    from pipeline.config import ReportConfig
    from pipeline.report import report as stage

    return stage(ReportConfig(runs=_paths(runs), **settings))


def load(
    run: Location,
    *,
    member: str | None = None,
    task: str | None = None,
    weights: Location | None = None,
    pretrained: bool = True,
    seed: int = 0,
    device: str = "auto",
    amp: bool | None = None,
) -> SideTuned:
    """A trained member behind its backbone: a `torch.nn.Module` from images to outputs.

    `model(images)` takes (B, 3, H, W) as `model.transform` makes them of RGB images and gives
    (B, C) float32; `model.classes` names them. The best member on validation (of `task`), or
    `member`. `weights`, `pretrained` and `seed` as they were given to `extract`.

        >>> import sidecache, torch
        >>> from PIL import Image
        >>> model = sidecache.load("runs/first", pretrained=False)
        >>> image = model.transform(Image.open("photos/train/red/0.png").convert("RGB"))
        >>> model(image[None]).shape, model.classes
        (torch.Size([1, 3]), ('blue', 'green', 'red'))
    """
    from pipeline.backbones.behind import SideTuned, go_live
    from pipeline.device import pick_device
    from pipeline.runs.run import Run

    place, directory = pick_device(device), Run(run)
    trained = directory.load_member(member or directory.best_member(task), place)
    return SideTuned(
        go_live(trained, weights=weights, device=place, amp=amp, pretrained=pretrained, seed=seed)
    )


def open(cache: Location) -> Features:
    """A cache as rows of numpy arrays, and as a torch `Dataset` of any of its splits.

    >>> import sidecache
    >>> with sidecache.open("photos.zarr") as features:
    ...     tokens = features.read([0, 5])  # (2, taps, tokens, dim) float32
    ...     training = features.dataset("train", taps=["z6"])
    >>> tokens.dtype, len(training)
    (dtype('float32'), 12)
    >>> inputs, target = training[0]
    >>> sorted(inputs), int(target)
    (['z6'], 0)
    """
    from pipeline.features.dataset import Features

    return Features(cache)


def from_arrays(
    out: Location,
    tokens: np.ndarray | Tensor | Mapping[str, np.ndarray | Tensor],
    *,
    labels: Sequence[Any] | np.ndarray | None = None,
    split: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    prefix_tokens: int = 0,
    dtype: str = "float16",
    name: str = "arrays",
) -> Features:
    """Make a cache of features that are in memory already, whoever computed them.

    `tokens`: (N, taps, T, D), or a mapping of tap names (`z0`, `z1`, …) to (N, T, D) each; pooled
    features are (N, D) each. `labels`: N class names or indices, or numbers with a point
    (regression); None where unknown. `split`: N names, else 80 % train and 20 % val. Trains like
    any other cache; there is no backbone to evaluate it live.

        >>> import sidecache, numpy
        >>> values = numpy.random.default_rng(0).normal(size=(40, 2, 5, 8))
        >>> names = ["cat", "dog"] * 20
        >>> features = sidecache.from_arrays("mine.zarr", values, labels=names, prefix_tokens=1)
        >>> features.classes, features.taps
        (('cat', 'dog'), ('z0', 'z1'))
        >>> sidecache.train("mine.zarr", method="linear", epochs=2, out="runs/mine").members[0].id
        'm0'
    """
    from pipeline.features.dataset import Features
    from pipeline.labelling.arrays import write_arrays

    write_arrays(
        Path(out), tokens, labels=labels, split=split, keys=keys, prefix_tokens=prefix_tokens,
        dtype=dtype, name=name,
    )  # fmt: skip
    return Features(out)


def _listed(value: Any) -> list[Any]:
    """A value, or several, as a list."""
    return list(value) if isinstance(value, list | tuple) else [value]


def _paths(value: Location | Iterable[Location]) -> tuple[str, ...]:
    """One path, or several, as texts."""
    return (str(value),) if isinstance(value, str | Path) else tuple(map(str, value))
