"""What a run costs: seconds, bytes read."""

from __future__ import annotations

import time
from typing import Any

from pipeline.training.checkpoint import Checkpoint
from pipeline.training.learners import Learners


class Cost:
    """Of all calls together, loading included; this call's began at `begin`, a time of
    `time.perf_counter`."""

    def __init__(self, begin: float, learners: Learners, checkpoint: Checkpoint | None) -> None:
        self._begin, self._learners = begin, learners
        self._spent = checkpoint.cost if checkpoint else {"seconds": 0.0, "bytes_read": 0}

    def so_far(self) -> dict[str, Any]:
        """Seconds, and bytes read from the cache."""
        return {
            "seconds": self._spent["seconds"] + time.perf_counter() - self._begin,
            "bytes_read": self._spent["bytes_read"] + self._learners.bytes_read,
        }

    def whole(self, *, members: int, epochs: int) -> dict[str, Any]:
        """What cost.json says of the run, of so many members after so many epochs."""
        cost, rows = self.so_far(), len(self._learners.batches)
        return {
            **cost,
            "rows": rows,
            "images_per_second": rows * epochs / cost["seconds"],
            "members": members,
            "seconds_per_member": cost["seconds"] / members,
        }
