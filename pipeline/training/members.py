"""Members: which ones lists of settings make, and what decides nothing for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.config import Member, cross, fitting_warmup
from pipeline.errors import SettingError
from pipeline.side import ALIASES, METHODS
from pipeline.side.settings import Settings

LEARNING = frozenset(Member.__dataclass_fields__) - {"method", "settings"}  # every method's


def make_members(methods: Sequence[str], axes: Mapping[str, Sequence[Any]]) -> tuple[Member, ...]:
    """Every method with every combination of the lists in `axes`; a method's recipe fills the rest,
    its warm-up no longer than `fitting_warmup` lets it be.

    An axis that shapes networks applies to the methods that have such a setting. What decides
    nothing for a member stays at its default there, and members that are then alike are one. Raises
    SettingError for an unknown method, a value listed twice, and one that decides nothing at all.
    """
    names = [ALIASES.get(name, name) for name in methods]
    for axis, values in {"method": names, **axes}.items():
        if len(set(values)) < len(values):
            listed = ", ".join(map(str, values))
            raise SettingError(f"{axis}: expected every value once, came {listed}")
    members: dict[str, Member] = {}
    idle: dict[tuple[str, Any], str] = {}
    acting: set[tuple[str, Any]] = set()
    for method in names:
        if method not in METHODS:
            raise SettingError(f"method {method!r}: expected {', '.join(METHODS)}")
        known = LEARNING | set(METHODS[method].settings_class.__dataclass_fields__)
        for chosen in cross({axis: values for axis, values in axes.items() if axis in known}):
            member, reasons = _plain(_with_recipe(method, chosen))
            members.setdefault(repr(member), member)
            idle |= {(axis, chosen[axis]): why for axis, why in reasons.items() if axis in chosen}
            acting |= {(axis, value) for axis, value in chosen.items() if axis not in reasons}
    for axis, values in axes.items():
        for value in values:
            if (axis, value) in idle.keys() - acting:
                why = idle[axis, value]
                raise SettingError(f"{axis} = {value}: decides nothing, as {why}; leave it out")
            if (axis, value) not in acting:
                raise SettingError(f"{axis}: no such setting in {', '.join(methods)}")
    return tuple(members.values())


def make_member(method: str, chosen: Mapping[str, Any]) -> Member:
    """One of `make_members`, of settings that the method has; none is refused for being idle."""
    return _plain(_with_recipe(method, chosen))[0]


def _with_recipe(method: str, chosen: Mapping[str, Any]) -> Member:
    values = {**METHODS[method].settings_class.recipe, **chosen}
    if "warmup_epochs" not in chosen:
        usual = values.get("warmup_epochs", fitting_warmup(Member.epochs))
        values["warmup_epochs"] = fitting_warmup(values.get("epochs", Member.epochs), usual)
    settings = {name: values.pop(name) for name in list(values) if name not in LEARNING}
    return Member(method=method, settings=settings, **values)


def _plain(member: Member) -> tuple[Member, dict[str, str]]:
    """The member with what decides nothing for it at its default; what that changes, and why."""
    settings = method_settings(member)
    reasons = settings.idle()
    if not settings.drops:
        reasons["drop_path"] = f"{member.method} has no residual branch to drop"
    if not member.warmup_epochs:
        reasons["warmup_lr"] = "there is no warm-up"
    defaults = {n: getattr(Member if n in LEARNING else type(settings), n) for n in reasons}
    values = {**vars(settings), **vars(member)}
    changed = {name: why for name, why in reasons.items() if values[name] != defaults[name]}
    kept = {name: value for name, value in member.settings.items() if name not in reasons}
    learning = {name: defaults[name] for name in reasons if name in LEARNING}
    return replace(member, settings=kept, **learning), changed


def method_settings(member: Member) -> Settings:
    """The settings object of a member's method. Raises SettingError naming what it knows."""
    if member.method not in METHODS:
        raise SettingError(f"method {member.method!r}: expected {', '.join(METHODS)}")
    settings_class = METHODS[member.method].settings_class
    known = list(settings_class.__dataclass_fields__)
    unknown = sorted(set(member.settings) - set(known))
    if unknown:
        raise SettingError(
            f"{member.method} has no setting {', '.join(unknown)}; it has {', '.join(known)}"
        )
    try:
        return settings_class(**member.settings)
    except ValueError as error:
        raise SettingError(f"{member.method}: {error}") from error
