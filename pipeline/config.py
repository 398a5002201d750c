"""What a command was asked to do: one frozen, validated object each; the only source of defaults.

`cli.py` makes its flags' defaults from these, `train` writes its own, resolved, into the run
directory. YAML in (`read_yaml`) knows exactly these field names.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from pipeline.errors import SettingError

GATHERS = ("none", "sum", "normsum")  # normsum: each map normalised before it is added


def require(config: object, condition: bool, name: str, expected: str) -> None:
    """Refuse a field of `config` with SettingError, saying what was `expected`."""
    if not condition:
        raise SettingError(f"{name} = {getattr(config, name)!r}: expected {expected}")


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Stage one. `images` and what is said of a timm dataset string (`data_dir`, `input_key`,
    `target_key`, `dataset_download`) as `open_source` takes them; None means the backbone's own
    value. Raises SettingError when it is made with an impossible value."""

    images: str
    model: str
    out: str
    weights: str | None = None
    pretrained: bool = True
    split: tuple[str, ...] | None = None
    data_dir: str | None = None
    input_key: str | None = None
    target_key: str | None = None
    dataset_download: bool = False
    taps: str = "all"
    gather: str = "none"
    gather_k: int | None = None
    gather_groups: int = 1
    gather_pooled: bool = False
    dtype: str = "float16"
    ladder_init: str | None = None
    reduction: int = 8
    keep_layers: str = "all"
    fisher_samples: int = 1024
    img_size: tuple[int, int] | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None
    interpolation: str | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    batch_size: int = 64
    workers: int = 2
    device: str = "auto"
    amp: bool | None = None
    seed: int = 0
    on_error: str = "raise"
    update: bool = False
    overwrite: bool = False

    LADDER_INITS = (None, "magnitude", "fisher")
    PREPROCESSING = ("img_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")

    def __post_init__(self) -> None:
        require(self, self.batch_size >= 1, "batch_size", "1 or more")
        require(self, self.workers >= 0, "workers", "0 or more")
        require(self, self.on_error in ("raise", "skip"), "on_error", "raise or skip")
        require(
            self,
            self.img_size is None or all(side >= 1 for side in self.img_size),
            "img_size",
            "one or two positive whole numbers",
        )
        require(
            self, self.crop_pct is None or 0 < self.crop_pct <= 1, "crop_pct", "above 0, at most 1"
        )
        modes = (None, "center", "squash", "border")
        require(self, self.crop_mode in modes, "crop_mode", "center, squash or border")
        _check_gather(self)
        require(self, self.ladder_init in self.LADDER_INITS, "ladder_init", "magnitude or fisher")
        require(
            self,
            self.ladder_init is None or self.gather == "none",
            "ladder_init",
            "none with --gather: LST reads taps, not sums",
        )
        require(self, self.reduction >= 1, "reduction", "1 or more")
        require(self, self.fisher_samples >= 1, "fisher_samples", "1 or more")
        require(
            self,
            not (self.update and self.overwrite),
            "update",
            "False with --overwrite: one keeps what is there, the other does not",
        )

    def preprocessing(self) -> dict[str, Any]:
        """The preprocessing fields that were asked for, None where the backbone decides."""
        return {name: getattr(self, name) for name in self.PREPROCESSING}


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Another labelling for a cache: from `source` (a list, or anything that `extract` takes), or
    what is there with other folds. `group` is a column of the list, or one that the cache has;
    `fold_split` are the splits that folds divide, None all but test. Raises SettingError."""

    cache: str
    source: str | None = None
    add: bool = False
    folds: int = 0
    group: str | None = None
    stratify: bool = False
    fold_split: tuple[str, ...] | None = None
    seed: int = 0
    data_dir: str | None = None
    input_key: str | None = None
    target_key: str | None = None

    def __post_init__(self) -> None:
        require(self, self.folds == 0 or self.folds >= 2, "folds", "2 or more")
        asks = self.source is not None or self.folds
        require(self, bool(asks), "source", "a list or a source of labels, or --folds")
        require(self, not self.add or self.source is not None, "add", "False without a list")
        for name in ("stratify", "fold_split"):
            given = bool(getattr(self, name))
            require(self, not given or self.folds > 0, name, "left out without --folds")
        require(self, self.seed >= 0, "seed", "0 or more")


@dataclass(frozen=True, kw_only=True)
class RepairConfig:
    """Damaged rows of `cache`, to be computed again from `images`; the backbone's `weights`,
    `pretrained` and `seed` as they were given to ExtractConfig."""

    cache: str
    images: str
    weights: str | None = None
    pretrained: bool = True
    seed: int = 0
    device: str = "auto"
    data_dir: str | None = None
    input_key: str | None = None
    target_key: str | None = None


@dataclass(frozen=True, kw_only=True)
class CopyConfig:
    """A smaller cache from a cache. `dtype` None keeps the storage type, `split` None all rows;
    `gather` as in ExtractConfig."""

    src: str
    dst: str
    taps: str = "all"
    gather: str = "none"
    gather_k: int | None = None
    gather_groups: int = 1
    gather_pooled: bool = False
    dtype: str | None = None
    split: tuple[str, ...] | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        same = Path(self.src).absolute() == Path(self.dst).absolute()
        require(self, not same, "dst", "a new location; src is the same place")
        _check_gather(self)


def _check_gather(config: ExtractConfig | CopyConfig) -> None:
    gathers = config.gather != "none"
    require(config, config.gather in GATHERS, "gather", ", ".join(GATHERS))
    require(config, gathers or config.gather_k is None, "gather_k", "none without --gather")
    require(config, gathers or config.gather_groups == 1, "gather_groups", "1 without --gather")
    require(config, gathers or not config.gather_pooled, "gather_pooled", "False without --gather")
    require(config, not gathers or config.taps == "all", "taps", "all with --gather (see gather_k)")


@dataclass(frozen=True, kw_only=True)
class Member:
    """One side network to train: its method, the settings that shape it, and how it learns.

    `epochs` includes `warmup_epochs`, by default 3 or what `fitting_warmup` leaves of them.
    `settings` are the method's own (rank, gap, pool, …). `task` names a target of the cache; "" is
    its first.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 2e-3
    weight_decay: float = 0.05
    epochs: int = 30
    warmup_epochs: int = None  # type: ignore[assignment]  # a number once it is made
    warmup_lr: float = 1e-7
    sched: str = "cosine"
    drop_path: float = 0.0
    smoothing: float = 0.0
    seed: int = 0
    task: str = ""

    SCHEDULES = ("cosine", "constant")

    def __post_init__(self) -> None:
        if self.warmup_epochs is None:
            object.__setattr__(self, "warmup_epochs", fitting_warmup(self.epochs))
        require(self, self.lr > 0, "lr", "above 0")
        require(self, self.weight_decay >= 0, "weight_decay", "0 or more")
        require(self, self.epochs >= 1, "epochs", "1 or more")
        require(
            self,
            0 <= self.warmup_epochs < self.epochs or self.warmup_epochs == 0,
            "warmup_epochs",
            f"0 or more, fewer than the {self.epochs} epochs that include them",
        )
        require(self, self.sched in self.SCHEDULES, "sched", " or ".join(self.SCHEDULES))
        require(self, 0 <= self.drop_path < 1, "drop_path", "from 0 to below 1")
        require(self, 0 <= self.smoothing < 1, "smoothing", "from 0 to below 1")
        require(self, self.seed >= 0, "seed", "0 or more")

    @property
    def all_settings(self) -> dict[str, Any]:
        """Those of its shape and of its learning in one flat dict, the method left out."""
        learning = {k: v for k, v in vars(self).items() if k not in ("method", "settings")}
        return {**self.settings, **learning}


