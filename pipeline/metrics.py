"""What is measured of a classifier: loss, top-1, top-5; fractions, not percent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Means over `n` rows. `top5` counts a hit among the five best (all, with fewer classes)."""

    top1: float
    top5: float
    loss: float
    n: int


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: Tensor | None = None) -> Tensor:
    """Mean loss per member: logits (K, B, C), labels (B,), smoothing (K,) → (K,)."""
    log_probabilities = logits.log_softmax(dim=-1)
    index = labels.expand(len(logits), -1)[..., None]  # (K, B, 1)
    loss = -log_probabilities.gather(-1, index)[..., 0].mean(dim=1)
    if smoothing is None:
        return loss
    return (1 - smoothing) * loss - smoothing * log_probabilities.mean(dim=(1, 2))


class Tally:
    """Running sums over batches, per member, kept on the device until read."""

    def __init__(self, members: int, device: torch.device) -> None:
        self.sums = torch.zeros(3, members, device=device, dtype=torch.float64)
        self.n = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch: logits (K, B, C), labels (B,)."""
        size = len(labels)
        best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices  # (K, B, ≤5)
        hits = best == labels[None, :, None]
        self.sums[0] += hits[..., 0].sum(dim=1)
        self.sums[1] += hits.any(dim=-1).sum(dim=1)
        self.sums[2] += cross_entropy(logits, labels).double() * size
        self.n += size

    def scores(self) -> list[Scores]:
        """One `Scores` a member."""
        top1, top5, loss = (self.sums / max(self.n, 1)).tolist()
        return [
            Scores(top1=a, top5=b, loss=c, n=self.n)
            for a, b, c in zip(top1, top5, loss, strict=True)
        ]
