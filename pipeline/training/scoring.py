"""Scores of trained members over the rows of a cache, K members of a network at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.features.operands import Batch, Batches
from pipeline.side.contract import SideNetwork
from pipeline.tasks import Scores, Task
from pipeline.training.workers import Workers

EVAL_BATCH = 64


def score(
    networks: Sequence[tuple[int, SideNetwork, Task]], batches: Batches, workers: Workers
) -> list[list[Scores]]:
    """Scores of every member of every network over all rows, in evaluation mode.

    A network stands beside the place of its operands in a batch.
    """
    tallies = [task.tally(network.members, batches.device) for _, network, task in networks]
    for _, network, _ in networks:
        network.eval()
    for order, chosen in _turns(networks, batches):
        for batch in batches.epoch(EVAL_BATCH, order):

            def add(i: int, batch: Batch = batch) -> None:
                place, network, task = networks[i]
                with torch.no_grad():  # a setting of the thread
                    outputs = network(batch.operands[place]).float()
                    tallies[i].add(outputs, batch.labels[task.question])

            workers.each(add, chosen)
    return [tally.scores() for tally in tallies]


def _turns(
    networks: Sequence[tuple[int, SideNetwork, Task]], batches: Batches
) -> Iterator[tuple[Tensor | None, Sequence[int]]]:
    """Which rows, all as they lie if None, which networks look at. Of rows that are held out by
    folds each looks at its own alone, in the batches that it would have alone."""
    if batches.folds is None:
        yield None, range(len(networks))
        return
    folds = [task.fold for _, _, task in networks]
    for fold in sorted({fold for fold in folds if fold is not None}):
        order = torch.from_numpy(np.flatnonzero(batches.folds == fold))
        yield order, [i for i, own in enumerate(folds) if own == fold]
