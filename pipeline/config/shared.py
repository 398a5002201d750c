"""What configurations of several commands have in common: settings, and how a value is refused."""

from __future__ import annotations

from functools import partial

from pipeline.errors import SettingError
from pipeline.setting import setting, wrong_choices

DTYPES = ("float16", "bfloat16", "float32", "int8")

taps = partial(setting, "all", help="all, 0,3,6, every:N or last:N.")
gather = partial(
    setting,
    "none",
    choices=("none", "sum", "normsum"),  # normsum: each map normalised before it is added
    help="Store the sum of the taps alone (MIET); normsum normalises each first.",
)
gather_k = partial(setting, None, help="Sum z0 … zK.", unset="the deepest tap")
gather_pooled = partial(setting, False, help="Keep zK's pooled tokens too (miet --head last).")
gather_groups = partial(setting, 1, help="That many sums over runs of taps.")
split = partial(setting, None, help="Only these splits, e.g. train,val.")
data_dir = partial(setting, None, help="Where a timm dataset string finds its files.")
input_key = partial(setting, None, help="Its column of images.", unset="timm's, mostly image")
target_key = partial(setting, None, help="Its column of labels.", unset="timm's, mostly label")
device = partial(setting, "auto", help="auto, cpu, cuda or cuda:N.")
amp = partial(
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
