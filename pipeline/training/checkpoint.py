"""What checkpoint.pt holds: all that a pass needs to go on, within an epoch or at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import RunError
from pipeline.runs.run import CHECKPOINT, Run


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """`epochs_done` epochs are done, and perhaps some steps of the next, as `members` tell.

    Members stand by their position in the pass. `history` is the lines of metrics.jsonl, `stopped`
    says why members left early, `cost` is that of all calls so far. Nothing of it depends on the
    device, or on which members were trained as one network.
    """

    epochs_done: int
    history: list[dict[str, Any]]
    stopped: dict[int, str]
    scores: dict[int, dict[str, Any]]
    members: dict[int, dict[str, Any]]
    cost: dict[str, Any]

    @classmethod
    def of(cls, run: Run, state: Mapping[str, Any] | None) -> Checkpoint | None:
        """What `Run.begin` found. Raises RunError for a checkpoint of an earlier version."""
        if state is None:
            return None
        if "members" not in state:
            raise RunError(
                f"{run.path}: its {CHECKPOINT} was written by an earlier version of this "
                f"program, which cannot be continued. Delete that file, and the same command "
                f"trains from the first epoch."
            )
        return cls(**state)
