"""A search space: which values each setting may take, from a YAML file; and members drawn from it.

    method: [last, linear]                     # one, or a list
    lr: {low: 1e-4, high: 1e-2, log: true}     # any number between, both ends included
    rank: [8, 16, 32]                          # one of these
    depth: {low: 1, high: 3}                   # whole numbers, every `step`
    epochs: 30                                 # fixed

What the file does not name comes from the method's recipe. Nothing here knows Optuna: a `Proposer`
is whatever suggests values, one name at a time. `method` is asked first, then the settings that
this method has, so that a name stands for one thing whatever the method.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import yaml

from pipeline.config import Member, cross
from pipeline.errors import SettingError
from pipeline.side import ALIASES, METHODS
from pipeline.training.members import make_member

_RANGE_KEYS = ("low", "high", "log", "step")
_NOUNS = {float: "a number", int: "a whole number", str: "text", type(None): "null"}


class Proposer(Protocol):
    """Suggests a value for a name; the signatures are `optuna.trial.Trial`'s."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from `low` to `high`, both included; `step` None: any number, not whole ones."""

    low: float
    high: float
    log: bool = False
    step: int | None = None

    @property
    def values(self) -> tuple[int, ...] | None:
        """All of them, if they can be counted."""
        if self.step is None:
            return None
        return tuple(range(int(self.low), int(self.high) + 1, self.step))

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if v not in (None, False)}


class Chosen:
    """Proposes what was chosen before; what has one value was not, and is the lowest."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.values[name]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float:
        return float(self.values.get(name, low))

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        return int(self.values.get(name, low))


Axis = tuple[Any, ...] | Range


@dataclass(frozen=True)
class Space:
    """`axes`: for each setting but the method a `Range` or the values to choose from."""

    path: str
    methods: tuple[str, ...]
    axes: Mapping[str, Axis]

    def axes_of(self, method: str) -> dict[str, Axis]:
        """The part that this method has."""
        known = _hints(method)
        return {name: axis for name, axis in self.axes.items() if name in known}

    def propose(self, proposer: Proposer) -> Member:
        """One member. SettingError if the values proposed do not go together."""
        method = _suggest(proposer, "method", self.methods)
        chosen = {n: _suggest(proposer, n, a) for n, a in self.axes_of(method).items()}
        return make_member(method, chosen)

    def grid(self) -> list[dict[str, Any]]:
        """Every combination, by the names that `propose` asks for; the last setting fastest.

        Of those that make one and the same member, the first alone. SettingError names a setting
        that has no end of values.
        """
        combinations: list[dict[str, Any]] = []
        for method in self.methods:
            lists: dict[str, tuple[Any, ...]] = {}
            for name, axis in {"method": self.methods, **self.axes_of(method)}.items():
                values = axis.values if isinstance(axis, Range) else axis
                if values is None:
                    _refuse(
                        f"{self.path}: {name}",
                        "a list of values, as a grid tries every combination",
                        f"a range, {self.to_dict()[name]!r}",
                        "; or use another sampler",
                    )
                if len(values) > 1:
                    lists[name] = (method,) if name == "method" else values
            combinations += cross(lists)
        kept: dict[str, dict[str, Any]] = {}
        for combination in combinations:
            kept.setdefault(self._made_of(combination), combination)
        return list(kept.values())

    def _made_of(self, combination: Mapping[str, Any]) -> str:
        """What tells the member of a combination from others; the combination, if there is none."""
        try:
            return repr(self.propose(Chosen(combination)))
        except SettingError:
            return repr(combination)

    def most_epochs(self) -> int:
        """Of the longest member that may be proposed."""
        axis = self.axes.get("epochs")
        if axis is None:
            recipes = [METHODS[name].settings_class.recipe for name in self.methods]
            return max(recipe.get("epochs", Member.epochs) for recipe in recipes)
        return int(axis.high) if isinstance(axis, Range) else max(axis)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which `read_space` reads back."""
        plain = {n: a.to_dict() if isinstance(a, Range) else list(a) for n, a in self.axes.items()}
        return {"method": list(self.methods), **plain}


