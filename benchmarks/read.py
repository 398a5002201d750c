"""Random rows of a warm cache into a reused buffer, against copying them from mapped memory.

The baseline is the fastest that one thread can do: rows of a raw file, mapped and already faulted
in, copied with numpy. The naive way, one fancy-indexed read through zarr and h5py, is reported too.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import zarr
from measure import alternate, medians, print_line, seconds_of
from synthetic import write_features

from cache import Reader

GOALS = {"zarr": 0.4, "h5": 0.8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--taps", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--naive-rows", type=int, default=8)
    parser.add_argument("--folder", help="where to put the files  [default: a temporary folder]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    shape = (options.taps, options.tokens, options.dim)
    sizes = {"taps": options.taps, "tokens": options.tokens, "dim": options.dim}
    for suffix in GOALS:
        write_features(folder / f"cache.{suffix}", rows=options.rows, **sizes)
    readers = {suffix: Reader(folder / f"cache.{suffix}") for suffix in GOALS}
    for row in range(options.rows):  # the same numbers, as a plain file
        with (folder / "raw").open("ab") as file:
            file.write(readers["h5"].read([row]).tobytes())
    mapped = np.memmap(folder / "raw", np.float16, "r", shape=(options.rows, *shape))
    mapped.sum(dtype=np.float64)  # every page faulted in

    order = np.random.default_rng(0).permutation(options.rows)
    batches = np.split(order, range(options.batch_size, options.rows, options.batch_size))
    buffer = np.empty((options.batch_size, *shape), np.float16)
    gigabytes = options.rows * buffer[0].nbytes / 1e9

    def copy_mapped() -> None:
        for rows in batches:
            for place, row in enumerate(rows):
                np.copyto(buffer[place], mapped[row])

    def read_with(reader: Reader) -> Callable[[], None]:
        def read() -> None:
            for rows in batches:
                reader.read_into(rows, buffer[: len(rows)])

        return read

    actions = {"memmap": copy_mapped, **{name: read_with(r) for name, r in readers.items()}}
    for name, action in actions.items():  # warm, and right
        action()
        assert np.array_equal(buffer[0], mapped[batches[-1][0]]), name
    rates = alternate(
        {name: lambda a=action: gigabytes / seconds_of(a) for name, action in actions.items()},
        options.rounds,
    )
    speed = medians(rates)
    print_line(
        "read",
        ratio={name: speed[name] / speed["memmap"] for name in GOALS},
        goal=GOALS,
        baseline="np.copyto of the same rows out of a faulted-in np.memmap",
        gb_per_second=speed,
        naive_gb_per_second=naive(folder, order[: options.naive_rows]),
        rounds=rates,
        sizes={"rows": options.rows, **sizes, "batch_size": options.batch_size, "gb": gigabytes},
    )


def naive(folder: Path, rows: np.ndarray) -> dict[str, float]:
    """One fancy-indexed read of a few rows, as one would first write it."""
    array = zarr.open_group(folder / "cache.zarr", mode="r")["stacks/tokens"]
    with h5py.File(folder / "cache.h5", "r") as file:
        dataset, ascending = file["stacks/tokens"], np.sort(rows)  # h5py takes no other order
        gigabytes = len(rows) * dataset[0].nbytes / 1e9
        return {
            "zarr": gigabytes / seconds_of(lambda: array.oindex[rows]),
            "h5": gigabytes / seconds_of(lambda: dataset[ascending]),
        }


if __name__ == "__main__":
    main()
