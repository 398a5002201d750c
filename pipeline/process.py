"""Settings of the whole process: they make training on a CPU several times faster, and SIGTERM an
interrupt.

Only what owns its process uses this (the command line, benchmarks), before torch is loaded; the
library never does it behind anyone's back.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, ClassVar, Self

SPIN_COUNT = "2000"  # rounds that an idle OpenMP thread waits awake, some ten microseconds
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def settle_process() -> None:
    """Keep freed memory, and let idle threads sleep soon. Call it before `import torch`.

    - glibc by default maps, zeroes and unmaps every large temporary, at every operation: a LAST
      step at ViT-B widths then runs two to five times slower. Nothing happens on other C libraries.
    - OpenMP's threads by default spin for milliseconds while they wait. Beside anything else that
      wants the cores (our own decoding workers, another job) each parallel operation then waits
      for a time slice. docs/log.md has the measurements. Settings of the user's own win.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    libc = ctypes.CDLL(None)  # the C library that this process already has
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until it ends, where they would raise: in the main thread.

    For the moment in which what is changed is neither old nor new. Blocking the signals would not
    do: another thread takes them, and Python's handlers run in the main one all the same.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, Any]] = []
    handlers: dict[int, Any] = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM)
        if callable(handler := signal.getsignal(number))
    }
    for number in handlers:
        signal.signal(number, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in came:
            handlers[number](number, frame)


class Terminated(KeyboardInterrupt):
    """SIGTERM came, as a scheduler sends it before it kills: whoever minds Ctrl-C minds it too."""


class Sigterm:
    """While it is open, the first SIGTERM raises Terminated in the main thread.

    Later ones do not disturb what the first sets off, up to the end of the process. It is raised a
    moment later where Python would swallow it: amid a fork, whose hooks it would tear besides, or
    in a destructor. A forked process, such as a decoding worker, just ends. Nothing happens outside
    a main thread, or where somebody else minds SIGTERM.
    """

    SECONDS = 0.05  # until it is raised again
    open: ClassVar[Sigterm | None] = None

    def __init__(self) -> None:
        self._came = False
        self._forking = self._late = False
        self._mask: set[signal.Signals | int] = set()
        self._unraisable = sys.unraisablehook

    def __enter__(self) -> Self:
        unclaimed = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        if unclaimed and threading.current_thread() is threading.main_thread():
            _watch_forks()
            Sigterm.open = self
            sys.unraisablehook = self._swallowed
            signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if Sigterm.open is self and not self._came:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            sys.unraisablehook = self._unraisable
            Sigterm.open = None

    def has_come(self) -> bool:
        """Whether SIGTERM came, or comes now: in a group of processes each gets it in turn."""
        with contextlib.suppress(Terminated):
            if not self._came:
                time.sleep(self.SECONDS)
        return self._came

    def _handle(self, _number: int, _frame: object) -> None:
        if self._late or not self._came:
            self._came, self._late = True, self._forking
            if not self._late:
                raise Terminated

    def _swallowed(self, unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, Terminated):
            self._late = True
            self._again()
        elif not self._came:  # else: of something that was torn
            self._unraisable(unraisable)

    def _again(self) -> None:
        main = threading.main_thread().ident
        again = threading.Timer(self.SECONDS, signal.pthread_kill, (main, signal.SIGTERM))
        again.daemon = True
        again.start()

    def before_fork(self) -> None:
        """The kernel keeps what comes now; Python would forget it in the new process."""
        self._forking = True
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def after_fork(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)  # handles what has come
        self._forking = False
        if self._late:
            self._again()

    def forked(self) -> None:
        """In the new process: SIGTERM ends it."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)


@functools.cache
def _watch_forks() -> None:
    """Python never forgets such hooks: they are registered once."""

    def tell(name: str) -> None:
        if Sigterm.open is not None:
            getattr(Sigterm.open, name)()

    os.register_at_fork(
        before=functools.partial(tell, "before_fork"),
        after_in_parent=functools.partial(tell, "after_fork"),
        after_in_child=functools.partial(tell, "forked"),
    )
