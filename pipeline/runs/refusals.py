"""What is said to a `train` or `sweep` that finds another's work in its folder, worded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import RunError


def refuse_other_files(path: Path, names: Sequence[str], what: str, command: str) -> None:
    """Raises RunError if there are files that no `command` of ours leaves; `what` it leaves."""
    if names:
        raise RunError(
            f"{path}: expected a new or empty folder for the {what}, or one that `{command}` "
            f"made; it holds other files ({_listed(names)}). Choose another --out."
        )


def refuse_another(
    path: Path, what: str, there: Mapping[str, Any], asked: Mapping[str, Any]
) -> None:
    """Raises RunError naming each value that is another there than asked for."""
    differing = [
        _difference(name, there.get(name), asked.get(name))
        for name in dict.fromkeys([*there, *asked])
        if there.get(name) != asked.get(name)
    ]
    if differing:
        raise RunError(
            f"{path} holds another {what}:\n  "
            + "\n  ".join(differing)
            + "\nChoose another --out, or --overwrite."
        )


def _difference(name: str, there: Any, asked: Any) -> str:
    if name == "fingerprint":
        return f"cache fingerprint: {there[:12]} there, {asked[:12]} given"
    if name == "labelling":
        return "labelling: labels, splits or rows of the cache have changed since"
    if name == "precision":
        flag = "--amp" if asked == "bfloat16" else "--no-amp"
        return f"precision: {there} there, {asked} asked for by {flag}; without it, {there} goes on"
    return f"{name}: {there!r} there, {asked!r} asked for"


def _listed(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f", … {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
