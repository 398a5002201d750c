"""What a command was asked to do: one frozen, validated object each; the only source of defaults.

Flags, their help and docs/cli.md are made from these (`setting`), `train` writes its own, resolved,
into the run directory. A --config file knows exactly these field names.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from pipeline.errors import SettingError
from pipeline.setting import setting, wrong_choices

DTYPES = ("float16", "bfloat16", "float32", "int8")

# what several commands have
_taps = partial(setting, "all", help="all, 0,3,6, every:N or last:N.")
_gather = partial(
    setting,
    "none",
    choices=("none", "sum", "normsum"),  # normsum: each map normalised before it is added
    help="Store the sum of the taps alone (MIET); normsum normalises each first.",
)
_gather_k = partial(setting, None, help="Sum z0 … zK.", unset="the deepest tap")
_gather_pooled = partial(setting, False, help="Keep zK's pooled tokens too (miet --head last).")
_gather_groups = partial(setting, 1, help="That many sums over runs of taps.")
_split = partial(setting, None, help="Only these splits, e.g. train,val.")
_data_dir = partial(setting, None, help="Where a timm dataset string finds its files.")
_input_key = partial(setting, None, help="Its column of images.", unset="timm's, mostly image")
_target_key = partial(setting, None, help="Its column of labels.", unset="timm's, mostly label")
_device = partial(setting, "auto", help="auto, cpu, cuda or cuda:N.")
_amp = partial(
    setting,
    None,
    help="bfloat16 products, or float32 throughout.",
    unset="what the run began in, or what the hardware does fast",
)


def require(config: object, condition: bool, name: str, expected: str) -> None:
    """Refuse a field of `config` with SettingError, saying what was `expected`."""
    if not condition:
        raise SettingError(f"{name} = {getattr(config, name)!r}: expected {expected}")


def require_choices(config: object) -> None:
    """Refuse a field whose value is none of its choices, as `require` does."""
    for name, expected in wrong_choices(config):
        require(config, False, name, expected)


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Stage one. `images` and what is said of a timm dataset string (`data_dir`, `input_key`,
    `target_key`, `dataset_download`) as `open_source` takes them; None means the backbone's own
    value. Raises SettingError when it is made with an impossible value."""

    images: str = setting(argument=True)
    model: str = setting(help="timm's name of a backbone (`sidecache models`).")
    out: str = setting(help="The cache: a folder F.zarr or a file F.h5.")
    weights: str | None = setting(None, path="any", help="Weights from a file, not the hub.")
    pretrained: bool = setting(True, help="Random weights, from --seed.")
    split: tuple[str, ...] | None = _split()
    data_dir: str | None = _data_dir()
    input_key: str | None = _input_key()
    target_key: str | None = _target_key()
    dataset_download: bool = setting(False, help="Let torch/… fetch what is not there.")
    taps: str = _taps()
    gather: str = _gather()
    gather_k: int | None = _gather_k()
    gather_pooled: bool = _gather_pooled()
    gather_groups: int = _gather_groups()
    dtype: str = setting(
        "float16", choices=DTYPES, help="Storage type; int8 has one scale a token."
    )
    ladder_init: str | None = setting(
        None,
        choices=("magnitude", "fisher"),
        help="Keep pruned backbone weights for LST to start from.",
    )
    reduction: int = setting(8, help="LST's r, with --ladder-init.")
    keep_layers: str = setting("all", help="LST's layers, with --ladder-init.")
    fisher_samples: int = setting(1024, help="Training images weighed by.")
    img_size: tuple[int, int] | None = setting(None, help="Input side.", unset="the model's own")
    crop_pct: float | None = setting(None, help="Share kept by the centre crop.")
    crop_mode: str | None = setting(None, choices=("center", "squash", "border"))
    interpolation: str | None = setting(None, help="bicubic, bilinear, …")
    mean: tuple[float, float, float] | None = setting(None, help="Normalisation mean.")
    std: tuple[float, float, float] | None = setting(None, help="Normalisation deviation.")
    batch_size: int = setting(64, short="b")
    workers: int = setting(2, short="j", help="Decoding processes.")
    device: str = _device()
    amp: bool | None = _amp()
    seed: int = setting(0, help="Of --no-pretrained's weights.")
    on_error: str = setting(
        "raise", choices=("raise", "skip"), help="What an unreadable image does."
    )
    update: bool = setting(
        False, help="Compute new and changed images alone; let go of those that vanished."
    )
    overwrite: bool = setting(False, help="Replace a cache of another identity.")

    PREPROCESSING = ("img_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")

    def __post_init__(self) -> None:
        require_choices(self)
        require(self, self.batch_size >= 1, "batch_size", "1 or more")
        require(self, self.workers >= 0, "workers", "0 or more")
        require(
            self,
            self.img_size is None or all(side >= 1 for side in self.img_size),
            "img_size",
            "one or two positive whole numbers",
        )
        require(
            self, self.crop_pct is None or 0 < self.crop_pct <= 1, "crop_pct", "above 0, at most 1"
        )
        _check_gather(self)
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
    what is there with other folds. `group` is a column of the list, or one that the cache has.
    Raises SettingError when it is made with an impossible value."""

    cache: str = setting(argument=True)
    source: str | None = setting(None, argument=True)
    add: bool = setting(False, help="Beside the targets that are there, not in their place.")
    folds: int = setting(0, help="Divide the rows into that many folds.")
    group: str | None = setting(None, help="A column whose equal cells stay in one fold.")
    stratify: bool = setting(False, help="Each fold gets its share of every class.")
    fold_split: tuple[str, ...] | None = setting(
        None, help="The splits that folds divide.", unset="all but test"
    )
    seed: int = setting(0, help="Of the folds.")
    data_dir: str | None = _data_dir()
    input_key: str | None = _input_key()
    target_key: str | None = _target_key()

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
class VerifyConfig:
    """A cache to be verified; with `repair`, the images from which damaged rows are computed again,
    and the backbone's `weights`, `pretrained` and `seed` as they were given to `extract`."""

    cache: str = setting(argument=True)
    repair: str | None = setting(
        None, help="The cache's images, as in `extract`: damaged rows are computed again."
    )
    weights: str | None = setting(None, path="any", help="Backbone weights from a file.")
    pretrained: bool = setting(True, help="Random weights, from --seed.")
    seed: int = setting(0, help="Of --no-pretrained's weights.")
    device: str = _device()
    data_dir: str | None = _data_dir()
    input_key: str | None = _input_key()
    target_key: str | None = _target_key()


