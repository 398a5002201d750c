"""Scores of trained members over the rows of a cache, K members of a network at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
    for batch in batches.epoch(EVAL_BATCH):

        def add(i: int, batch: Batch = batch) -> None:
            place, network, task = networks[i]
            with torch.no_grad():  # a setting of the thread
                tallies[i].add(network(batch.operands[place]).float(), batch.labels[task.name])

        workers.each(add, range(len(networks)))
    return [tally.scores() for tally in tallies]
