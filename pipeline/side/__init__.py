"""Side networks: imports torch and itself, nothing else. One paper, one file."""

from pipeline.side.attentive import Attentive
from pipeline.side.contract import (
    FeatureSpec,
    Operands,
    Settings,
    SideNetwork,
    TokenShape,
)
from pipeline.side.ladder import LST
from pipeline.side.last import LAST
from pipeline.side.linear import Linear
from pipeline.side.miet import MIET

METHODS: dict[str, type[SideNetwork]] = {
    "last": LAST,
    "lst": LST,
    "miet": MIET,
    "attentive": Attentive,
    "linear": Linear,
}
ALIASES = {"mist": "miet"}  # the paper's later name

__all__ = [
    "ALIASES",
    "METHODS",
    "FeatureSpec",
    "Operands",
    "Settings",
    "SideNetwork",
    "TokenShape",
]
