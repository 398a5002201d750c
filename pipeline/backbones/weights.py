"""Weights: a file of them → tensors by name, and nothing in it is executed; their digest.

safetensors, or what `torch.save` wrote, out of the containers that timm knows. Of a pickle only
tensors and plain values are read, whatever the version of timm, and the bare argparse.Namespace in
which timm's training keeps its arguments. What this file does not know: what models are made of.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.errors import BackboneError, gist

CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # timm's; the first counts

# torch 2.4 lacks it: a file with arguments is refused there
_allowing = getattr(torch.serialization, "safe_globals", lambda _: nullcontext())


def read_weights(path: Path) -> dict[str, Any]:
    """What a safetensors or pth file holds by name; BackboneError names the file and what to do.

    Mostly tensors: some projects keep the encoder's in a dict of its own, which timm looks into.
    """
    found = _load(path)
    state = found
    if isinstance(found, dict):
        state = next((found[key] for key in CONTAINERS if found.get(key) is not None), found)
    if isinstance(state, dict) and state and all(isinstance(key, str) for key in state):
        return state
    came = f"a {type(state).__name__}" if state else "nothing"
    raise BackboneError(
        f"--weights {path}: expected tensors by name, alone or under {', '.join(CONTAINERS)}; came "
        f"{came}. Save the backbone's tensors alone, with safetensors.torch.save_file"
    )


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with _allowing([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own advice is to execute it
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {named[1]}, to be executed" if named else "no tensors of torch.save's"
        raise BackboneError(
            f"--weights {path}: expected a safetensors, pth or npz file of tensors, could not read "
            f"it ({reason}). Nothing in it was executed; if you trust it, load it yourself and "
            f"save its tensors with safetensors.torch.save_file"
        ) from error
    except Exception as error:  # safetensors and zip each raise their own
        raise BackboneError(
            f"--weights {path}: expected a safetensors, pth or npz file, could not read it "
            f"({gist(error)})"
        ) from error


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes, in order of name: the same from any file."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
