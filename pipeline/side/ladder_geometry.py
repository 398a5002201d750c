"""What follows from descriptions of blocks alone: shapes of side blocks, places of tokens.

A description is plain JSON (`pipeline/backbones/blocks.py` reads it from the backbone, the cache
carries it): widths, heads, the grid of a block's tokens, Swin's windows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Block = Mapping[str, Any]  # one description


def side_shape(block: Block, reduction: int) -> tuple[int, int, int]:
    """Width, feed-forward width and head width of a side block; 0 for a block without heads."""
    head = block["head_dim"] // reduction if "heads" in block else 0
    return block["dim"] // reduction, max(1, block["hidden"] // reduction), head


def check_reduction(block: Block, layer: int, reduction: int) -> None:
    """Raise ValueError where a reduction does not divide the width of a block, or of its heads."""
    dim, heads = block["dim"], block.get("heads", 1)
    head = block["head_dim"] if "heads" in block else dim
    if dim % reduction or head % reduction:
        raise ValueError(
            f"reduction = {reduction}: expected a divisor of the width of block {layer} ({dim}) "
            f"and of that of each of its heads ({heads} of width {head})"
        )


# ---- between stages: fewer, wider tokens ---------------------------------------------------------


def merged(before: Block, block: Block) -> bool:
    """Whether the side state changes its shape between two blocks."""
    return (before["grid"], before["dim"]) != (block["grid"], block["dim"])


def merge_factor(before: Block, block: Block) -> int:
    """How many tokens of a row become one between two blocks; 1 where there is no grid."""
    if before["grid"] is None or block["grid"] is None:
        return 1
    return max(1, round(before["grid"][0] / block["grid"][0]))


def side_by_side(state: Tensor, before: Block, block: Block) -> Tensor:
    """(K, B, T, d) on the grid of `before` → (K, B, T', f f d) on the grid of `block`.

    f x f patches, f being `merge_factor`; what does not fill one is padded with zeros, or cut.
    """
    factor = merge_factor(before, block)
    rows, columns = (factor * side for side in block["grid"])
    grid = state.unflatten(2, before["grid"])[:, :, :rows, :columns]  # (K, B, H, W, d)
    grid = functional.pad(grid, (0, 0, 0, columns - grid.shape[3], 0, rows - grid.shape[2]))
    parts = grid.unflatten(3, (-1, factor)).unflatten(2, (-1, factor))  # (K, B, H', f, W', f, d)
    return parts.permute(0, 1, 2, 4, 3, 5, 6).flatten(4).flatten(2, 3)  # (K, B, T', f f d)


# ---- Swin: attention in windows ------------------------------------------------------------------


def relative_index(rows: int, columns: int) -> Tensor:
    """(area, area): which row of the position table tells where one token lies from another."""
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))  # (area, 2)
    apart = places[:, None] - places[None] + torch.tensor([rows - 1, columns - 1])
    return apart[..., 0] * (2 * columns - 1) + apart[..., 1]


def window_mask(block: Block) -> Tensor | None:
    """(windows, area, area): -100, as in Swin, between tokens brought together by the shift."""
    if not any(block["shift"]):
        return None
    regions = []
    for size, window, shift in zip(block["grid"], block["window"], block["shift"], strict=True):
        length = math.ceil(size / window) * window
        region = torch.zeros(length, dtype=torch.long)
        if shift:
            region[length - window :] = 1
            region[length - shift :] = 2
        regions.append(region.unflatten(0, (-1, window)))  # (windows along this axis, window)
    rows, columns = regions
    ids = 3 * rows[:, None, :, None] + columns[None, :, None, :]  # (tall, broad, h, w)
    ids = ids.flatten(2).flatten(0, 1)  # (windows, area)
    return torch.where(ids[:, :, None] == ids[:, None], 0.0, -100.0)
