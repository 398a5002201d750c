"""Flags: the kinds of values that they take, and the groups that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


class CommaList(click.ParamType):
    """`1e-3,3e-3` → [0.001, 0.003]. Lists of several flags multiply."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.name = f"{ {int: 'int', float: 'float', str: 'text'}[kind] },…"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[Any]:
        parts = value if isinstance(value, list | tuple) else str(value).split(",")
        try:
            return [self.kind(str(part).strip()) for part in parts]
        except ValueError:
            self.fail(f"{value!r}: expected {self.name.removesuffix(',…')}, or several with commas")


class Words(click.ParamType):
    """A list of values that have commas of their own: `1,2,3 every:2` → two values."""

    name = "text …"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return list(value) if isinstance(value, list | tuple) else str(value).split()


class Names(CommaList):
    """`train,val` → ("train", "val"); `none` → ()."""

    def __init__(self) -> None:
        super().__init__(str)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        names = tuple(super().convert(value, param, ctx))
        return () if names == ("none",) else names


class ImageSize(click.ParamType):
    """`224` or `224x196` (height x width) → (224, 196)."""

    name = "N|HxW"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        parts = value if isinstance(value, list | tuple) else str(value).lower().split("x")
        if len(parts) not in (1, 2) or not all(str(part).isdigit() for part in parts):
            self.fail(f"{value!r}: expected one side, or height x width, such as 224 or 224x196")
        sides = [int(part) for part in parts]
        return (sides[0], sides[-1])


class Triple(click.ParamType):
    """`0.5` or `0.485,0.456,0.406` → three floats."""

    name = "X|R,G,B"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        try:
            parts = [float(part) for part in str(value).split(",")]
        except ValueError:
            parts = []
        if len(parts) not in (1, 3):
            self.fail(f"{value!r}: expected one number, or three with commas")
        return tuple(parts * 3 if len(parts) == 1 else parts)


STORAGE_TYPES = ["float16", "bfloat16", "float32", "int8"]


def gather_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Flags of the commands that can store sums over taps."""
    function = click.option(
        "--gather-groups", default=1, show_default=True, help="That many sums over runs of taps."
    )(function)
    function = click.option(
        "--gather-pooled", is_flag=True, help="Keep zK's pooled tokens too (miet --head last)."
    )(function)
    function = click.option(
        "--gather-k", type=int, help="Sum z0 … zK.  [default: the deepest tap]"
    )(function)
    return click.option(
        "--gather",
        type=click.Choice(["none", "sum", "normsum"]),
        default="none",
        show_default=True,
        help="Store the sum of the taps alone (MIET); normsum normalises each first.",
    )(function)


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(
        function
    )


def dataset_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Flags of every command that opens images: what timm asks of a dataset string."""
    options = (
        click.option("--data-dir", help="Where a timm dataset string finds its files."),
        click.option("--input-key", help="Its column of images.  [default: timm's, mostly image]"),
        click.option("--target-key", help="Its column of labels.  [default: timm's, mostly label]"),
    )
    for option in reversed(options):
        function = option(function)
    return function


def compute_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Flags of every command that computes with torch."""
    function = click.option(
        "--amp/--no-amp",
        default=None,
        help="bfloat16 products, or float32 throughout.  [default: what the run began in, "
        "or what the hardware does fast]",
    )(function)
    return click.option(
        "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
    )(function)


def pass_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Flags of a training pass: what its members share, and what is done with the winner."""
    options = (
        click.option(
            "--taps", default="all", show_default=True, help="Use only these of the cache's."
        ),
        click.option("--train-split", type=Names(), default="train", show_default=True),
        click.option(
            "--val-split", type=Names(), default="val", show_default=True, help="Or none."
        ),
        click.option("-b", "--batch-size", default=32, show_default=True, help="Of the pass."),
        click.option("--order-seed", default=0, show_default=True, help="Order of batches."),
        click.option(
            "--resident",
            type=click.Choice(["auto", "device", "ram", "disk"]),
            default="auto",
            show_default=True,
            help="Where the features live.",
        ),
        compute_options,
        click.option(
            "--refit",
            type=CommaList(int),
            help="Then train the winner on train + val with these seeds, into OUT/refit.",
        ),
        click.option("--overwrite", is_flag=True, help="Replace another run in --out."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def _load_config(ctx: click.Context, _param: click.Parameter, path: str | None) -> None:
    if path is None:
        return
    from pipeline.config import read_yaml
    from pipeline.errors import SettingError

    known = [p.name for p in ctx.command.params if p.name not in ("config", "as_json")]
    try:
        values = read_yaml(path, [str(name) for name in known])
    except SettingError as error:
        raise click.UsageError(str(error)) from None
    ctx.default_map = {**(ctx.default_map or {}), **values}


config_option = click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False),
    is_eager=True,
    expose_value=False,
    callback=_load_config,
    help="YAML file of defaults (flag: value); flags on the command line win.",
)
