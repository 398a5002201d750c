"""Each number in docs/methods.md, against the code.

Operations are counted by torch on the real networks, activations by looking at what autograd
keeps; nothing is computed from the formula that it should confirm.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VIT_BLOCK
from torch.utils.flop_counter import FlopCounterMode

from pipeline.side import METHODS, FeatureSpec, SideNetwork, TokenShape

TEXT = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
BATCH = 2  # operations and activations are per image, and must not depend on it
MAP = 197 * 768  # values of one tap


def vit_b(classes: int = 10) -> FeatureSpec:
    shape = TokenShape(tokens=197, prefix_tokens=1, dim=768)
    return FeatureSpec(
        taps={f"z{i}": shape for i in range(13)}, classes=classes, norm="layer", norm_eps=1e-6,
        norm_weight=torch.ones(768), norm_bias=torch.zeros(768),
        blocks=(VIT_BLOCK,) * 12,
    )  # fmt: skip


def costs(network: SideNetwork) -> tuple[float, float, float]:
    """Forward operations, operations of a training step, bytes kept for backward; per image."""
    generator = torch.Generator().manual_seed(0)
    features = {
        tap: torch.randn(BATCH, 197, 768, generator=generator).half()
        for tap in network.sources(tuple(network.spec.taps))
    }
    operands = network.operands(features, torch.bfloat16)
    given = {t.untyped_storage().data_ptr() for t in [*operands.values(), *network.parameters()]}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        FlopCounterMode(display=False) as forward,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        loss = network(operands).square().sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    both = forward.get_total_flops() + backward.get_total_flops()
    return forward.get_total_flops() / BATCH, both / BATCH, sum(kept.values()) / BATCH


def row_of(method: str) -> list[str]:
    (line,) = re.findall(rf"^\| `{method}` \|.*$", TEXT, re.MULTILINE)
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("method", METHODS)
def test_cost_table(method: str) -> None:
    """Parameters beside the head, operations, activations, bytes read: ViT-B/16, defaults."""
    kind = METHODS[method]
    network = kind(vit_b(), kind.settings_class(), [0])
    heads = sum(p.numel() for p in network.head.parameters())  # type: ignore[union-attr]
    parameters = sum(p.numel() for p in network.parameters()) - heads
    forward, step, kept = costs(network)
    taps = len(network.reads)
    assert row_of(method)[1:] == [
        f"{parameters:,}",
        f"{forward / 1e9:.2f}",
        f"{step / 1e9:.2f}",
        f"{kept / 1e6:.1f}",
        f"{taps * MAP * 2:,}",
    ]


def numbers() -> dict[str, Any]:
    """Phrases of the text and what they must say."""
    return {
        "one map in float16": f"{MAP * 2:,}",
        "one map in int8": f"{197 * (768 + 4):,}",
        "all 13 maps in float16": f"{13 * MAP * 2:,}",
        "raw pixels": f"{224 * 224 * 3:,}",
    }


@pytest.mark.parametrize("phrase", numbers())
def test_bytes(phrase: str) -> None:
    assert re.search(rf"{phrase}[^0-9]*{numbers()[phrase]}\b", TEXT), numbers()[phrase]
