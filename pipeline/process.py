"""Settings of the whole process that make training on a CPU several times faster.

Only what owns its process calls this (the command line, benchmarks), before torch is loaded; the
library never does it behind anyone's back.
"""

from __future__ import annotations

import ctypes
import os

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
