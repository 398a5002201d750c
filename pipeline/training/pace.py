"""How long an epoch will take, from a few of its steps."""

from __future__ import annotations

import time

import torch

TIMED_STEPS = 8  # after as many to warm up


class Pace:
    """Times a few of the `steps` of an epoch after some to warm up, and tells once what all take.

    Made when the first of them begins.
    """

    def __init__(self, steps: int, device: torch.device) -> None:
        self.steps, self.device = steps, device
        self.first = min(TIMED_STEPS, steps // 2)
        self.last = min(2 * TIMED_STEPS, steps) - 1
        self.begin = time.perf_counter()

    def tick(self, step: int) -> float | None:
        """After each step, from 0 on; seconds that all take, after the last one that is timed."""
        if step + 1 == self.first:
            self.begin = self._now()
        if step == self.last:
            timed = self.last + 1 - self.first
            return (self._now() - self.begin) / timed * self.steps
        return None

    def _now(self) -> float:
        if self.device.type == "cuda":  # twice a run; else it would time how fast work is handed on
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
