"""Taps: what their names mean. The only file that makes such names or takes them apart.

    z3             a tap: z0 are the tokens that enter block 1, zi those that leave block i
    y3             the same of another run of blocks, such as a decoder's; also `encoder.z3`
    z0..z12        the sum of a run of taps, made at extraction; ln(z0..z12) if each map was
                   normalised before it was added
    pool(z12)      the class token and the mean patch token of z12

Caches, operands and saved weights hold names. A cache may hold others than these, of which nothing
is known here. What this file does not know: torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

SERIES = r"(?:[a-z]+\.)?[a-z]"
NAME = re.compile(
    rf"(?P<series>{SERIES})(?P<depth>\d+)"
    rf"|pool\((?P<pool_series>{SERIES})(?P<pool_depth>\d+)\)"
    rf"|(?P<ln>ln\()?(?P<sum_series>{SERIES})(?P<first>\d+)\.\.(?P=sum_series)(?P<last>\d+)(?(ln)\))"
)
GRAMMAR = re.compile(r"all|(?:every|last):\s*0*[1-9]\d*\s*|(?:\s*\d+\s*,)*\s*\d+\s*")


@dataclass(frozen=True)
class Tap:
    """A tap `depth` blocks deep, or what extraction makes of taps; `str` gives its name.

    A sum begins at `first` and ends at `depth`, each of its maps `normed` or not; `pooled` is made
    of one tap. `series` tells the runs of blocks apart.
    """

    depth: int
    series: str = "z"
    first: int | None = None
    normed: bool = False
    pooled: bool = False

    @classmethod
    def parse(cls, name: str) -> Tap | None:
        """The tap of that name; None if it is none of this grammar."""
        found = NAME.fullmatch(name)
        if found is None:
            return None
        if found["series"]:
            return cls(int(found["depth"]), found["series"])
        if found["pool_series"]:
            return cls(int(found["pool_depth"]), found["pool_series"], pooled=True)
        first, last = int(found["first"]), int(found["last"])
        return cls(last, found["sum_series"], first, normed=bool(found["ln"]))

    @property
    def plain(self) -> bool:
        """Whether it is a block's own tokens."""
        return self.first is None and not self.pooled

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the taps that it is made of."""
        first = self.depth if self.first is None else self.first
        return tap_names(range(first, self.depth + 1), self.series)

    def __str__(self) -> str:
        last = f"{self.series}{self.depth}"
        if self.pooled:
            return f"pool({last})"
        if self.first is None:
            return last
        name = f"{self.series}{self.first}..{last}"
        return f"ln({name})" if self.normed else name


def tap_names(depths: Iterable[int], series: str = "z") -> tuple[str, ...]:
    """0, 3 → z0, z3."""
    return tuple(str(Tap(depth, series)) for depth in depths)


def parsed(names: Iterable[str]) -> list[Tap]:
    """Those of the names that this grammar knows."""
    return [tap for name in names if (tap := Tap.parse(name))]


def tap_depths(names: Iterable[str], series: str = "z") -> list[int]:
    """z0, z3 → 0, 3: of the plain taps of a series; sums are left out."""
    return [tap.depth for tap in parsed(names) if tap.plain and tap.series == series]


def listed(names: Iterable[str]) -> str:
    """Names for a message, runs of neighbours drawn together: `z0 … z4, z7`."""
    groups: list[list[str]] = []
    follower = ""
    for name in names:
        if groups and name == follower:
            groups[-1].append(name)
        else:
            groups.append([name])
        tap = Tap.parse(name)
        follower = str(Tap(tap.depth + 1, tap.series)) if tap and tap.plain else ""
    return ", ".join(
        f"{group[0]} … {group[-1]}" if len(group) > 2 else ", ".join(group) for group in groups
    )


def grammatical(selection: str) -> bool:
    """Whether a selection is `all`, a list such as `0,3,6`, `every:N` or `last:N`, N above 0."""
    return GRAMMAR.fullmatch(selection) is not None


def select(selection: str, count: int) -> list[int]:
    """The numbers that a selection means of 0 … count - 1, ascending; `every:N` counts back from
    the last.

    Some may lie outside, where there are fewer than it asks for. Raises ValueError if it is not
    `grammatical`.
    """
    if not grammatical(selection):
        raise ValueError(f"{selection!r}: expected all, a list such as 0,3,6, every:N or last:N")
    how, _, number = selection.partition(":")
    if how == "every":
        return list(range(count - 1, -1, -int(number)))[::-1]
    if how == "last":
        return list(range(count - int(number), count))
    if how == "all":
        return list(range(count))
    return sorted({int(part) for part in selection.split(",")})
