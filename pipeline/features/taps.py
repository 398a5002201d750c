"""Taps: which of z0 … zL to keep or to sum up, and how tokens become stored numbers and back."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.config import CopyConfig, ExtractConfig
from pipeline.errors import SettingError
from pipeline.side import block_taps
from pipeline.side.gather import Gather, found_among

TINY = torch.finfo(torch.float32).tiny  # least scale: a token of zeros

TORCH_STORAGE = {
    "int8": torch.int8,
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


def choose_taps(text: str, available: Sequence[str]) -> tuple[str, ...]:
    """The same grammar over the taps of a cache: `all` is all of them, sums included.

    Raises SettingError naming those there are.
    """
    if text == "all":
        return tuple(available)
    own = block_taps(available)
    chosen = parse_taps(text, max(own, default=0))
    lacking = [tap for tap in chosen if tap not in available]
    if lacking:
        raise SettingError(
            f"--taps {text!r}: the cache has no {', '.join(lacking)}; it has {', '.join(available)}"
        )
    return chosen


def choose_gather(
    config: ExtractConfig | CopyConfig, shapes: Mapping[str, Hashable], whose: str
) -> Gather | None:
    """The sums that `config` asks of taps with these shapes; None if it asks for none.

    Raises SettingError naming what `whose` (a backbone or a cache) lacks.
    """
    if config.gather == "none":
        return None
    if found_among(tuple(shapes)):
        raise SettingError(f"--gather: {whose} holds sums already ({', '.join(shapes)})")
    deepest = max(block_taps(tuple(shapes))) if config.gather_k is None else config.gather_k
    try:
        gather = Gather(
            k=deepest,
            groups=config.gather_groups,
            normed=config.gather == "normsum",
            pooled=config.gather_pooled,
        )
    except ValueError as error:
        raise SettingError(f"--gather: {error}") from None
    lacking = [tap for taps in gather.sums.values() for tap in taps if tap not in shapes]
    if lacking:
        raise SettingError(
            f"--gather: the sum of z0 … z{deepest} needs {', '.join(lacking)}, which {whose} "
            f"lacks; it has {', '.join(shapes)}"
        )
    different = len(set(shapes.values()))
    if different > 1:
        raise SettingError(
            f"--gather {config.gather}: a sum over taps is defined where all have one shape; "
            f"those of {whose} have {different}"
        )
    return gather


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
