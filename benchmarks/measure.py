"""What the benchmarks share: alternating rounds, peak memory, and the one JSON line.

A speed on its own says more about the machine than about the code, so every benchmark measures a
baseline in the same run and takes turns with it: A B A B. Medians over the rounds are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

AMP = {"auto": None, "bfloat16": True, "float32": False}  # --precision, as `pick_precision` asks
REPOSITORY = Path(__file__).resolve().parent.parent


def alternate(systems: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call every system once a round, in turn; the numbers that each gave, by name."""
    measured: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, system in systems.items():
            measured[name].append(system())
    return measured


def medians(measured: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: median(values) for name, values in measured.items()}


def seconds_of(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def peak_memory() -> int:
    """The most bytes of memory that this process has had resident.

    Linux hands `ru_maxrss` of the parent down to a child, through exec too; VmHWM starts afresh.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def add_compute_flags(parser: argparse.ArgumentParser) -> None:
    """`--device` and `--precision`, of every benchmark that computes."""
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--precision",
        choices=AMP,
        default="auto",
        help="of all systems; auto is bfloat16 where the hardware multiplies it, never emulated",
    )


def precision_of(options: argparse.Namespace) -> Any:
    """The torch.dtype in which all systems of a benchmark compute."""
    from pipeline.device import pick_device, pick_precision

    return pick_precision(pick_device(options.device), AMP[options.precision])


def width_of(model: str) -> int:
    """D of a timm backbone."""
    import timm
    import torch

    with torch.device("meta"):  # shapes alone
        return timm.create_model(model, pretrained=False).num_features


def print_line(
    benchmark: str, *, computing: argparse.Namespace | None = None, **fields: Any
) -> None:
    """The result: one line of JSON on stdout, with what is needed to judge it later.

    `computing` holds the flags of a benchmark that computes: device and precision are then named.
    """
    import torch

    where = {
        **_computed_on(computing),
        "cpu": _cpu_name(),
        "cpu_bfloat16": _cpu_bfloat16(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,  # names its CUDA, too
        "python": platform.python_version(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", *sys.argv]),
    }
    print(json.dumps(_rounded({"benchmark": benchmark, **fields, **where})), flush=True)


def commit() -> str | None:
    """The commit of this working tree, `-dirty` if files differ; else $COMMIT, else None."""
    git = ["git", "-C", str(REPOSITORY)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        if head.returncode:
            return os.environ.get("COMMIT") or None
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
    except FileNotFoundError:
        return os.environ.get("COMMIT") or None
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def _computed_on(computing: argparse.Namespace | None) -> dict[str, str]:
    from pipeline.device import name_of, pick_device, precision_name

    if computing is None:
        return {"device": name_of(pick_device("cpu"))}
    device = name_of(pick_device(computing.device))
    return {"device": device, "precision": precision_name(precision_of(computing))}


def _cpu_name() -> str:
    return _cpu_fact("model name") or platform.processor()


def _cpu_bfloat16() -> str:
    """Which instructions for bfloat16 the processor has, where Linux tells; else `unknown`."""
    flags = _cpu_fact("flags").split()
    known = (name for name in ("amx_bf16", "avx512_bf16") if name in flags)
    return next(known, "none" if flags else "unknown")


def _cpu_fact(name: str) -> str:
    """What Linux says of the first core; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.split(":")[0].strip() == name:
            return line.split(":", 1)[1].strip()
    return ""


def _rounded(value: Any) -> Any:
    """Four significant digits are more than a benchmark can vouch for."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
