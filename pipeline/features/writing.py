"""What extraction stores: which taps it reads, which arrays they become, room for a batch of them.

Tokens are cast to the storage type on the device, straight into the batch's buffer as each block
finishes; sums grow in float32 and are cast at the end. What this file does not know: images, files,
the order of rows.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cache import Manifest, Stack, StorageOverflow
from pipeline.backbones.contract import Backbone
from pipeline.config import ExtractConfig
from pipeline.device import record_event
from pipeline.features.casting import (
    HostBuffer,
    host_buffer,
    range_of,
    restore,
    rounding_error,
    store,
    total_error,
)
from pipeline.features.taps import choose_gather, parse_taps
from pipeline.side.contract import TokenShape
from pipeline.side.gather import Gather, pool_both
from pipeline.sources.batches import ImageBatch


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which taps are read from the backbone, and which arrays are made of them.

    Taps of equal shape make one stack: `tokens` for a plain ViT, `stage1`, `stage2` … for others.
    `gather` reduces them to sums before anything is stored.
    """

    read: tuple[str, ...]
    stacks: tuple[Stack, ...]
    gather: Gather | None = None

    @functools.cached_property
    def place(self) -> dict[str, tuple[str, int]]:
        """Stored tap → its stack and its position in it."""
        return {
            tap: (stack.name, position)
            for stack in self.stacks
            for position, tap in enumerate(stack.taps)
        }


def gathered_stacks(gather: Gather, shape: TokenShape | Stack) -> tuple[Stack, ...]:
    """The sums of maps of this shape in one stack, what is pooled beside them in another."""
    tokens, prefix, dim = shape.tokens, shape.prefix_tokens, shape.dim
    sums = Stack(
        name="tokens", taps=tuple(gather.sums), tokens=tokens, prefix_tokens=prefix, dim=dim
    )
    if not gather.pooled:
        return (sums,)
    first = 1 if prefix else 0
    pooled = Stack(
        name="pooled", taps=(gather.pool_name,), tokens=first + 1, prefix_tokens=first, dim=dim
    )
    return sums, pooled


def plan_layout(config: ExtractConfig, backbone: Backbone) -> Layout:
    """What `config` asks of this backbone. Raises SettingError for taps or sums that cannot be."""
    shapes = backbone.taps
    gather = choose_gather(config, shapes, backbone.name)
    if gather:
        read = tuple(tap for taps in gather.sums.values() for tap in taps)
        return Layout(read=read, stacks=gathered_stacks(gather, shapes[read[0]]), gather=gather)
    read = parse_taps(config.taps, backbone.blocks)
    runs = [list(run) for _, run in itertools.groupby(shapes, shapes.__getitem__)]
    stacks = []
    for number, run in enumerate(runs, start=1):
        name = "tokens" if len(runs) == 1 else f"stage{number}"
        if taps := tuple(tap for tap in run if tap in read):
            stacks.append(Stack(name=name, taps=taps, **vars(shapes[taps[0]])))
    return Layout(read=read, stacks=tuple(stacks))


def layout_of(manifest: Manifest) -> Layout:
    """The layout by which a cache was extracted."""
    found = manifest.identity["gather"]
    if found == "none":
        read = tuple(tap for stack in manifest.stacks for tap in stack.taps)
        return Layout(read=read, stacks=manifest.stacks)
    gather = Gather(**found)
    read = tuple(dict.fromkeys(tap for taps in gather.sums.values() for tap in taps))
    return Layout(read=read, stacks=manifest.stacks, gather=gather)


