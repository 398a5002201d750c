"""What is asked of the commands that train: members, and the pass that they share."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pipeline.config.shared as shared
from pipeline.config.shared import require, require_choices
from pipeline.setting import setting


class Question(NamedTuple):
    """What a member learns: a target by name, and which fold of the rows it never sees."""

    task: str
    fold: int | None = None


@dataclass(frozen=True, kw_only=True)
class Member:
    """One side network to train: its method, the settings that shape it, and how it learns.

    `epochs` includes `warmup_epochs`, by default 3 or what `fitting_warmup` leaves of them.
    `settings` are the method's own (rank, gap, pool, …). `task` names a target of the cache; "" is
    its first. With a `fold` of the cache's, its rows are held out and those of the others learned
    from, whatever their splits.
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
    fold: int | None = setting(None, help="Folds (`label --folds`) to hold out, each in turn.")

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
        require(self, self.fold is None or self.fold >= 0, "fold", "0 or more")

    @property
    def question(self) -> Question:
        """What it learns."""
        return Question(self.task, self.fold)

    @property
    def all_settings(self) -> dict[str, Any]:
        """Those of its shape and of its learning in one flat dict, the method left out, and the
        fold where there is none."""
        learning = {k: v for k, v in vars(self).items() if k not in ("method", "settings")}
        if self.fold is None:
            del learning["fold"]
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
    device: str = shared.device()
    amp: bool | None = shared.amp()
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
