"""The structure that the project promises: who may import whom, and what is never loaded.

The folders say it: imports point down `ROOMS`. Within a room files import each other without a
circle; the files of `pipeline/` itself are the commands and, at the bottom, its foundations.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOUNDATIONS = [
    "pipeline.process",
    "pipeline.device",
    "pipeline.records",
    "pipeline.config",
    "pipeline.errors",
    "pipeline.setting",
]
ROOMS = [
    "cli",
    "pipeline.terminal",
    "pipeline",  # the commands: every file of this folder that is not a foundation
    "pipeline.demo",
    "pipeline.pages",
    "pipeline.search",
    "pipeline.training",
    "pipeline.features",
    "pipeline.backbones",
    "pipeline.runs",
    "pipeline.labelling",
    "pipeline.sources",
    "pipeline.tasks",
    "pipeline.side",
    *FOUNDATIONS,
    "cache",
]
ONLY_IN = {  # package → the files, or rooms, that may import it
    "timm": {"pipeline.backbones.timm_models", "pipeline.sources.timm_sets"},
    "torchvision": {"pipeline.sources.timm_sets"},
    "zarr": {"cache.containers.zarr"},
    "h5py": {"cache.containers.hdf5"},
    "click": {"cli", "pipeline.terminal"},
    "rich": {"cli", "pipeline.terminal"},
    "psutil": {"pipeline.features.residence"},
    "jinja2": {"pipeline.report"},
    "yaml": {"pipeline.terminal", "pipeline.runs.documents", "pipeline.search.space"},
    "optuna": {"pipeline.search.proposals"},
}
READERS_OF_CACHE = {  # rooms
    *("cli", "pipeline.terminal", "pipeline", "pipeline.features", "pipeline.labelling"),
    "pipeline.pages",
}
SEEN_BY_SIDE = ("pipeline.side", "pipeline.setting")
PLAIN_FILES = {"pipeline.runs.folder": "cache.files"}  # it knows no cache, nor does who imports it


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, str]:
    files = [ROOT / "cli.py", *(ROOT / "cache").rglob("*.py"), *(ROOT / "pipeline").rglob("*.py")]
    return {name_of(path): path.read_text() for path in files}


def imports(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str:
    """Where a module lies; raises ValueError for a folder that ROOMS does not list."""
    named = max((r for r in ROOMS if f"{module}.".startswith(f"{r}.")), key=len, default="")
    if not named or (named == "pipeline" and module.count(".") > 1):
        raise ValueError(module)
    return named


def violations(modules: dict[str, str]) -> list[str]:
    found = []
    arrows: dict[str, set[str]] = {module: set() for module in modules}
    for module, text in modules.items():
        try:
            own = ROOMS.index(room(module))
        except ValueError:
            found.append(f"{module} lies in no room; give its folder a place in ROOMS")
            continue
        if module in ("cache", "pipeline"):
            continue
        for imported in imports(text):
            package = imported.partition(".")[0]
            if not {module, room(module)} & ONLY_IN.get(package, {module}):
                found.append(f"{module} imports {package}, which belongs to {ONLY_IN[package]}")
            if package not in ("cli", "pipeline", "cache"):
                continue
            if imported in modules and imported != package:
                arrows[module].add(imported)
            found += complaints(module, own, imported, modules)
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        found.append(f"a circle: {' → '.join(error.args[1])}")
    return found


def complaints(module: str, own: int, imported: str, modules: dict[str, str]) -> Iterator[str]:
    package = imported.partition(".")[0]
    if package == "cache" and not module.startswith("cache"):
        if imported.startswith(PLAIN_FILES.get(module, "none")):
            return
        if ROOMS[own] not in READERS_OF_CACHE:
            yield f"{module} reads the cache, which is not its business"
        if imported in modules and imported != "cache":
            yield f"{module} imports {imported}; cache's names come from cache"
    elif ROOMS[own] == "pipeline.side" and not imported.startswith(SEEN_BY_SIDE):
        yield f"{module} imports {imported}; side networks see torch only"
    elif imported in modules and imported != "pipeline" and ROOMS.index(room(imported)) < own:
        yield f"{module} imports {imported}, which lies above it"


def test_imports_point_down_only() -> None:
    assert violations(sources()) == []


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("cache.reader", "import torch, timm", "imports timm"),
        ("cache.manifest", "from cache.writer import Writer", "a circle"),
        ("pipeline.features.taps", "from pipeline.train import train", "lies above it"),
        ("pipeline.side.last", "from pipeline.config import Member", "side networks see torch"),
        ("pipeline.training.optim", "from cache import Reader", "not its business"),
        ("pipeline.runs.folder", "from cache import Reader", "not its business"),
        ("pipeline.runs.run", "from cache.files import try_lock", "not its business"),
        ("pipeline.train", "import h5py", "belongs to"),
        ("pipeline.train", "import click", "belongs to"),
        ("pipeline.train", "from cache.reader import Reader", "names come from cache"),
        ("pipeline.errors", "from pipeline.device import pick_device", "lies above it"),
        ("pipeline.utils.things", "", "lies in no room"),
    ],
)
def test_the_test_can_fail(module: str, line: str, complaint: str) -> None:
    modules = sources()
    modules[module] = f"{line}\n{modules.get(module, '')}"
    assert any(complaint in violation for violation in violations(modules))


def test_cache_never_imports_torch() -> None:
    for module, text in sources().items():
        if module.startswith("cache"):
            assert not {"torch", "timm", "click"} & {i.partition(".")[0] for i in imports(text)}


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in a fresh interpreter after `statement`."""
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_cache_or_cli_loads_nothing_heavy() -> None:
    assert not loaded_by("import cache") & {"torch", "timm", "zarr", "h5py"}
    assert not loaded_by("import pipeline.records") & {"torch", "numpy"}
    assert not loaded_by("import cli") & {"torch", "timm", "zarr", "h5py", "rich", "numpy"}


def test_stage_two_never_loads_timm(zarr_cache: Path, tmp_path: Path) -> None:
    """train and evaluate run where `import timm` and `import torchvision` fail."""
    block = "sys.modules.update(timm=None, torchvision=None)\nimport cli\n"
    for arguments in (
        f"train {zarr_cache} --method last --epochs 2 --warmup-epochs 0 --out {tmp_path}/run",
        f"evaluate {tmp_path}/run",
    ):
        loaded = loaded_by(f"{block}cli.main({arguments.split()!r}, standalone_mode=False)")
        assert "torch" in loaded
    assert (tmp_path / "run" / "evaluations.jsonl").exists()


def json_texts(text: str) -> list[ast.Call]:
    """The calls of json.dumps in a module."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func) in ("json.dumps", "json.dump")]


def test_no_json_holds_nan() -> None:
    """Python would write it, and no other reader takes it: its place is null."""
    found = {module: json_texts(text) for module, text in sources().items()}
    assert sum(map(len, found.values())) >= 8
    for module, calls in found.items():
        for call in calls:
            assert "allow_nan=False" in map(ast.unparse, call.keywords), module


def test_only_the_command_line_prints() -> None:
    for module, text in sources().items():
        calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
        printing = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
        assert module == "cli" or not printing, module