def fitting_warmup(epochs: int, usual: int = 3) -> int:
    """A warm-up that nobody asked for: as `usual`, but at most a fifth of the epochs."""
    return min(usual, epochs // 5)


@dataclass(frozen=True, kw_only=True)
class PassConfig:
    """What the members of a training pass share.

    `batch_size` and `order_seed` are the pass's: all members see the same batches, which is what
    lets them share the reads. `val_split` may be empty: then nothing is validated. What is in FREE
    does not decide the result; `amp` does by the precision that it comes to, which a run records.
    """

    cache: str
    out: str
    taps: str = "all"
    train_split: tuple[str, ...] = ("train",)
    val_split: tuple[str, ...] = ("val",)
    batch_size: int = 32
    order_seed: int = 0
    resident: str = "auto"
    device: str = "auto"
    amp: bool | None = None
    overwrite: bool = False

    RESIDENTS = ("auto", "device", "ram", "disk")
    FREE: ClassVar[tuple[str, ...]] = ("cache", "out", "resident", "device", "amp", "overwrite")

    def __post_init__(self) -> None:
        require(self, self.batch_size >= 1, "batch_size", "1 or more")
        require(self, self.order_seed >= 0, "order_seed", "0 or more")
        require(self, self.resident in self.RESIDENTS, "resident", ", ".join(self.RESIDENTS))
        require(self, len(self.train_split) >= 1, "train_split", "one split or more")
        both = set(self.train_split) & set(self.val_split)
        require(self, not both, "val_split", "splits that are not trained on as well")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(PassConfig):
    """Stage two: the members of one pass, and what belongs to the pass itself."""

    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, len(self.members) >= 1, "members", "one or more")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every default written out; what config.yaml holds."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`."""
        members = tuple(Member(**member) for member in values["members"])
        lists = {k: tuple(values[k]) for k in ("train_split", "val_split")}
        return cls(**{**values, **lists, "members": members})

    def progress_key(self) -> dict[str, Any]:
        """What decides the result: a resumed run must agree in this."""
        return {k: v for k, v in self.to_dict().items() if k not in self.FREE}


