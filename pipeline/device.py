"""Where to compute and in which precision; and how to keep the C allocator out of the way."""

from __future__ import annotations

import ctypes
import ctypes.util

import torch

from pipeline.errors import DeviceError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


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


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory instead of returning it to the system at every step.

    By default large temporaries are mapped, zeroed and unmapped at every operation, which makes
    training on the CPU several times slower. Process-wide, so only commands and benchmarks call
    it; does nothing where the C library is not glibc.
    """
    libc = ctypes.CDLL(ctypes.util.find_library("c"))
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def name_of(device: torch.device) -> str:
    """What to call the device in messages: `cpu (2 threads)` or the GPU's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"
