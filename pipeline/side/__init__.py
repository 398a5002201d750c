"""Side networks: beside torch they import each other, nothing else. One paper, one file.

A method is one file of this folder, its settings above its network, and one line of METHODS.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.side.settings import Settings, settings_in

if TYPE_CHECKING:
    from pipeline.side.contract import SideNetwork


class Methods(Mapping[str, "type[SideNetwork]"]):
    """name → network class. Its file, and torch with it, is loaded when it is asked for."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = places  # name → file:class

    def __getitem__(self, name: str) -> type[SideNetwork]:
        file, network = self._places[name].split(":")
        return getattr(importlib.import_module(f"{__name__}.{file}"), network)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def settings(self, name: str) -> type[Settings]:
        """The settings of a method without its network, and so without torch: for `--help`."""
        file, network = self._places[name].split(":")
        return settings_in(Path(__file__).with_name(f"{file}.py"), f"{network}Settings")


METHODS = Methods(
    {
        "last": "last:LAST",
        "lst": "ladder:LST",
        "miet": "miet:MIET",
        "attentive": "attentive:Attentive",
        "linear": "linear:Linear",
    }
)
ALIASES = {"mist": "miet"}  # the paper's later name
