"""A setting: a field of a configuration, and what is said of it beside its value.

    rank: int = setting(16, help="R")

Flags, their help, the reference in docs/ and the command line that makes a configuration again all
come from this; a default stands nowhere else. Knows neither a terminal nor a network.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any

_ABOUT = "setting"  # where a field's metadata holds it


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is known of the field `name`.

    `type` leaves None out: int, float, str, bool, or a tuple of them. `default` is MISSING where a
    value must be given; `unset` says in words what None, or nothing, comes to. `choices` are all
    values that can be. `flag` is made of the name unless another is said; `short` is a second flag
    of one letter. `argument`: its place on a command line says what it is, no flag does. `path` is
    what a text must be the path of: "any", a "file" (there or not), a file that is "there".
    `commas`: a value has commas of its own, spaces tell several apart. `reads`: it decides what is
    read of a cache.
    """

    name: str = ""
    type: Any = str
    default: Any
    help: str = ""
    flag: str = ""
    unset: str = ""
    choices: tuple[str, ...] = ()
    argument: bool = False
    short: str = ""
    path: str = ""
    commas: bool = False
    reads: bool = False

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def off(self) -> str:
        """The flag that says no, where that is not the absence of one."""
        return self.flag.replace("--", "--" + "no-", 1)

    def words(self, value: Any) -> list[str]:
        """The part of a command line that says `value`; none where that is the absence of one."""
        if value is None or value == "":
            return []
        if self.type is bool:
            absent = [] if self.default is False else [self.off]
            return [self.flag] if value else absent
        return [self.flag, text_of(value)]


def setting(default: Any = MISSING, **about: Any) -> Any:
    """A dataclass field with what `Setting` holds of it; the class says its name and type."""
    return field(default=default, metadata={_ABOUT: Setting(default=default, **about)})


def settings_of(config: type) -> dict[str, Setting]:
    """The settings among a dataclass's fields, by name."""
    hints = typing.get_type_hints(config)
    found: dict[str, Setting] = {}
    for f in dataclasses.fields(config):
        if about := f.metadata.get(_ABOUT):
            flag = about.flag or f"--{f.name.replace('_', '-')}"
            kind = _type(hints[f.name])
            found[f.name] = dataclasses.replace(about, name=f.name, type=kind, flag=flag)
    return found


def wrong_choices(config: Any) -> Iterator[tuple[str, str]]:
    """Names of the fields whose value is none of their choices, and what is expected."""
    for f in dataclasses.fields(config):
        about = f.metadata.get(_ABOUT)
        if about is None or not about.choices:
            continue
        if getattr(config, f.name) not in (about.default, *about.choices):
            yield f.name, (" or " if len(about.choices) == 2 else ", ").join(about.choices)


def varying(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the settings that are not the same for all."""
    names = dict.fromkeys(name for each in settings for name in each)
    return [n for n in names if len({str(each.get(n)) for each in settings}) > 1]


def text_of(value: Any) -> str:
    """A value as a command line has it: `train,val`, `none` for no names, `224x196` for sides."""
    if not isinstance(value, tuple):
        return str(value)
    sides = value and all(isinstance(part, int) for part in value)
    return ("x" if sides else ",").join(map(str, value)) or "none"


def _type(hint: Any) -> Any:
    """A field's, None left out."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    return hint
