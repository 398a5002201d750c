"""How tokens become stored numbers and back, on any device; what that loses.

Bit for bit what `cache.encode` and `cache.decode` do in numpy; a test holds it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny  # least scale: a token of zeros

TORCH_STORAGE = {
    "int8": torch.int8,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class HostBuffer:
    """Memory for stored tokens, seen from both sides.

    numpy has no bfloat16; there the array shows the bits as uint16, as the cache stores them.
    """

    tensor: Tensor
    array: np.ndarray


def host_buffer(shape: tuple[int, ...], storage: str, *, pinned: bool) -> HostBuffer:
    """Uninitialised room for values of a storage type."""
    tensor = torch.empty(shape, dtype=TORCH_STORAGE[storage], pin_memory=pinned)
    if storage == "bfloat16":
        return HostBuffer(tensor, tensor.view(torch.int16).numpy().view(np.uint16))
    return HostBuffer(tensor, tensor.numpy())


def store(tokens: Tensor, into: Tensor) -> None:
    """Write tokens (…, D) into memory of a storage type: (…, D), or (…, D + 4) of int8.

    int8 is symmetric, one scale a token: scale = max |x| / 127 in float32, laid behind its D
    values. Bit for bit what `cache.encode` gives.
    """
    if into.dtype != torch.int8:
        into.copy_(tokens)
        return
    dim, tokens = tokens.shape[-1], tokens.float()
    scale = tokens.abs().amax(dim=-1, keepdim=True) / 127  # (…, 1)
    into[..., :dim].copy_((tokens / scale.clamp_min(TINY)).round_())
    into[..., dim:].copy_(scale.view(torch.int8))


def restore(stored: Tensor, dim: int) -> Tensor:
    """Stored tokens → (…, D): as they are, or of int8 the float32 values."""
    if stored.dtype != torch.int8:
        return stored
    return stored[..., :dim] * stored[..., dim:].contiguous().view(torch.float32)


def range_of(storage: str) -> torch.dtype:
    """The floating-point type whose range a storage type has; int8's scale is float32."""
    return torch.float32 if storage == "int8" else TORCH_STORAGE[storage]


def rounding_error(exact: Tensor, stored: Tensor) -> Tensor:
    """What storage lost of tokens (…, D): (3,) float32.

    Sum of squared errors, sum of squared exact values, and the worst token's relative error
    (norm of its error over its norm).
    """
    exact = exact.float()
    error = (restore(stored, exact.shape[-1]).float() - exact).square().sum(dim=-1)
    square = exact.square().sum(dim=-1)
    worst = (error / square.clamp_min(TINY)).amax().sqrt()
    return torch.stack([error.sum(), square.sum(), worst])


def total_error(errors: Tensor) -> tuple[float, float, float]:
    """Several `rounding_error`s (n, 3) as one: sums of squares, and the worst token."""
    squares, exact, worst = errors.double().unbind(1)
    return squares.sum().item(), exact.sum().item(), worst.max().item()
