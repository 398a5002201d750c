"""Each number in docs/methods.md, against the code.

Operations are counted by torch on the real networks, activations by looking at what autograd
keeps; nothing is computed from the formula that it should confirm. Attention is counted in one
kernel, torch's plain one: which of the fused ones runs depends on the processor, and torch's
counter knows only some of them.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from conftest import VIT_BLOCK
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import Member
from pipeline.side import METHODS
from pipeline.side.contract import FeatureSpec, SideNetwork, TokenShape
from pipeline.side.ladder import LSTSettings
from pipeline.side.last import LASTSettings
from pipeline.side.miet import MIETSettings
from pipeline.training.members import make_members

pytestmark = pytest.mark.numerics

TEXT = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
MAP = 197 * 768  # values of one tap


def vit_b(classes: int = 10) -> FeatureSpec:
    shape = TokenShape(tokens=197, prefix_tokens=1, dim=768)
    return FeatureSpec(
        taps={f"z{i}": shape for i in range(13)}, classes=classes, norm="layer", norm_eps=1e-6,
        norm_weight=torch.ones(768), norm_bias=torch.zeros(768),
        blocks=(VIT_BLOCK,) * 12,
    )  # fmt: skip


def costs(network: SideNetwork) -> list[float]:
    """Forward operations, operations of a training step, bytes kept for backward, for each image
    more: what a batch costs once, however large, is left out."""
    four, two = costs_of_batch(network, 4), costs_of_batch(network, 2)
    return [(a - b) / 2 for a, b in zip(four, two, strict=True)]


@sdpa_kernel(SDPBackend.MATH)
def costs_of_batch(network: SideNetwork, rows: int) -> tuple[int, int, int]:
    generator = torch.Generator().manual_seed(0)
    features = {
        tap: torch.randn(rows, 197, 768, generator=generator).half()
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
    return forward.get_total_flops(), both, sum(kept.values())


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


@sdpa_kernel(SDPBackend.MATH)
def backbone_gflop() -> float:
    """The forward pass of ViT-B/16 on one image, by its shapes."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = timm.create_model("vit_base_patch16_224", num_classes=0).eval()
        model(torch.zeros(1, 3, 224, 224))
    return counter.get_total_flops() / 1e9


NUMBERS = {  # phrases of the text, and the number that must follow each
    "One map in float16": f"{MAP * 2:,}",
    "One map in int8": f"{197 * (768 + 4):,}",
    "All 13 maps in float16": f"{13 * MAP * 2:,}",
    "The raw pixels, 224 x 224 x 3 bytes": f"{224 * 224 * 3:,}",
    "own forward pass is": f"{backbone_gflop():.0f} GFLOP",
}


@pytest.mark.parametrize("phrase", NUMBERS)
def test_phrases(phrase: str) -> None:
    text = " ".join(TEXT.split())
    assert re.search(rf"{re.escape(phrase)}:? {NUMBERS[phrase]}(?![,0-9])", text), NUMBERS[phrase]


DEFAULTS = {  # words that begin a row of a method's table → what its default must read
    "gap g": str(LASTSettings().gap),
    "rank R": str(LASTSettings().rank),
    "modules per group S": str(LASTSettings().depth),
    "attention heads": str(LASTSettings().heads),
    "pool before the head": LASTSettings().pool,
    "Gather*, k": "L" if MIETSettings().k is None else "?",
    "LAE: modules, rank, heads": f"{MIETSettings().modules}, {MIETSettings().rank}, "
    f"{MIETSettings().heads}",
    "reduction r": str(LSTSettings().reduction),
    "layer dropping": LSTSettings().keep_layers,
    "gate temperature": str(LSTSettings().temperature),
    "initialisation": LSTSettings().init,
    "drop-path": f"{Member(method='last').drop_path:g}",
}


@pytest.mark.parametrize("words", DEFAULTS)
def test_defaults(words: str) -> None:
    rows = re.findall(rf"^\| {re.escape(words)} \|.*$", TEXT, re.MULTILINE)
    assert rows
    for row in rows:
        assert re.split(r"(?<!\\)\|", row)[3].strip() == DEFAULTS[words], row


@pytest.mark.parametrize("method", METHODS)
def test_recipes(method: str) -> None:
    (member,) = make_members([method], {})
    (rate, epochs) = re.findall(rf"^\| {method} \| (\S+) \| (.*) \|$", TEXT, re.MULTILINE)[0]
    assert (float(rate), epochs) == (member.lr, f"{member.epochs} ({member.warmup_epochs})")
