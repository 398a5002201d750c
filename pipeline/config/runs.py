"""What is asked of the commands that use finished runs."""

from __future__ import annotations

from dataclasses import dataclass

import pipeline.config.shared as shared
from pipeline.config.shared import require
from pipeline.setting import setting


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Which members of a run are scored, on which splits, from a cache or from `images`.

    `weights`, `batch_size` and `workers` are of the backbone that runs on `images`; `data_dir`,
    `input_key` and `target_key` say how these are opened, as `extract` takes them. Raises
    SettingError when it is made with an impossible value.
    """

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
    data_dir: str | None = shared.data_dir()
    input_key: str | None = shared.input_key()
    target_key: str | None = shared.target_key()
    weights: str | None = setting(None, path="any", help="Backbone weights, with IMAGES.")
    batch_size: int = setting(64, short="b", help="With IMAGES.")
    workers: int = setting(2, short="j", help="With IMAGES.")
    device: str = shared.device()
    amp: bool | None = shared.amp()

    def __post_init__(self) -> None:
        require(self, self.batch_size >= 1, "batch_size", "1 or more")
        require(self, self.workers >= 0, "workers", "0 or more")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Which `runs` a page is about, and which member it looks at closely; with `images` (opened as
    `extract` does) it shows mistakes."""

    runs: tuple[str, ...] = setting(argument=True)
    out: str | None = setting(None, path="file", help="The page.", unset="RUN/report.html")
    member: str | None = setting(
        None, help="Look closely at this one.", unset="the best on validation"
    )
    images: str | None = setting(
        None, help="The cache's images, as in `extract`: thumbnails of mistakes."
    )
    data_dir: str | None = shared.data_dir()
    input_key: str | None = shared.input_key()
    target_key: str | None = shared.target_key()
    device: str = shared.device()
    amp: bool | None = shared.amp()


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Which member of a run says what about which `photos`. Raises SettingError when it is made
    with an impossible value."""

    run: str = setting(argument=True)
    photos: tuple[str, ...] = setting(argument=True)
    top_k: int = setting(5)
    member: str | None = setting(None, help="Member id.", unset="the best on validation")
    task: str | None = setting(None, help="Whose best member, in a run of several tasks.")
    weights: str | None = setting(None, path="any", help="Backbone weights from a file.")
    batch_size: int = setting(64, short="b")
    workers: int = setting(0, short="j", help="Decoding processes.")
    device: str = shared.device()
    amp: bool | None = shared.amp()

    def __post_init__(self) -> None:
        require(self, self.top_k >= 1, "top_k", "1 or more")
        require(self, self.batch_size >= 1, "batch_size", "1 or more")
        require(self, self.workers >= 0, "workers", "0 or more")
