"""Settings of a side network: what decides its shape, and what is said of it. Loads no torch.

Each method's own stand in its file, above its network; here is what they are made of. A flag of
`train`, a line of its help and an axis of a search space are made from every one of them.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipeline.setting import setting, settings_of, wrong_choices


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that decide a network's shape; members that share them train together.

    A setting's help is a phrase without a full stop: the names of the methods that have it come in
    front. Raises ValueError on an impossible value when it is made.
    """

    POOLS: ClassVar[tuple[str, ...]] = ("mean", "cls")

    recipe: ClassVar[dict[str, Any]] = {}  # learning settings that suit the method; ours
    drops: ClassVar[bool] = False  # whether the network has residual branches (`drop_sites`)

    def __post_init__(self) -> None:
        for name, expected in wrong_choices(self):
            self.require(False, name, expected)

    def idle(self) -> dict[str, str]:
        """Settings that decide nothing beside the others, and why."""
        return {}

    def require(self, condition: bool, name: str, expected: str) -> None:
        """Refuse a value: `name` is the setting, `expected` what would be right."""
        if not condition:
            raise ValueError(f"{name} = {getattr(self, name)!r}: expected {expected}")

    @classmethod
    def reads(cls) -> list[str]:
        """Names of the settings that decide what is read of a cache."""
        return [name for name, about in settings_of(cls).items() if about.reads]


@dataclass(frozen=True, kw_only=True)
class LSASettings(Settings):
    """What every network of low-rank attention modules has: `rank` R, `heads`, `pool`."""

    rank: int = setting(16, help="rank R")
    heads: int = setting(1, help="attention heads")
    pool: str = setting("mean", choices=Settings.POOLS, help="mean (patch tokens) or cls")

    drops = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.rank >= 1, "rank", "1 or more")
        self.require(
            self.heads >= 1 and self.rank % self.heads == 0, "heads", f"a divisor of {self.rank}"
        )


def settings_in(file: Path, name: str) -> type[Settings]:
    """The settings class `name` of a method's file, made from its source alone.

    Running the file loads torch, which takes seconds, and help must answer at once. What stands in
    the class outside of its functions may therefore use what this module has, and nothing else. For
    reading only: a network's own class is another object.
    """
    module = ast.parse(file.read_text(encoding="utf-8"))
    module.body = [n for n in module.body if isinstance(n, ast.ClassDef) and n.name == name]
    made = dict(globals())
    try:
        exec(compile(module, str(file), "exec"), made)
    except NameError as error:
        raise NameError(f"{file}: {name} may use what settings.py has, alone: {error}") from None
    return made[name]
