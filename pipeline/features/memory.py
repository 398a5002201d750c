"""How much memory there is to fill: of the machine, or of the container that this process lives in.

Slurm, Docker and Kubernetes set the limit on a control group; what the machine as a whole has free
then says nothing, and whoever believes it is killed.
"""

from __future__ import annotations

from pathlib import Path

import psutil

PROCESS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


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
