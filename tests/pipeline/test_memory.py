"""How much memory is free: the least of the machine's and of every control group above us."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from pipeline.errors import SettingError
from pipeline.features import residence
from pipeline.features.residence import choose_resident, free_memory

GB = 10**9


def group(folder: Path, limit: str, used: int, cached: int, *, version: int = 2) -> None:
    names = {2: ("memory.max", "memory.current"), 1: ("memory.limit_in_bytes",
                                                      "memory.usage_in_bytes")}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names[version], (limit, str(used)), strict=True):
        (folder / name).write_text(f"{text}\n")
    word = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 1\n{word} {cached}\nfile 2\n")


def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str) -> Path:
    (tmp_path / "cgroup").write_text(lines)
    monkeypatch.setattr(residence, "PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr(residence, "GROUPS", tmp_path / "sys")
    return tmp_path / "sys"


def test_a_limit_on_a_group_above_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm limits the job, and each step below it is free."""
    root = pretend(tmp_path, monkeypatch, "0::/slurm/job_7/step_0\n")
    group(root / "slurm", "max", 9 * GB, 0)
    group(root / "slurm/job_7", str(GB), GB // 2, GB // 10)
    group(root / "slurm/job_7/step_0", "max", GB // 2, 0)
    assert free_memory() == GB - GB // 2 + GB // 10


def test_within_a_container_the_root_is_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Docker shows the host's path of the group, which is not there, or `/`."""
    root = pretend(tmp_path, monkeypatch, "0::/system.slice/docker-abc.scope\n")
    group(root, str(GB), GB // 4, 0)
    assert free_memory() == GB - GB // 4


def test_the_older_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "5:cpu,cpuacct:/x\n4:hugetlb,memory:/kubepods/pod1\n0::/\n"
    root = pretend(tmp_path, monkeypatch, lines)
    group(root / "memory/kubepods/pod1", str(GB), GB // 2, GB // 5, version=1)
    assert free_memory() == GB - GB // 2 + GB // 5


def test_no_limit_is_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = pretend(tmp_path, monkeypatch, "0::/user.slice\n")
    group(root / "user.slice", "max", GB, 0)
    available = psutil.virtual_memory().available
    assert free_memory() == pytest.approx(available, rel=0.05)
    monkeypatch.setattr(residence, "PROCESS", tmp_path / "not Linux")
    assert free_memory() == pytest.approx(available, rel=0.05)


def test_features_are_not_put_where_the_group_would_be_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = pretend(tmp_path, monkeypatch, "0::/job\n")
    group(root / "job", str(GB), 0, 0)
    cpu = torch.device("cpu")
    assert choose_resident("auto", GB // 2, cpu) == "ram"
    assert choose_resident("auto", GB - GB // 10, cpu) == "disk"
    with pytest.raises(SettingError, match=r"--resident ram: the features take 0\.90 GB there"):
        choose_resident("ram", GB - GB // 10, cpu)
