"""`kill -9` at every step of a job, then the same job again, gives what no interruption gives; and
whoever reads in between finds what was there before, or what is there afterwards."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LEAST = {"write": 10, "extend": 20, "label": 10, "update": 30}  # steps


def run(folder: Path, suffix: str, job: str, *bugs: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name("kill_every_step.py")
    command = [sys.executable, str(script), suffix, str(folder), job, *bugs]
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("job", LEAST)
@pytest.mark.parametrize("suffix", ["zarr", "h5"])
def test_killed_at_every_step(tmp_path, suffix, job):
    done = run(tmp_path, suffix, job)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = int(done.stdout)
    assert kills > LEAST[job]  # the steps were really counted


@pytest.mark.parametrize("suffix", ["zarr", "h5"])
def test_the_kill_test_can_fail(tmp_path, suffix):
    """A ledger record written before its data is found out."""
    done = run(tmp_path, suffix, "write", "record-first")
    assert done.returncode == 1
    assert "differs" in done.stderr or "CacheDamaged" in done.stderr


@pytest.mark.parametrize("suffix", ["zarr", "h5"])
def test_a_document_before_what_it_speaks_of_is_found_out(tmp_path, suffix):
    done = run(tmp_path, suffix, "label", "document-first")
    assert done.returncode == 1
    assert "differs" in done.stderr or "CacheDamaged" in done.stderr
