"""Systems under measurement, each in a process of its own that works a round when asked.

A process of its own, so that its peak memory can be told; in rounds, so that systems can take turns
(`measure.alternate`) and all see the same slow minutes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from measure import add_compute_flags, peak_memory, precision_of
from synthetic import CLASSES, write_features

from pipeline.process import settle_process

# does one round and returns what it did (images, operations); and the bytes of features it holds
Round = tuple[Callable[[], float], int]
Build = Callable[[argparse.Namespace, Path, Any], Round]  # options, cache, device


def features_parser(
    description: str | None, *, rows: int, epochs: int, rounds: int
) -> argparse.ArgumentParser:
    """The flags of every benchmark that trains from a cache of random features."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--taps", type=int, default=13)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--rows", type=int, default=rows)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=epochs, help="of ours, a round")
    parser.add_argument("--rounds", type=int, default=rounds)
    add_compute_flags(parser)
    parser.add_argument("--folder", help="where to put the cache  [default: a temporary folder]")
    return parser


def with_cache(
    options: argparse.Namespace, measure: Callable[[argparse.Namespace, Path], None]
) -> None:
    """Write a cache of the sizes that `options` ask for, measure, and remove it."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        cache = Path(folder) / "cache.zarr"
        write_features(
            cache, rows=options.rows, taps=options.taps, tokens=options.tokens, dim=options.dim
        )
        measure(options, cache)


class System:
    """The near end of a process that measures one round when asked."""

    def __init__(self, build: Build, options: argparse.Namespace, cache: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, far_end = context.Pipe()
        arguments = (build, options, cache, far_end)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        far_end.close()  # the child has its own; if it dies, `recv` raises EOFError
        self.pipe.recv()  # ready

    def round(self) -> float:
        """What one round did per second."""
        self.pipe.send("round")
        return self.pipe.recv()

    def finish(self) -> dict[str, int]:
        """Bytes: `peak` and `ready` (before the first round) of memory, `features` held."""
        self.pipe.send("finish")
        return self.pipe.recv()


@contextmanager
def processes(
    builds: Mapping[str, Build], options: argparse.Namespace, cache: Path
) -> Iterator[dict[str, System]]:
    """All systems, warm and waiting."""
    systems: dict[str, System] = {}
    try:
        for name, build in builds.items():
            systems[name] = System(build, options, cache)
        yield systems
    finally:
        for system in systems.values():
            system.process.terminate()
            system.process.join()


def serve(build: Build, options: argparse.Namespace, cache: Path, pipe: Connection) -> None:
    """The far end: build the system, warm up, then a round a request."""
    settle_process()
    import torch

    from pipeline.device import pick_device

    device = pick_device(options.device)

    def peak() -> int:
        return torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory()

    run, features = build(options, cache, device)
    ready = peak()  # loaded, nothing computed
    run()  # warm
    pipe.send("ready")
    while pipe.recv() == "round":
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        done = run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        pipe.send(done / (time.perf_counter() - begin))
    pipe.send({"peak": peak(), "ready": ready, "features": features})


def train_members(
    options: argparse.Namespace,
    cache: Path,
    device: Any,
    *,
    members: int = 1,
    resident: bool = True,
    before_round: Callable[[Path], None] = lambda cache: None,
) -> Round:
    """Our training of that many LAST members, as `pipeline.train` does it; counts images read."""
    import torch

    from cache import Reader
    from pipeline.config import Member
    from pipeline.features.labelled import feature_spec, labelled_rows
    from pipeline.features.operands import Batches
    from pipeline.tasks import task_of
    from pipeline.training.cohort import make_cohorts
    from pipeline.training.workers import Workers

    reader = Reader(cache)
    rows = labelled_rows(reader, ["train"], ["label"])
    task = task_of(reader.target())
    tasks = {task.question: task}
    settings = [
        Member(method="last", task="label", epochs=10**6, seed=i, lr=1e-3 * (1 + i % 4))
        for i in range(members)
    ]
    cohorts = make_cohorts(settings, feature_spec(reader, CLASSES), tasks, device)
    networks = [cohort.network for cohort in cohorts]
    batches = Batches(reader, rows, networks, device=device, dtype=precision_of(options))
    if resident:
        batches.load(device)
    workers = Workers(len(cohorts), device)
    shuffle = torch.Generator().manual_seed(0)
    items = list(enumerate(cohorts))
    steps = -(-len(batches) // options.batch_size)

    def run() -> float:
        before_round(cache)
        for _ in range(options.epochs):
            for cohort in cohorts:
                cohort.begin_epoch(cohort.optimiser.steps // steps, steps)
            order = torch.randperm(len(batches), generator=shuffle)
            for batch in batches.epoch(options.batch_size, order):
                workers.queue(lambda item, batch=batch: item[1].step(batch, item[0]), items)
            workers.finish()
        return options.epochs * len(batches)

    return run, batches.nbytes
