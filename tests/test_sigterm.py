"""SIGTERM, as a scheduler sends it before it kills: the command line as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import paint

from cache import Reader
from pipeline.process import Sigterm
from pipeline.runs.run import Run

ROOT = Path(__file__).parent.parent
KEPT = "sidecache: terminated; what was finished is kept, the same command goes on from there\n"


def start(*arguments: object, before: str = "") -> subprocess.Popen[str]:
    """A command in a session of its own; `before` is run in its process first."""
    script = f"import sys\n{before}\nimport cli\ncli.main(sys.argv[1:], prog_name='sidecache')"
    words = [sys.executable, "-c", script, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        words, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def test_training_leaves_a_checkpoint_and_goes_on(zarr_cache: Path, tmp_path: Path) -> None:
    """In the middle of it, long before the next checkpoint is due; a second signal changes nothing.
    Then the same command ends as one that nobody stopped."""

    def command(out: str) -> list[object]:
        return ["train", zarr_cache, "--method", "last,linear", "--epochs", 16, "--device", "cpu",
                "--no-amp", "--out", tmp_path / out]  # fmt: skip

    slow = (
        "import time\n"
        "from pipeline.training.passes import Pass\n"
        "real = Pass._validate\n"
        "Pass._validate = lambda self: (time.sleep(0.05), real(self))[1]\n"
    )
    process = start(*command("killed"), before=slow)
    run = Run(tmp_path / "killed")
    wait_for(lambda: len(run.metrics()) > 2, process)  # of the second epoch: the first is done
    assert not (run.path / "checkpoint.pt").exists()
    process.terminate()
    process.terminate()
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (143, "")
    assert error.endswith(KEPT) and "Traceback" not in error
    done = torch.load(run.path / "checkpoint.pt", weights_only=True)["epochs_done"]
    assert 1 <= done < 16 and not run.finished
    for name in ("killed", "whole"):
        again = start(*command(name))
        assert (again.communicate()[1] and again.returncode) == 0
    assert run.summary() == Run(tmp_path / "whole").summary()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("many"), train=50, val=1, test=1)


@pytest.mark.parametrize("everyone", [False, True], ids=["alone", "with its workers"])
def test_extraction_ends_at_any_moment(many: Path, tmp_path: Path, everyone: bool) -> None:
    """Also while workers are forked, where Python would swallow it, and when they get it too.
    Rows that were finished are there, and the same command adds the others."""
    command = ["extract", many, "--model", "test_vit", "--no-pretrained", "--img-size", 32,
               "-b", 1, "-j", 2, "--device", "cpu", "--out"]  # fmt: skip
    for moment in range(3):
        out = tmp_path / f"{moment}.zarr"
        process = start(*command, out)
        wait_for(out.exists, process)
        time.sleep(0.03 * moment)
        (os.killpg if everyone else os.kill)(process.pid, signal.SIGTERM)
        text, error = process.communicate(timeout=60)
        assert (process.returncode, text) == (143, "")
        assert KEPT in error and "Exception ignored" not in error
    again = start(*command, out)
    assert (again.communicate()[1] and again.returncode) == 0
    with Reader(out) as reader:
        assert reader.rows_done == 156


SWALLOWED = {
    "in a destructor": "class Torn:\n    def __del__(self): send()\nTorn()",
    "before a fork": "os.register_at_fork(before=send)\npid = os.fork()\nif not pid: os._exit(0)",
    "after a fork": (
        "os.register_at_fork(after_in_parent=send)\npid = os.fork()\nif not pid: os._exit(0)"
    ),
}


@pytest.mark.parametrize("place", SWALLOWED)
def test_it_is_raised_where_python_would_swallow_it(place: str) -> None:
    """Once, a moment later; and what was torn says nothing."""
    script = (
        "import os, signal, time\n"
        "from pipeline.process import Sigterm, Terminated\n"
        "def send(): os.kill(os.getpid(), signal.SIGTERM); time.sleep(0)\n"
        "try:\n"
        "    with Sigterm() as sigterm:\n"
        f"        exec({SWALLOWED[place]!r})\n"
        "        time.sleep(20)\n"
        "except Terminated:\n"
        "    assert sigterm.has_come()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(0.2)\n"
        "    print('terminated')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr, done.returncode) == ("terminated\n", "", 0)


def test_a_forked_process_just_ends() -> None:
    with Sigterm():
        pid = os.fork()
        if not pid:
            time.sleep(20)
            os._exit(0)
        os.kill(pid, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGTERM


def test_somebody_elses_handler_stays() -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: calls.append(number))
    try:
        with Sigterm() as sigterm:
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert calls == [signal.SIGTERM] and not sigterm.has_come()


def test_nothing_is_left_of_it() -> None:
    hook = sys.unraisablehook
    with Sigterm():
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and sys.unraisablehook is hook
