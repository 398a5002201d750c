"""Flags, made from the settings of configurations and of every method; the values that they take.

What a flag is called, its default, its choices and its help are in the setting (`pipeline.setting`)
that it sets, and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from pipeline.config import Member
from pipeline.setting import Setting, settings_of
from pipeline.side import METHODS


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


KINDS = {
    tuple[str, ...]: Names(),
    tuple[int, int]: ImageSize(),
    tuple[float, float, float]: Triple(),
}
PATHS = {
    "any": click.Path(),
    "file": click.Path(dir_okay=False),
    "there": click.Path(exists=True, dir_okay=False),
}


# --- from settings ----------------------------------------------------------------------------


def flags(config: type, more: Iterable[click.Parameter] = ()) -> list[click.Parameter]:
    """The arguments of a configuration and its flags: those that must be given, then `more`, its
    own, and what it has in common with others."""
    own = inspect.get_annotations(config)
    settings = sorted(settings_of(config).values(), key=lambda one: one.name not in own)
    found = [*more, *map(_parameter, settings)]
    return sorted(found, key=lambda p: (isinstance(p, click.Option), not p.required))


def _parameter(about: Setting) -> click.Parameter:
    if about.argument:
        several = about.type == tuple[str, ...]
        return click.Argument([about.name], required=about.required, nargs=-1 if several else 1)
    names = [about.name, about.flag, *([f"-{about.short}"] if about.short else [])]
    told: dict[str, Any] = {"help": _with_default(about.help, about.unset)}
    if about.type is bool:
        if about.default is False:
            return click.Option(names, is_flag=True, **told)
        names[1] = f"{about.flag}/{about.off}"
        return click.Option(names, default=about.default, **told)
    kind = KINDS.get(about.type, about.type)
    if about.choices:
        kind = click.Choice(about.choices)
    if about.path:
        kind = PATHS[about.path]
    if about.default is not None and not about.required:
        told |= {"default": about.default, "show_default": not about.unset}
    return click.Option(names, type=kind, required=about.required, **told)


def member_flags() -> list[click.Option]:
    """What makes members: each flag takes a list, and the lists multiply."""
    told = f"{', '.join(METHODS)}."
    found = [click.Option(["--method"], type=CommaList(str), required=True, help=told)]
    methods = {method: METHODS.settings(method) for method in METHODS}
    for about in settings_of(Member).values():
        usual = {m: str(of.recipe.get(about.name, _default(about))) for m, of in methods.items()}
        found.append(_list_option(about, about.help, usual))
    shaping: dict[str, dict[str, Setting]] = {}  # setting → method → what it says of it
    for method, settings in methods.items():
        for name, about in settings_of(settings).items():
            shaping.setdefault(name, {})[method] = about
    for of_methods in shaping.values():
        groups = _grouped({method: about.help for method, about in of_methods.items()})
        told = "; ".join(f"{methods}: {text}" for text, methods in groups.items())
        usual = {method: _default(about) for method, about in of_methods.items()}
        found.append(_list_option(next(iter(of_methods.values())), f"{told}.", usual))
    return found


def _list_option(about: Setting, told: str, usual: Mapping[str, str]) -> click.Option:
    """`usual` is the default of each method: the first one's stands without a name."""
    (first, _), *others = _grouped(usual).items()
    default = "; ".join([first, *(f"{methods}: {text}" for text, methods in others)])
    kind = Words() if about.commas else CommaList(about.type)
    return click.Option([about.flag], type=kind, help=_with_default(told, default))


def _grouped(texts: Mapping[str, str]) -> dict[str, str]:
    """Each text with the names of those that have it."""
    groups: dict[str, list[str]] = {}
    for name, text in texts.items():
        groups.setdefault(text, []).append(name)
    return {text: ", ".join(names) for text, names in groups.items()}


def _default(about: Setting) -> str:
    return about.unset or ("" if about.default is None else str(about.default))


def _with_default(told: str, default: str) -> str:
    return f"{told}  [default: {default}]" if default else told


# --- of several commands ----------------------------------------------------------------------

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
refit_option = click.option(
    "--refit",
    type=CommaList(int),
    help="Then train the winner on train + val with these seeds, into OUT/refit.",
)


def _load_config(ctx: click.Context, _param: click.Parameter, path: str | None) -> None:
    if path is None:
        return
    known = [str(p.name) for p in ctx.command.params if p.name not in ("config", "as_json")]
    ctx.default_map = {**(ctx.default_map or {}), **_read_yaml(path, known)}


def _read_yaml(path: str, known: Sequence[str]) -> dict[str, Any]:
    """Defaults from a file; UsageError names a key that is not in `known`, and the file."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise click.UsageError(f"--config {path}: {error}") from None
    if not isinstance(values, dict):
        raise click.UsageError(f"--config {path}: expected `name: value` lines")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise click.UsageError(
            f"--config {path}: unknown key {', '.join(unknown)}; known are {', '.join(known)}"
        )
    return values


config_option = click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False),
    is_eager=True,
    expose_value=False,
    callback=_load_config,
    help="YAML file of defaults (flag: value); flags on the command line win.",
)
