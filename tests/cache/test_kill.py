"""`kill -9` at every step of writing a cache, then running again, gives the uninterrupted cache."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("suffix", ["zarr", "h5"])
def test_killed_at_every_step(tmp_path, suffix):
    script = Path(__file__).with_name("kill_every_step.py")
    root = Path(__file__).parents[2]
    command = [sys.executable, str(script), suffix, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = int(done.stdout)
    assert kills > 10  # the steps were really counted


@pytest.mark.parametrize("suffix", ["zarr", "h5"])
def test_the_kill_test_can_fail(tmp_path, suffix):
    """A ledger record written before its data is found out."""
    script = Path(__file__).with_name("kill_every_step.py")
    command = [sys.executable, str(script), suffix, str(tmp_path), "record-first"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "differs" in done.stderr or "CacheDamaged" in done.stderr
