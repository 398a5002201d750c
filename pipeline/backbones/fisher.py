"""What the Fisher information of a backbone's weights is summed over: labelled training images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from pipeline.backbones.contract import Backbone
from pipeline.config import ExtractConfig
from pipeline.errors import ImageError, SettingError
from pipeline.sources.source import Source, TargetColumn
from pipeline.tasks import exclusive


class FisherImages:
    """What the Fisher information is summed over: (3, H, W) and its class, the same at every call.

    Labelled training images in an order drawn from --seed, as many as --fisher-samples; one that
    cannot be read is `skipped` for the next, or raised, as --on-error says.
    """

    def __init__(self, config: ExtractConfig, source: Source, backbone: Backbone) -> None:
        self.config, self.source, self.backbone = config, source, backbone
        self.target = _target(source)
        self.rows = _rows(config, source, self.target)
        self.skipped: dict[int, str] = {}

    def __call__(self) -> Iterator[tuple[Tensor, int]]:
        left = self.config.fisher_samples
        for row in self.rows:
            if left == 0:
                return
            if row in self.skipped:
                continue
            try:
                image = self.source.open(row)
            except ImageError as error:
                if self.config.on_error == "raise":
                    raise
                self.skipped[row] = str(error)
                continue
            left -= 1
            ready = self.backbone.prepare(image).to(self.backbone.device)
            yield ready, int(self.target.values[row])
        if len(self.skipped) == len(self.rows):
            raise SettingError(
                f"expected labelled training images that can be read, came none of "
                f"{len(self.rows)} ({self.skipped[self.rows[0]]}); --ladder-init magnitude needs "
                "no images"
            )


def _target(source: Source) -> TargetColumn:
    """The classes that the loss for the Fisher information tells apart."""
    for target in exclusive(source.targets):
        return target
    there = ", ".join(f"{target.name} ({target.kind})" for target in source.targets) or "nothing"
    raise SettingError(
        f"--ladder-init fisher: expected a target of kind class, as in a column label:NAME; there "
        f"is {there}. --ladder-init magnitude needs none."
    )


def _rows(config: ExtractConfig, source: Source, target: TargetColumn) -> list[int]:
    """Numbers of all labelled training images, in an order drawn from --seed."""
    known = target.values >= 0
    labelled = [i for i, row in enumerate(source.rows) if row.split == "train" and known[i]]
    if not labelled:
        raise SettingError(
            f"--ladder-init fisher: expected labelled images in a split called train, found none "
            f"(splits: {', '.join(source.splits)}). --ladder-init magnitude needs no images."
        )
    order = np.random.default_rng(config.seed).permutation(len(labelled))
    return [labelled[i] for i in order]
