"""Members side by side: one thread a core, each computing some stacks with its share of the cores.

Members never wait for each other inside a step, so threads with stacks of their own keep the cores
busier than one stack whose every operation is spread over all cores. One job, and whatever runs on
a GPU, stays in the thread that asked: a second thread with an OpenMP team of its own would make
every parallel operation of both a third slower.
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
        self._cores = torch.get_num_threads()
        count = min(jobs, self._cores) if device.type == "cpu" else 1
        self._pool: ThreadPoolExecutor | None = None
        if count > 1:
            share = self._cores // count
            self._pool = ThreadPoolExecutor(
                count, "sidecache-train", initializer=torch.set_num_threads, initargs=(share,)
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            torch.set_num_threads(self._cores)  # MKL has one number for the whole process

    def each(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """`function` of every item, in order. When it raises, nothing of it runs any more."""
        if self._pool is None:
            return [function(item) for item in items]
        futures = [self._pool.submit(function, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            wait(futures)  # an interrupt too leaves no thread at work
        return [future.result() for future in futures]
