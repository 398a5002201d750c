"""Parameters of a ladder counted from its blocks' descriptions, by no code of the product's.

General enough for T5's blocks, so that the counts published for T5 check the counting, and the
counting checks the modules.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from pipeline.side.ladder_blocks import KINDS
from pipeline.side.ladder_geometry import Block, merge_factor, merged, side_shape


def linear_count(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + (outputs if bias else 0)


def norm_count(dim: int, norm: Block) -> int:
    return dim * (2 if norm["bias"] else 1)


def attention_count(block: Block, reduction: int) -> int:
    """q, k, v and the output map of a side block, with the norms of q and k."""
    dim, _, head = side_shape(block, reduction)
    inner = block["heads"] * head
    maps = linear_count(dim, 3 * inner, block["qkv_bias"])
    maps += linear_count(inner, dim, block["proj_bias"])
    return maps + (2 * norm_count(head, block["qk_norm"]) if block.get("qk_norm") else 0)


def block_count(block: Block, reduction: int) -> int:
    """Parameters of one side block."""
    dim, hidden, _ = side_shape(block, reduction)
    first = hidden * (2 if block["ff"] == "gated" else 1)
    count = linear_count(dim, first, block["fc1_bias"])
    count += linear_count(hidden, dim, block["fc2_bias"])
    sites = KINDS[block["kind"]].sites
    count += sites * (norm_count(dim, block["norm"]) + dim * bool(block.get("layer_scale")))
    if block["kind"] == "convnext":
        return count + linear_count(block["kernel"] ** 2, dim, block["conv_bias"])
    count += attention_count(block, reduction)
    if block["kind"] == "swin":
        rows, columns = block["window"]
        count += (2 * rows - 1) * (2 * columns - 1) * block["heads"]
    return count


def ladder_count(path: Sequence[Block], reduction: int, *, gates: int | None = None) -> int:
    """Parameters of a ladder: downs, gates, merges, side blocks, side norm.

    `path` is the block that z0 enters, then the kept ones; one gate a kept block, or `gates`.
    """
    widths = [block["dim"] // reduction for block in path]
    count = sum(linear_count(block["dim"], d) for block, d in zip(path, widths, strict=True))
    count += len(path) - 1 if gates is None else gates
    for before, block in itertools.pairwise(path):
        count += block_count(block, reduction)
        if merged(before, block):
            inputs = merge_factor(before, block) ** 2 * (before["dim"] // reduction)
            count += linear_count(inputs, block["dim"] // reduction, bias=False)
    return count + norm_count(widths[-1], path[-1]["norm"])


def parameter_count(path: Sequence[Block], reduction: int, dim: int, classes: int) -> int:
    """All parameters of one LST network that ends in width `dim`: ladder, Up, head."""
    up = linear_count(path[-1]["dim"] // reduction, dim)
    return ladder_count(path, reduction) + up + linear_count(dim, classes)
