"""A trained member behind its backbone: images in, logits out, no cache.

Shared by `evaluate` on images and `predict`. The backbone must be the one that the member learned
from: its weights' digest is checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.backbones.contract import Backbone
from pipeline.backbones.timm_models import load_backbone
from pipeline.device import pick_precision, without_tf32
from pipeline.errors import BackboneError
from pipeline.runs.run import TrainedMember
from pipeline.sources.source import Source


@dataclass(frozen=True, kw_only=True)
class LiveMember:
    """A member and its backbone on one device, each computing in its own precision."""

    member: TrainedMember
    backbone: Backbone
    backbone_precision: torch.dtype
    member_precision: torch.dtype

    def batches(
        self, source: Source, *, batch_size: int, workers: int
    ) -> Iterator[tuple[int, Tensor, dict[int, str]]]:
        """(first row, logits (B, C), unreadable rows and why) for all rows in order."""
        for batch in self.backbone.batches(
            source,
            pending=[range(len(source))],
            batch_size=batch_size,
            workers=workers,
        ):
            yield batch.start, self.logits(batch.images), batch.failures

    @without_tf32()
    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, C) float32."""
        network, features = self.member.network, {}

        def sink(tap: str, tokens: Tensor) -> None:
            features[tap] = tokens.float()

        self.backbone.read_taps(images, sink, precision=self.backbone_precision)
        return network(network.operands(features, self.member_precision))[0].float()


class SideTuned(nn.Module):
    """A member behind its backbone as one module: images (B, 3, H, W), as `transform` makes them,
    to outputs (B, C) float32. For inference: gradients end here.

    `classes` names the outputs (none for a regression); `task` is what it learned to predict;
    `transform` turns an RGB `PIL.Image` into (3, H, W) float32.
    """

    def __init__(self, live: LiveMember) -> None:
        super().__init__()
        self.live = live
        self.backbone, self.network = live.backbone.model, live.member.network
        self.transform = live.backbone.prepare
        self.task = live.member.task
        self.classes = self.task.classes
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, C): logits; of a regression, the value in the target's unit."""
        return self.live.logits(images) * self.task.scale + self.task.centre


def backbone_of(
    made_with: Mapping[str, Any],
    *,
    device: torch.device,
    weights: str | Path | None = None,
    pretrained: bool = True,
    seed: int = 0,
) -> Backbone:
    """The backbone that a member's card or a cache's identity speaks of; see `load_backbone`.

    Raises BackboneError if its weights are other ones.
    """
    name, wanted = made_with["backbone"]["name"], made_with["backbone"]["weights_sha256"]
    backbone = load_backbone(
        name,
        device=device,
        weights=weights,
        pretrained=pretrained,
        seed=seed,
        preprocessing=made_with["preprocessing"],
    )
    if backbone.weights_sha256 != wanted:
        raise BackboneError(
            f"{name}: expected weights with digest {wanted[:12]}, which the features were computed "
            f"with, came {backbone.weights_sha256[:12]}. Give the same file with --weights."
        )
    return backbone


def go_live(
    member: TrainedMember,
    *,
    weights: str | Path | None,
    device: torch.device,
    amp: bool | None,
    pretrained: bool = True,
    seed: int = 0,
) -> LiveMember:
    """Load the member's backbone. Raises BackboneError if its weights are other ones.

    `amp` None computes the features in the precision that the cache was extracted in, and the
    member's outputs in the one that it learned in.
    """
    card = member.card
    backbone = backbone_of(card, device=device, weights=weights, pretrained=pretrained, seed=seed)
    backbone.keep(member.network.sources(tuple(backbone.taps)))
    asked = None if amp is None else pick_precision(device, amp)
    return LiveMember(
        member=member,
        backbone=backbone,
        backbone_precision=asked or getattr(torch, card["precision"]),
        member_precision=asked or member.precision,
    )