@dataclass(frozen=True, kw_only=True)
class SweepConfig(PassConfig):
    """What to search, how, and the pass that all rounds share (as in TrainConfig).

    `space` is a YAML file (see `pipeline.search.space`). `trials` counts proposals, those that
    cannot be trained too; None is the whole grid. `at_once` members train in one pass.
    `sampler_seed` decides the proposals. With `halving`, members that lag behind at a rung are
    stopped there.
    """

    space: str
    trials: int | None = None
    sampler: str = "tpe"
    sampler_seed: int = 0
    at_once: int = 16
    halving: bool = False

    SAMPLERS = ("tpe", "random", "grid")
    FREE = (*PassConfig.FREE, "space", "trials", "at_once")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, self.sampler in self.SAMPLERS, "sampler", ", ".join(self.SAMPLERS))
        require(
            self,
            self.trials is not None or self.sampler == "grid",
            "trials",
            "a number with any sampler but grid, which ends by itself",
        )
        require(self, self.trials is None or self.trials >= 1, "trials", "1 or more")
        require(self, self.sampler_seed >= 0, "sampler_seed", "0 or more")
        require(self, self.at_once >= 1, "at_once", "1 or more")
        require(self, len(self.val_split) >= 1, "val_split", "a split: a sweep ranks by validation")

    def pass_of(self, members: Sequence[Member], out: str | Path) -> TrainConfig:
        """The training pass of these members."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(PassConfig)}
        shared |= {"out": str(out), "overwrite": False}
        return TrainConfig(members=tuple(members), **shared)

    def deciding(self) -> dict[str, Any]:
        """What decides the proposals and their results, beside the space and the cache."""
        values = {k: v for k, v in vars(self).items() if k not in self.FREE}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def cross(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Lists multiply: {"lr": [1, 2], "seed": [0, 1]} → four dicts, the last axis fastest."""
    names = list(axes)
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*axes.values())]


def read_yaml(path: str | Path, known: Sequence[str]) -> dict[str, Any]:
    """Defaults from a file; SettingError names a key that is not in `known`, and the file."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise SettingError(f"--config {path}: {error}") from error
    if not isinstance(values, dict):
        raise SettingError(f"--config {path}: expected `name: value` lines")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise SettingError(
            f"--config {path}: unknown key {', '.join(unknown)}; known are {', '.join(known)}"
        )
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