@dataclass(frozen=True, kw_only=True)
class CopyConfig:
    """A smaller cache from a cache. `dtype` None keeps the storage type, `split` None all rows;
    `gather` as in ExtractConfig."""

    src: str = setting(argument=True)
    dst: str = setting(argument=True)
    taps: str = _taps()
    gather: str = _gather()
    gather_k: int | None = _gather_k()
    gather_pooled: bool = _gather_pooled()
    gather_groups: int = _gather_groups()
    dtype: str | None = setting(None, choices=DTYPES, help="Storage type.", unset="SRC's")
    split: tuple[str, ...] | None = _split()
    overwrite: bool = setting(False, help="Replace a cache of another identity.")

    def __post_init__(self) -> None:
        require_choices(self)
        same = Path(self.src).absolute() == Path(self.dst).absolute()
        require(self, not same, "dst", "a new location; src is the same place")
        _check_gather(self)


def _check_gather(config: ExtractConfig | CopyConfig) -> None:
    gathers = config.gather != "none"
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
    lr: float = setting(2e-3, help="Learning rate.")
    weight_decay: float = setting(0.05, help="Not on biases and norms.")
    epochs: int = setting(30, help="With the warm-up.")
    warmup_epochs: int = setting(None, help="The first of the epochs.", unset="3")  # set once made
    warmup_lr: float = setting(1e-7, help="Where the warm-up begins.")
    sched: str = setting("cosine", choices=("cosine", "constant"), help="cosine or constant.")
    drop_path: float = setting(0.0, help="Of each residual branch and image.")
    smoothing: float = setting(0.0, help="Label smoothing.")
    seed: int = setting(0, help="Initialisation and drop-path.")
    task: str = setting("", help="Targets to learn.", unset="the cache's first")

    def __post_init__(self) -> None:
        if self.warmup_epochs is None:
            object.__setattr__(self, "warmup_epochs", fitting_warmup(self.epochs))
        require_choices(self)
        require(self, self.lr > 0, "lr", "above 0")
        require(self, self.weight_decay >= 0, "weight_decay", "0 or more")
        require(self, self.epochs >= 1, "epochs", "1 or more")
        require(
            self,
            0 <= self.warmup_epochs < self.epochs or self.warmup_epochs == 0,
            "warmup_epochs",
            f"0 or more, fewer than the {self.epochs} epochs that include them",
        )
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

    cache: str = setting(argument=True)
    out: str = setting(help="The run directory to make, or to continue.")
    taps: str = setting("all", help="Use only these of the cache's.")
    train_split: tuple[str, ...] = setting(("train",))
    val_split: tuple[str, ...] = setting(("val",), help="Or none.")
    batch_size: int = setting(32, short="b", help="Of the pass.")
    order_seed: int = setting(0, help="Order of batches.")
    resident: str = setting(
        "auto", choices=("auto", "device", "ram", "disk"), help="Where the features live."
    )
    device: str = _device()
    amp: bool | None = _amp()
    overwrite: bool = setting(False, help="Replace another run in --out.")

    FREE: ClassVar[tuple[str, ...]] = ("cache", "out", "resident", "device", "amp", "overwrite")

    def __post_init__(self) -> None:
        require_choices(self)
        require(self, self.batch_size >= 1, "batch_size", "1 or more")
        require(self, self.order_seed >= 0, "order_seed", "0 or more")
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

    space: str = setting(
        path="there", help="YAML file: setting: value, list of values, or {low, high, log, step}."
    )
    trials: int | None = setting(None, help="Members to propose.", unset="all, with --sampler grid")
    sampler: str = setting(
        "tpe",
        choices=("tpe", "random", "grid"),
        help="tpe learns from earlier rounds; grid tries every combination.",
    )
    sampler_seed: int = setting(0, help="Same seed, same proposals.")
    at_once: int = setting(16, help="Members trained in one pass.")
    halving: bool = setting(False, help="Stop members early that lag behind others.")

    FREE = (*PassConfig.FREE, "space", "trials", "at_once")

    def __post_init__(self) -> None:
        super().__post_init__()
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


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Which members of a run are scored, on which splits, from a cache or from `images`."""

    run: str = setting(argument=True)
    images: str | None = setting(None, argument=True)
    members: tuple[str, ...] = setting(
        (),
        flag="--member",
        help="Member ids, or all.",
        unset="the best on validation; all of a refit",
    )
    task: str | None = setting(None, help="Of a run with several.", unset="the best member of each")
    cache: str | None = setting(None, help="Another cache than the run's own.")
    split: tuple[str, ...] = setting(("test",))
    data_dir: str | None = _data_dir()
    input_key: str | None = _input_key()
    target_key: str | None = _target_key()
    weights: str | None = setting(None, path="any", help="Backbone weights, with IMAGES.")
    batch_size: int = setting(64, short="b", help="With IMAGES.")
    workers: int = setting(2, short="j", help="With IMAGES.")
    device: str = _device()
    amp: bool | None = _amp()


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Which runs a page is about, and what it looks closely at."""

    runs: tuple[str, ...] = setting(argument=True)
    out: str | None = setting(None, path="file", help="The page.", unset="RUN/report.html")
    member: str | None = setting(
        None, help="Look closely at this one.", unset="the best on validation"
    )
    images: str | None = setting(
        None, help="The cache's images, as in `extract`: thumbnails of mistakes."
    )
    data_dir: str | None = _data_dir()
    input_key: str | None = _input_key()
    target_key: str | None = _target_key()
    device: str = _device()
    amp: bool | None = _amp()


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Which member of a run says what about which photographs."""

    run: str = setting(argument=True)
    photos: tuple[str, ...] = setting(argument=True)
    top_k: int = setting(5)
    member: str | None = setting(None, help="Member id.", unset="the best on validation")
    task: str | None = setting(None, help="Whose best member, in a run of several tasks.")
    weights: str | None = setting(None, path="any", help="Backbone weights from a file.")
    batch_size: int = setting(64, short="b")
    workers: int = setting(0, short="j", help="Decoding processes.")
    device: str = _device()
    amp: bool | None = _amp()


def cross(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Lists multiply: {"lr": [1, 2], "seed": [0, 1]} → four dicts, the last axis fastest."""
    names = list(axes)
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*axes.values())]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
