"""Where features live during training: what fits beside all else, and what may still be filled.

Slurm, Docker and Kubernetes set the limit on a control group; what the machine as a whole has free
then says nothing, and whoever believes it is killed.
"""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from pipeline.errors import SettingError

SPARE = 0.8  # of the free memory may be filled with features
PROCESS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def choose_resident(wanted: str, nbytes: int, device: torch.device, step_bytes: int = 0) -> str:
    """`device`, `ram` or `disk`: what was asked for if it fits, else the fastest that does.

    A GPU's memory must hold `step_bytes` beside the features: what a training step of all members
    takes. Raises SettingError if `device` or `ram` was asked for and `nbytes` do not fit.
    """
    room = {"ram": int(free_memory() * SPARE)}
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] - step_bytes
        room = {"device": int(max(0, free) * SPARE), **room}
    elif wanted == "device":
        wanted = "ram"  # on the CPU they are the same memory
    if wanted == "disk":
        return "disk"
    if wanted == "auto":
        return next((place for place, free in room.items() if nbytes <= free), "disk")
    if nbytes > room[wanted]:
        beside = f" beside {step_bytes / 1e9:.2f} GB for a step" if step_bytes else ""
        raise SettingError(
            f"--resident {wanted}: the features take {nbytes / 1e9:.2f} GB there, "
            f"{room[wanted] / 1e9:.2f} GB are free{beside}. --resident auto or disk reads them as "
            f"needed."
        )
    return wanted


def free_memory() -> int:
    """Bytes that this process may still fill: of the machine, of its control group and of every
    group above it, the least."""
    return min([psutil.virtual_memory().available, *_left_in_groups(PROCESS, GROUPS)])


def _left_in_groups(process: Path, root: Path) -> list[int]:
    """Bytes left in each control group with a limit, of both versions of the interface.

    `process` says in which groups the process is, a line `number:controllers:/path` each; within a
    container that path may be the host's, and the group is then the root itself.
    """
    try:
        lines = process.read_text().splitlines()
    except OSError:
        return []  # not Linux
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, used = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = base / path.strip("/")
        for group in (own, *own.parents):
            if group.is_relative_to(base):
                left += _left(group, limit, used)
    return left


def _left(group: Path, limit: str, used: str) -> list[int]:
    try:
        most, now = int((group / limit).read_text()), int((group / used).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group here, or "max": no limit
        return []
    cached = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
    return [max(0, most - now + cached)]  # pages of files are given back when they are needed
