"""Training from a cache that memory cannot hold, against the same training from memory.

Before every round the kernel is told to forget the cache's files (posix_fadvise), so that every
row of every epoch comes from the disk, in random order, as with a cache larger than memory. The
more members learn from a batch, the less reading it matters: `crossover` is the least K measured
at which streaming reaches 0.8 of the resident throughput.
"""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path
from typing import Any

from measure import alternate, medians, print_line, seconds_of
from systems import features_parser, processes, train_members, with_cache

GOAL = 0.8


def main() -> None:
    parser = features_parser(__doc__, rows=256, epochs=1, rounds=3)
    parser.add_argument("--members", default="1,4,16", help="K, several with commas")
    with_cache(parser.parse_args(), measure)


def measure(options: argparse.Namespace, cache: Path) -> None:
    sizes = {"taps": options.taps, "tokens": options.tokens, "dim": options.dim}
    counts = [int(text) for text in options.members.split(",")]
    results: dict[int, dict[str, float]] = {}
    rounds: dict[str, Any] = {}
    for k in counts:
        pair = {
            "resident": functools.partial(train_members, members=k),
            "disk": functools.partial(
                train_members, members=k, resident=False, before_round=forget
            ),
        }
        with processes(pair, options, cache) as systems:
            rates = alternate({n: system.round for n, system in systems.items()}, options.rounds)
        rounds[str(k)] = rates
        results[k] = medians(rates)
    ratio = {k: rates["disk"] / rates["resident"] for k, rates in results.items()}
    row_bytes = 2 * options.taps * options.tokens * options.dim
    print_line(
        "stream",
        computing=options,
        ratio=ratio[counts[-1]],
        ratio_of={str(k): value for k, value in ratio.items()},
        goal=GOAL,
        crossover=next((k for k, value in ratio.items() if value >= GOAL), None),
        baseline="the same training with resident features, the same K",
        images_per_second={str(k): rates for k, rates in results.items()},
        bytes_per_second_read={str(k): r["disk"] * row_bytes for k, r in results.items()},
        cold_bytes_per_second=cold_read(cache),
        rounds=rounds,
        sizes={**sizes, **{k: getattr(options, k) for k in ("rows", "batch_size", "epochs")}},
    )


def forget(cache: Path) -> None:
    """Drop the cache's files from the page cache."""
    for file in cache.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def cold_read(cache: Path) -> float:
    """Bytes a second of one reader over all files, in order, from the disk."""
    forget(cache)
    files = [file for file in cache.rglob("*") if file.is_file()]

    def read() -> None:
        for file in files:
            with file.open("rb", buffering=0) as stream:
                while stream.read(2**23):
                    pass

    return sum(file.stat().st_size for file in files) / seconds_of(read)


if __name__ == "__main__":
    main()