class TokenBuffer:
    """Room for one batch of stored tokens, per stack (B, 1, taps, T, …), on device and host."""

    def __init__(self, manifest: Manifest, layout: Layout, size: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.layout, self.storage = layout, manifest.storage
        self.device = device
        self.host: dict[str, HostBuffer] = {}
        self.into: dict[str, Tensor] = {}
        # per tap: least and greatest value, and of the first row what `rounding_error` gives
        self.facts: dict[str, Tensor] = {}
        self.told: dict[str, Tensor] = {}  # the same on the host
        self.sums: dict[str, Tensor] = {}
        self.copied: torch.cuda.Event | None = None
        for stack in manifest.stacks:
            name, shape = stack.name, (size, 1, *manifest.stored_shape(stack.name))
            host = self.host[name] = host_buffer(shape, manifest.storage, pinned=on_gpu)
            self.into[name] = (
                torch.empty(shape, dtype=host.tensor.dtype, device=device)
                if on_gpu
                else host.tensor
            )
            self.told[name] = torch.zeros(len(stack.taps), 5, pin_memory=on_gpu)
            self.facts[name] = (
                torch.zeros(len(stack.taps), 5, device=device) if on_gpu else self.told[name]
            )
            for tap in layout.gather.sums if layout.gather else ():
                if tap in stack.taps:
                    self.sums[tap] = torch.empty(size, stack.tokens, stack.dim, device=device)

    def fill(self, backbone: Backbone, images: Tensor, precision: torch.dtype) -> None:
        """Forward `images`, cast every tap or sum into place, begin the copy to the host."""
        size, gather = len(images), self.layout.gather
        for total in self.sums.values():
            total.zero_()

        def sink(tap: str, tokens: Tensor) -> None:
            if gather is None:
                self._keep(tap, tokens)
                return
            for name, taps in gather.sums.items():
                if tap in taps:
                    self.sums[name][:size] += gather.addend(tokens)
            if gather.pooled and tap == gather.deepest:
                self._keep(gather.pool_name, pool_both(tokens, backbone.prefix_tokens))

        backbone.read_taps(images, sink, precision=precision)
        for name, total in self.sums.items():
            self._keep(name, total[:size])
        if self.device.type == "cuda":
            for name, on_device in self.into.items():
                self.host[name].tensor[:size].copy_(on_device[:size], non_blocking=True)
                self.told[name].copy_(self.facts[name], non_blocking=True)
            self.copied = record_event(self.device)

    def _keep(self, tap: str, tokens: Tensor) -> None:
        stack, position = self.layout.place[tap]
        part = self.into[stack][: len(tokens), 0, position]
        store(tokens, part)
        facts = self.facts[stack][position]
        facts[:2] = torch.stack(torch.aminmax(tokens))
        if self.storage != "float32":
            facts[2:] = rounding_error(tokens[:1], part[:1])

    def overflowing(self) -> bool:
        """Wait for the copy; whether a token was NaN or left the range of the storage type.

        What the host was told is read, not the device: a writer must not wait for the next batch.
        """
        if self.copied is not None:
            self.copied.synchronize()
        return not all(self._fits(told[:, :2]) for told in self.told.values())

    def _fits(self, extremes: Tensor) -> bool:
        return bool(extremes.to(range_of(self.storage)).isfinite().all())

    def measured(self) -> dict[str, tuple[float, float, float]]:
        """What rounding lost of the first row, per stack; nothing of float32."""
        if self.storage == "float32":
            return {}
        return {stack: total_error(told[:, 2:]) for stack, told in self.told.items()}

    def overflow(self, batch: ImageBatch, keys: Sequence[str]) -> StorageOverflow:
        """The error that names the first tap and image that do not fit."""
        for stack in self.layout.stacks:
            for position, tap in enumerate(stack.taps):
                extremes = self.told[stack.name][position, :2]
                if self._fits(extremes):
                    continue
                part = self.host[stack.name].tensor[: len(batch.images), 0, position]
                fits = restore(part, stack.dim).isfinite().flatten(1).all(dim=1)
                row = int((~fits).nonzero()[0])
                key = keys[batch.start + row]
                least, greatest = extremes.tolist()
                return overflow_error(tap, key, least, greatest, self.storage)
        raise AssertionError("nothing overflows")


def overflow_error(
    tap: str, key: str, least: float, greatest: float, storage: str
) -> StorageOverflow:
    """The error that says why a tap of an image, of such values, cannot be stored."""
    if math.isfinite(least) and math.isfinite(greatest):
        what = f"values from {least:.4g} to {greatest:.4g} do not fit {storage}"
        advice = "--dtype bfloat16 has the range of float32"
    else:
        what = "the backbone itself gave NaN or infinity"
        advice = "try --no-amp, and check the weights"
    return StorageOverflow(f"tap {tap} of {key}: {what}; {advice}")
