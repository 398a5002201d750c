"""What is asked of the commands that make caches, or change or check them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pipeline.config.shared as shared
from pipeline.config.shared import require, require_choices
from pipeline.setting import setting


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Stage one. `images` and what is said of a timm dataset string (`data_dir`, `input_key`,
    `target_key`, `dataset_download`) as `open_source` takes them; None means the backbone's own
    value. Raises SettingError when it is made with an impossible value."""

    images: str = setting(argument=True)
    model: str = setting(
        help="timm's name of a backbone (`sidecache models`), or hf-hub:OWNER/NAME."
    )
    out: str = setting(help="The cache: a folder F.zarr or a file F.h5.")
    weights: str | None = setting(None, path="any", help="Weights from a file, not the hub.")
    pretrained: bool = setting(True, help="Random weights, from --seed.")
    split: tuple[str, ...] | None = shared.split()
    data_dir: str | None = shared.data_dir()
    input_key: str | None = shared.input_key()
    target_key: str | None = shared.target_key()
    dataset_download: bool = setting(False, help="Let torch/… fetch what is not there.")
    taps: str = shared.taps()
    gather: str = shared.gather()
    gather_k: int | None = shared.gather_k()
    gather_pooled: bool = shared.gather_pooled()
    gather_groups: int = shared.gather_groups()
    dtype: str = setting(
        "float16", choices=shared.DTYPES, help="Storage type; int8 has one scale a token."
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
    device: str = shared.device()
    amp: bool | None = shared.amp()
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
class CopyConfig:
    """A smaller cache from a cache. `dtype` None keeps the storage type, `split` None all rows;
    `gather` as in ExtractConfig."""

    src: str = setting(argument=True)
    dst: str = setting(argument=True)
    taps: str = shared.taps()
    gather: str = shared.gather()
    gather_k: int | None = shared.gather_k()
    gather_pooled: bool = shared.gather_pooled()
    gather_groups: int = shared.gather_groups()
    dtype: str | None = setting(None, choices=shared.DTYPES, help="Storage type.", unset="SRC's")
    split: tuple[str, ...] | None = shared.split()
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
    data_dir: str | None = shared.data_dir()
    input_key: str | None = shared.input_key()
    target_key: str | None = shared.target_key()

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
    device: str = shared.device()
    data_dir: str | None = shared.data_dir()
    input_key: str | None = shared.input_key()
    target_key: str | None = shared.target_key()
