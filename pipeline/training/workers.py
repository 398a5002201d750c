"""Members side by side: one thread a core, each computing some cohorts with its share of the cores.

Members never wait for each other inside a step, so threads with cohorts of their own keep the cores
busier than one cohort whose every operation is spread over all cores. An item always goes to the
same thread, in order, so that a thread may be a batch ahead of another. One job, and whatever runs
on a GPU, stays in the thread that asked: a second thread with an OpenMP team of its own would make
every parallel operation of both a third slower.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Self, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2  # rounds of work that may wait in `queue`


class Workers:
    """Threads for `jobs` jobs at a time on `device`; a context manager."""

    def __init__(self, jobs: int, device: torch.device) -> None:
        self._cores = torch.get_num_threads()
        count = min(jobs, self._cores) if device.type == "cpu" else 1
        share = self._cores // count
        self._threads = [
            ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(share,))
            for _ in range(count if count > 1 else 0)
        ]
        self._rounds: deque[list[Future[Any]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)
        if self._threads:
            torch.set_num_threads(self._cores)  # MKL has one number for the whole process

    def each(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """`function` of every item, in order."""
        if not self._threads:
            return [function(item) for item in items]
        return _results(self._submit(function, items))

    def queue(self, function: Callable[[Item], object], items: Sequence[Item]) -> None:
        """Have `function` of every item done, after what was queued of that item before.

        Waits only while more than AHEAD rounds are not done. The items of all rounds must be as
        many. An error of an earlier round is raised here or by `finish`.
        """
        if not self._threads:
            self.each(function, items)
            return
        self._rounds.append(self._submit(function, items))
        while len(self._rounds) > AHEAD:
            _results(self._rounds.popleft())

    def finish(self) -> None:
        """Wait for all that was queued, also for what an interrupt kept from being noted."""
        while self._rounds:
            _results(self._rounds.popleft())
        wait([thread.submit(int) for thread in self._threads])

    def _submit(
        self, function: Callable[[Item], Result], items: Sequence[Item]
    ) -> list[Future[Result]]:
        threads = self._threads
        return [threads[i % len(threads)].submit(function, item) for i, item in enumerate(items)]


def _results(futures: Sequence[Future[Result]]) -> list[Result]:
    """When it raises, an interrupt too, nothing of it runs any more."""
    try:
        wait(futures)
    finally:
        wait(futures)
    return [future.result() for future in futures]
