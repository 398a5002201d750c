"""The tests that need a GPU, as a line beside the benchmarks: did they pass, and on what."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys

from measure import REPOSITORY, add_compute_flags, print_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_compute_flags(parser)
    options = parser.parse_args()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    print(done.stdout, file=sys.stderr)
    print_line(
        "gpu_tests",
        computing=options,
        exit=done.returncode,
        summary=done.stdout.strip().rpartition("\n")[2],
        driver=driver(),
    )
    sys.exit(done.returncode)


def driver() -> str | None:
    """The GPUs, their memory and their driver, as NVIDIA's own tool tells; None without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = "--query-gpu=name,memory.total,driver_version"
    command = [tool, asked, "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
