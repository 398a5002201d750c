"""Taps: which of z0 … zL to keep, and how tokens on the device become stored numbers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import SettingError

TORCH_STORAGE = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def parse_taps(text: str, blocks: int) -> tuple[str, ...]:
    """`all`, `0,3,6`, `every:2` (counted back from the last) or `last:4` → names in order.

    Raises SettingError naming the grammar and the taps that a backbone with `blocks` has.
    """
    everything = range(blocks + 1)
    try:
        match text.split(":"):
            case ["all"]:
                chosen = set(everything)
            case ["every", step]:
                chosen = set(everything[::-1][:: int(step)])
            case ["last", count]:
                chosen = set(everything[-int(count) :]) if int(count) > 0 else set()
            case [listed]:
                chosen = {int(part.strip().removeprefix("z")) for part in listed.split(",")}
            case _:
                raise ValueError
    except ValueError:
        raise SettingError(
            f"--taps {text!r}: expected all, a list such as 0,3,6, every:N or last:N"
        ) from None
    unknown = sorted(chosen - set(everything))
    if unknown or not chosen:
        raise SettingError(
            f"--taps {text!r}: no tap {', '.join(f'z{i}' for i in unknown) or 'is left'}; "
            f"this backbone has z0 … z{blocks}"
        )
    return tuple(f"z{i}" for i in sorted(chosen))


def host_buffer(shape: tuple[int, ...], storage: str, *, pinned: bool) -> tuple[Tensor, np.ndarray]:
    """Memory for stored tokens, seen from both sides: a torch tensor and a numpy array.

    numpy has no bfloat16; there the array shows the bits as uint16, as the cache stores them.
    """
    tensor = torch.empty(shape, dtype=TORCH_STORAGE[storage], pin_memory=pinned)
    if storage == "bfloat16":
        return tensor, tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor, tensor.numpy()
