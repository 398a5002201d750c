"""Members side by side: one thread a core, each computing some stacks with its share of the cores.

Members never wait for each other inside a step, so threads with stacks of their own keep the cores
busier than one stack whose every operation is spread over all cores. On a GPU one thread issues
all of it.

Work never runs in the main thread: a Ctrl-C, which Python hands to the main thread, cannot tear a
training step apart. `each` then lets the steps begun end before it passes the interrupt on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Threads for `jobs` jobs at a time on `device`; a context manager."""

    def __init__(self, jobs: int, device: torch.device) -> None:
        cores = torch.get_num_threads()
        self._count = min(jobs, cores) if device.type == "cpu" else 1
        share = cores // self._count
        self._before = cores
        self._pool = ThreadPoolExecutor(
            self._count, "sidecache-train", initializer=torch.set_num_threads, initargs=(share,)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown()
        torch.set_num_threads(self._before)  # MKL has one number for the whole process

    def each(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """`function` of every item, in order. The first error is raised when all have ended."""
        futures = [self._pool.submit(function, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            wait(futures)  # an interrupt too finds every item done
        return [future.result() for future in futures]
