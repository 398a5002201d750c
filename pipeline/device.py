"""Where to compute, in which precision, and what a GPU's memory holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.errors import DeviceError


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA if there is one, else the CPU; anything else must be there.

    A GPU comes with its number, as tensors report it: torch holds `cuda` and `cuda:0` for two
    devices. Raises DeviceError naming what is there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    present = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "cuda" and len(present) > 1:
        return torch.device("cuda", torch.cuda.current_device())
    if name not in present:
        raise DeviceError(
            f"device {name!r} is not there; this machine has {', '.join(present)}. "
            f"--device auto takes the best of them."
        )
    return torch.device(name)


def pick_precision(device: torch.device, amp: bool | None) -> torch.dtype:
    """bfloat16 if `amp`, float32 if not; None decides by what the hardware multiplies fast."""
    if amp is None:
        amp = _gpu_has_bfloat16(device) if device.type == "cuda" else _cpu_has_bfloat16()
    return torch.bfloat16 if amp else torch.float32


def _gpu_has_bfloat16(device: torch.device) -> bool:
    """From Ampere on, and AMD's; older GPUs (T4, V100) emulate it, slower than float32."""
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)


def _cpu_has_bfloat16() -> bool:
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe and probe())


@contextmanager
def without_tf32() -> Iterator[None]:
    """While it is open, float32 on a GPU means float32: no product or convolution in TF32.

    cuDNN's convolutions (a ViT's patch embedding, the ladder on ConvNeXt) take TF32 unless told
    otherwise, 10 bits of mantissa; then a cache would depend on the device it was made on. What
    bfloat16 computes is not touched.
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def record_event(device: torch.device) -> torch.cuda.Event | None:
    """A mark after the work that a GPU was given so far, to wait for; None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


@contextmanager
def memory_explained(advice: str) -> Iterator[None]:
    """Turn a GPU's out-of-memory error into DeviceError with `advice`: which flag to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        told = str(error).split(". ")[0].removeprefix("CUDA out of memory").strip(". ")
        raise DeviceError(
            f"the GPU's memory is full ({told or 'out of memory'}): {advice}"
        ) from error


def precision_name(precision: torch.dtype) -> str:
    """`bfloat16`, `float32`: as manifests, records and messages spell it."""
    return str(precision).removeprefix("torch.")


def name_of(device: torch.device) -> str:
    """What to call the device in messages: `cpu (2 threads)` or the GPU's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"
