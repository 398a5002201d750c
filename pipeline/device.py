"""Where to compute, and in which precision."""

from __future__ import annotations

import torch

from pipeline.errors import DeviceError


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA if there is one, else the CPU; anything else must be there.

    Raises DeviceError naming what is there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    present = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "cuda" and len(present) > 1:
        return torch.device("cuda")
    if name not in present:
        raise DeviceError(
            f"device {name!r} is not there; this machine has {', '.join(present)}. "
            f"--device auto takes the best of them."
        )
    return torch.device(name)


def pick_precision(device: torch.device, amp: bool | None) -> torch.dtype:
    """bfloat16 if `amp`, float32 if not; None decides by what the hardware multiplies fast."""
    if amp is None:
        amp = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_has_bfloat16()
    return torch.bfloat16 if amp else torch.float32


def _cpu_has_bfloat16() -> bool:
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe and probe())


def precision_name(precision: torch.dtype) -> str:
    """`bfloat16`, `float32`: as manifests, records and messages spell it."""
    return str(precision).removeprefix("torch.")


def name_of(device: torch.device) -> str:
    """What to call the device in messages: `cpu (2 threads)` or the GPU's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"
