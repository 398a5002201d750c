"""How long a command takes before it does anything, against starting torch.

`sidecache --help` must answer at once, and a program that only reads caches must not pay for
torch: `import cache` is checked not to load it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from measure import alternate, medians, print_line, seconds_of

GOAL_SECONDS = 0.3
HEAVY = ("torch", "timm", "zarr", "h5py")
SIDECACHE = str(Path(sys.executable).with_name("sidecache"))
COMMANDS = {
    "help": [SIDECACHE, "--help"],
    "import_cache": [sys.executable, "-c", "import cache"],
    "import_torch": [sys.executable, "-c", "import torch"],
    "python": [sys.executable, "-c", "pass"],
}


def run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def loaded_by(statement: str) -> list[str]:
    """Which of the heavy packages a fresh interpreter has loaded after `statement`."""
    code = f"import sys; {statement}; print(*(m for m in {HEAVY} if m in sys.modules))"
    return run([sys.executable, "-c", code]).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    for command in COMMANDS.values():
        run(command)
    measured = alternate(
        {name: lambda c=command: seconds_of(lambda: run(c)) for name, command in COMMANDS.items()},
        options.rounds,
    )
    seconds = medians(measured)
    print_line(
        "startup",
        ratio={name: seconds[name] / seconds["import_torch"] for name in ("help", "import_cache")},
        goal={"help_seconds": GOAL_SECONDS},
        baseline='python -c "import torch"',
        seconds=seconds,
        loaded={"import cache": loaded_by("import cache"), "import cli": loaded_by("import cli")},
        rounds=measured,
    )


if __name__ == "__main__":
    main()
