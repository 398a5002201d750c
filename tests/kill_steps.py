"""Dying at a change of the disk: for scripts that fork and kill what they test."""

import itertools
import os
import signal
import sys
from collections.abc import Callable

STEPS = ("pwrite", "ftruncate", "rename", "replace", "link", "unlink", "mkdir", "rmdir", "open")
CREATES = os.O_CREAT | os.O_TRUNC


def kill_at(step: int) -> None:
    """From now on, the process dies at its `step`-th change of the disk."""
    count = itertools.count(1)

    def counted(name: str, call: Callable) -> Callable:
        def wrapper(*args: object, **options: object) -> object:
            if (name != "open" or args[1] & CREATES) and next(count) == step:
                if name == "pwrite":
                    fd, data, offset = args
                    call(fd, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return wrapper

    os.fsync = lambda fd: None  # changes nothing that a killed process leaves behind
    for name in STEPS:
        setattr(os, name, counted(name, getattr(os, name)))


def in_child(work: Callable[[], None]) -> int:
    """Run in a fork; the signal that ended it, or 0. Any other failure ends this process."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(1)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
