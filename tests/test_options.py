"""What `pytest` was taught here: another processor's precision, and a line on what was skipped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
SOME = """
import pytest
import torch

from pipeline.device import pick_precision

@pytest.mark.parametrize("number", range(3))
def test_three(number):
    pytest.skip("needs a CUDA device")

@pytest.mark.skipif(True, reason="needs rain")
def test_outdoors(): ...

def test_package():
    pytest.importorskip("no_such_package")

def test_real(real_data): ...

def test_precision():
    assert pick_precision(torch.device("cpu"), None) == torch.{expected}
"""


@pytest.mark.parametrize(("flag", "expected"), [("on", "bfloat16"), ("off", "float32")])
def test_precision_as_asked_and_a_line_on_what_was_skipped(
    tmp_path: Path, flag: str, expected: str
) -> None:
    (tmp_path / "conftest.py").write_bytes(CONFTEST.read_bytes())
    (tmp_path / "test_some.py").write_text(SOME.format(expected=expected))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--bfloat16", flag]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, told, counts = done.stdout.splitlines()
    assert counts.startswith("1 passed, 6 skipped")
    assert told.startswith("skipped: 3 x needs a CUDA device; 1 x ")
    for reason in ("1 x needs rain", "'no_such_package'", "pytest --real-data DIR"):
        assert reason in told
