"""A member's own folder: all that its use needs, in sidecache's format and under its own names.

    side_network.safetensors   its parameters, and the backbone's frozen final norm
    side_network.json          its card: method, settings, target, feature shape, backbone

Until version 3 of the card the files were called as peft calls its own; such runs are read, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import __version__
from pipeline.errors import RunError
from pipeline.runs.documents import json_text
from pipeline.runs.folder import make_folder, replace_text, whole_file
from pipeline.side import METHODS
from pipeline.side.contract import FeatureSpec, SideNetwork, TokenShape
from pipeline.tasks import Task, task_from

VERSION = 4  # of the card; 1 knew plain ViTs only, 2 one class target, 3 peft's names
WEIGHTS, CARD = "side_network.safetensors", "side_network.json"
EARLIER_WEIGHTS, EARLIER_CARD = "adapter_model.safetensors", "adapter_config.json"
FILES = (WEIGHTS, CARD, EARLIER_WEIGHTS, EARLIER_CARD)
_READ = (3, VERSION)
_NORM_WEIGHT, _NORM_BIAS = "final_norm.weight", "final_norm.bias"


@dataclass(frozen=True, kw_only=True)
class TrainedMember:
    """One member read back: `network` has K = 1; `precision` is the one that it learned in."""

    id: str
    network: SideNetwork
    card: dict[str, Any]
    precision: torch.dtype

    @property
    def task(self) -> Task:
        """What it learned to predict."""
        return task_from(self.card["target"])


def write_member(
    folder: Path, network: SideNetwork, position: int, card: Mapping[str, Any]
) -> None:
    """Write member `position` of a network of K as a network of one; `card` is what its own says
    beside the format and the features."""
    tensors: dict[str, Tensor] = {
        name: parameter.detach()[position : position + 1].cpu().contiguous().clone()
        for name, parameter in network.named_parameters()
    }
    spec = asdict(network.spec)
    for name, key in ((_NORM_WEIGHT, "norm_weight"), (_NORM_BIAS, "norm_bias")):
        constant = spec.pop(key)
        if constant is not None:
            tensors[name] = constant.cpu().clone()
    make_folder(folder)
    with whole_file(folder / WEIGHTS) as partial:
        save_file(tensors, partial, metadata={"format": "pt", "method": network.method})
    whose = {
        "library_name": "sidecache",
        "format_version": VERSION,
        "created_by": f"sidecache {__version__}",
    }
    replace_text(folder / CARD, json_text({**whose, **card, "features": spec}))


def read_card(folder: Path) -> dict[str, Any] | None:
    """What a member's card says; None if there is none. RunError if it is of another version."""
    path = folder / (EARLIER_CARD if _is_earlier(folder) else CARD)
    if not path.exists():
        return None
    card = json.loads(path.read_text(encoding="utf-8"))
    if card["format_version"] not in _READ:
        raise RunError(
            f"{folder}: {path.name} has version {card['format_version']}, this program reads "
            f"{' and '.join(map(str, _READ))}: train again"
        )
    return card


def read_network(folder: Path, card: Mapping[str, Any], device: torch.device) -> SideNetwork:
    """The network of one member that `card` speaks of, in evaluation mode. RunError if the weights
    are not its own."""
    tensors = load_file(folder / (EARLIER_WEIGHTS if _is_earlier(folder) else WEIGHTS))
    features = card["features"]
    spec = FeatureSpec(
        **features | {"taps": {k: TokenShape(**v) for k, v in features["taps"].items()}},
        norm_weight=tensors.pop(_NORM_WEIGHT, None),
        norm_bias=tensors.pop(_NORM_BIAS, None),
    )
    method = METHODS[card["method"]]
    network = method(spec, method.settings_class(**card["settings"]), [0])
    parameters = dict(network.named_parameters())
    if parameters.keys() != tensors.keys():
        raise RunError(f"{folder}: the weights are not those of a {card['method']} network")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return network.to(device).eval()


def _is_earlier(folder: Path) -> bool:
    """Whether all that is there of a member has the earlier names."""
    return (folder / EARLIER_CARD).exists() and not (folder / CARD).exists()
