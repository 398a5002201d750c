"""K LAST members in one pass, against one training after the other and against DINOv2's way.

    one       one member, its own training: what K separate trainings spend an epoch on
    pass_K    K members in one pass (pipeline.train's way)
    loop_K    DINOv2's way: K networks of one member, a Python loop, one summed loss, one AdamW

Each lives in a process of its own with resident features and they take turns. An epoch is what is
timed, so `ratio` = pass_K / (K x one) leaves the separate trainings' start-up out: the comparison
with trainings long enough not to notice it. `start_up_seconds` says how much that would be.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import alternate, medians, precision_of, print_line, seconds_of
from synthetic import CLASSES
from systems import Round, features_parser, processes, train_members, with_cache

GOALS = {"cpu": 0.7, "cuda": 0.25}


def main() -> None:
    parser = features_parser(__doc__, rows=128, epochs=1, rounds=5)
    parser.add_argument("--members", default="16", help="K, several with commas; the last is rated")
    parser.add_argument("--loop", type=int, default=4, help="members of the Python loop")
    with_cache(parser.parse_args(), measure)


def measure(options: argparse.Namespace, cache: Path) -> None:
    sizes = {"taps": options.taps, "tokens": options.tokens, "dim": options.dim}
    counts = [int(text) for text in options.members.split(",")]
    most = counts[-1]
    builds: dict[str, Any] = {"one": train_members}
    builds |= {f"pass_{k}": functools.partial(train_members, members=k) for k in counts if k > 1}
    builds[f"loop_{options.loop}"] = train_loop
    with processes(builds, options, cache) as systems:
        rates = alternate({name: system.round for name, system in systems.items()}, options.rounds)
        memory = {name: system.finish() for name, system in systems.items()}
    images = medians(rates)  # read per second
    per_second = {
        name: rate * (int(name.partition("_")[2] or 1)) / options.batch_size
        for name, rate in images.items()
    }  # member steps
    further = (memory[f"pass_{most}"]["peak"] - memory["one"]["peak"]) / (most - 1)
    print_line(
        "members",
        computing=options,
        ratio=images["one"] / (images[f"pass_{most}"] * most),
        ratio_of={
            name: per_second["one"] / rate for name, rate in per_second.items() if name != "one"
        },
        goal=GOALS,
        baseline=f"{most} trainings of one member, one after the other, without their start-up; "
        "loop: DINOv2's way, the same LAST in a Python loop with one summed loss",
        member_steps_per_second=per_second,
        bytes_per_further_member={
            "measured": further,
            "parameters_gradients_moments": memory_of_a_member(options),
        },
        start_up_seconds=start_up(),
        rounds=rates,
        sizes={**sizes, **{k: getattr(options, k) for k in ("members", "rows", "batch_size")}},
    )


def memory_of_a_member(options: argparse.Namespace) -> int:
    """Parameters, gradients, two moments and the decay of each: float32."""
    D, R, M = options.dim, 16, options.taps - 1
    parameters = M * (2 * D + 3 * R * (D + 1) + (R + 1) * D) + CLASSES * (D + 1)
    return 5 * 4 * parameters


def start_up() -> float:
    """Seconds from nothing to a process that could load features: the imports."""
    command = [sys.executable, "-c", "import pipeline.train"]
    return seconds_of(lambda: subprocess.run(command, check=True))


def train_loop(options: argparse.Namespace, cache: Path, device: Any) -> Round:
    """DINOv2's `LinearClassifiers`-like loop (dinov2/eval/linear.py), on LAST networks."""
    import torch

    from cache import Reader
    from pipeline.config import Question
    from pipeline.features.labelled import feature_spec, labelled_rows
    from pipeline.features.operands import Batches
    from pipeline.side import METHODS

    reader = Reader(cache)
    rows = labelled_rows(reader, ["train"], ["label"])
    last, spec = METHODS["last"], feature_spec(reader, CLASSES)
    networks = [last(spec, last.settings_class(), [i]).to(device) for i in range(options.loop)]
    batches = Batches(reader, rows, networks[:1], device=device, dtype=precision_of(options))
    batches.load(device)
    groups = [
        {"params": list(network.parameters()), "lr": 1e-3 * (1 + i % 4)}
        for i, network in enumerate(networks)
    ]
    optimiser = torch.optim.AdamW(groups)
    shuffle = torch.Generator().manual_seed(0)

    def run() -> float:
        for _ in range(options.epochs):
            order = torch.randperm(len(batches), generator=shuffle)
            for batch in batches.epoch(options.batch_size, order):
                losses = [
                    torch.nn.functional.cross_entropy(
                        network(batch.operands[0])[0], batch.labels[Question("label")]
                    )
                    for network in networks
                ]
                optimiser.zero_grad()
                sum(losses).backward()
                optimiser.step()
        return options.epochs * len(batches)

    return run, batches.nbytes


if __name__ == "__main__":
    main()
