"""Side networks: imports torch and itself, nothing else. One paper, one file."""

from pipeline.side.contract import FeatureSpec, Operands, Settings, SideNetwork
from pipeline.side.last import LAST
from pipeline.side.linear import Linear

METHODS: dict[str, type[SideNetwork]] = {"last": LAST, "linear": Linear}

__all__ = ["METHODS", "FeatureSpec", "Operands", "Settings", "SideNetwork"]