def read_space(path: str | Path) -> Space:
    """The space in a YAML file. SettingError names file, setting, what was expected, what came."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        _refuse(str(path), "lines `setting: value`, one of them `method`", repr(values))
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    if "method" not in values:
        _refuse(f"{path}: method", f"one or a list of {', '.join(METHODS)}", "nothing")
    methods = _methods(f"{path}: method", values.pop("method"))
    axes = {}
    for name, value in values.items():
        hints = [hints[name] for hints in map(_hints, methods) if name in hints]
        if not hints:
            known = dict.fromkeys(name for method in methods for name in _hints(method))
            _refuse(f"{path}: {name}", f"a setting of {', '.join(methods)}", "none of theirs",
                    f"; they have {', '.join(known)}")  # fmt: skip
        kinds = set.intersection(*(set(typing.get_args(hint) or (hint,)) for hint in hints))
        axes[name] = _axis(f"{path}: {name}", value, kinds)
    return Space(str(path), methods, axes)


def _suggest(proposer: Proposer, name: str, axis: Axis) -> Any:
    if isinstance(axis, tuple):
        return axis[0] if len(axis) == 1 else proposer.suggest_categorical(name, axis)
    if axis.step is None:
        return proposer.suggest_float(name, axis.low, axis.high, log=axis.log)
    low, high = int(axis.low), int(axis.high)
    return proposer.suggest_int(name, low, high, step=axis.step, log=axis.log)


def _hints(method: str) -> dict[str, Any]:
    """Type of every setting that a member of this method has, those of its learning first."""
    hints: dict[str, Any] = {}
    shaping = METHODS[method].settings_class
    for owner in (Member, shaping):
        types = typing.get_type_hints(owner)
        hints |= {field.name: types[field.name] for field in dataclasses.fields(owner)}
    others = {"method", "settings"} if shaping.drops else {"method", "settings", "drop_path"}
    return {name: hint for name, hint in hints.items() if name not in others}


def _methods(where: str, value: Any) -> tuple[str, ...]:
    names = value if isinstance(value, list) else [value]
    methods = tuple(ALIASES.get(name, name) if isinstance(name, str) else name for name in names)
    for name in methods:
        if name not in list(METHODS):
            _refuse(where, f"one or a list of {', '.join(METHODS)}", repr(name))
    _check_list(where, methods)
    return methods


def _axis(where: str, value: Any, kinds: set[type]) -> Axis:
    if isinstance(value, dict):
        return _range(where, value, kinds)
    values = value if isinstance(value, list) else [value]
    axis = tuple(_value(where, one, kinds) for one in values)
    _check_list(where, axis)
    return axis


def _check_list(where: str, values: tuple[Any, ...]) -> None:
    if not values:
        _refuse(where, "one value or more", "an empty list")
    if len(set(values)) < len(values):
        _refuse(where, "every value once", repr(list(values)))


def _range(where: str, value: dict[Any, Any], kinds: set[type]) -> Range:
    numbers = kinds - {type(None)}
    if str in numbers:
        _refuse(where, "text, or a list of texts", repr(value))
    unknown = [key for key in value if key not in _RANGE_KEYS]
    lacking = [key for key in ("low", "high") if key not in value]
    if unknown or lacking:
        _refuse(where, "{low: …, high: …} and, if wanted, log: true or step: N", repr(value))
    low, high = (_value(f"{where}.{key}", value[key], numbers) for key in ("low", "high"))
    log = value.get("log", False)
    if not isinstance(log, bool):
        _refuse(f"{where}.log", "true or false", repr(log))
    if low > high:
        _refuse(where, "low not above high", repr(value))
    if log and low <= 0:
        _refuse(f"{where}.low", "above 0, as the range is logarithmic", repr(low))
    if float in numbers:
        if "step" in value:
            _refuse(where, "no step between numbers that are not whole (give a list)", repr(value))
        return Range(low=low, high=high, log=log)
    step = _value(f"{where}.step", value.get("step", 1), {int})
    if step < 1 or (log and step > 1):
        _refuse(f"{where}.step", "1" if log else "1 or more", repr(step))
    return Range(low=low, high=low + (high - low) // step * step, log=log, step=step)


def _value(where: str, value: Any, kinds: set[type]) -> Any:
    """`value` as one of `kinds`; YAML reads 1e-3 as text, which is a number where one is meant."""
    if value is None and type(None) in kinds:
        return None
    if float in kinds and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    elif type(value) in kinds:
        return value
    expected = " or ".join(noun for kind, noun in _NOUNS.items() if kind in kinds)
    return _refuse(where, expected, repr(value))


def _refuse(where: str, expected: str, came: str, then: str = "") -> NoReturn:
    raise SettingError(f"{where}: expected {expected}; came {came}{then}")
