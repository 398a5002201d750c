"""What needs a process of its own: imports, and reading after a fork."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

FORK = """
import os, sys, threading
import numpy as np
from cache import Reader
reader = Reader(sys.argv[1])
expected = reader.read(range(10))
stop = threading.Event()
def keep_reading():
    while not stop.is_set():
        reader.read(range(10))
threading.Thread(target=keep_reading).start()
children = []
for _ in range(8):
    child = os.fork()
    if child == 0:
        same = all(np.array_equal(reader.read(range(10)), expected) for _ in range(20))
        os._exit(0 if same else 1)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
stop.set()
assert codes == [0] * 8, codes
"""


def run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_nothing_heavy():
    code = "import sys, cache; sys.stdout.write(' '.join(sys.modules))"
    loaded = set(run(code).split())
    assert not loaded & {"zarr", "h5py", "torch", "timm", "torchvision", "click"}
    assert "cache.reader" in loaded  # the list is a real one


def test_reading_zarr_does_not_load_zarr(tmp_path, sample):
    location = sample.write(tmp_path / "a.zarr")
    code = (
        "import sys, cache\n"
        "reader = cache.Reader(sys.argv[1]); reader.read([1]); reader.keys; reader.content\n"
        "assert 'zarr' not in sys.modules"
    )
    run(code, str(location))


def test_fork_while_reading(location, sample):
    sample.write(location)
    run(FORK, str(location))


def test_killed_writer_leaves_no_lock(location, sample):
    """The kernel releases the lock of a killed process, and HDF5 keeps no mark of its own."""
    sample.write(location)
    code = (
        "import os, signal, sys\n"
        "from cache.location import Location\n"
        "lock = Location.of(sys.argv[1]).lock()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(location)], cwd=ROOT, timeout=60)
    assert done.returncode == -9
    sample.write(location)
