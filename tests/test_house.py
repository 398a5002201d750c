"""The structure that the project promises: who may import whom, and what is never loaded.

Levels, top first; a module may import its own package's siblings only downwards:

    cli → commands → shared parts of the pipeline → its foundations → cache
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = [
    {"cli"},
    {"pipeline.demo"},
    {
        "pipeline.extract",
        "pipeline.copy",
        "pipeline.evaluate",
        "pipeline.predict",
        "pipeline.refit",
        "pipeline.report",
        "pipeline.sweep",
    },
    {"pipeline.train", "pipeline.proposals"},
    {
        "pipeline.live",
        "pipeline.sources",
        "pipeline.layout",
        "pipeline.space",
        "pipeline.mistakes",
        "pipeline.leaderboard",
    },
    {"pipeline.members", "pipeline.checkpoint", "pipeline.loader"},
    {"pipeline.batches", "pipeline.backbone", "pipeline.timm_datasets", "pipeline.optim"},
    {"pipeline.taps", "pipeline.prune", "pipeline.blocks", "pipeline.weights"},
    {"pipeline.images", "pipeline.side"},
    {
        "pipeline.config",
        "pipeline.metrics",
        "pipeline.device",
        "pipeline.folder",
        "pipeline.shapes",
        "pipeline.drop_path",
        "pipeline.memory",
        "pipeline.process",
        "pipeline.tensorboard",
        "pipeline.workers",
    },
    {"pipeline.errors"},
    {"cache"},
    {"cache.inspect", "cache.verify"},
    {"cache.writer", "cache.reader"},
    {"cache.ledger", "cache.location", "cache.tables"},
    {"cache.zarr_backend", "cache.hdf5_backend"},
    {"cache.backend"},
    {"cache.manifest", "cache.files"},
    {"cache.encoding"},
    {"cache.errors"},
]
ONLY_IN = {  # package → the files that may import it
    "timm": {"pipeline.backbone", "pipeline.timm_datasets"},
    "torchvision": {"pipeline.timm_datasets"},
    "zarr": {"cache.zarr_backend"},
    "h5py": {"cache.hdf5_backend"},
    "click": {"cli"},
    "rich": {"cli"},
    "psutil": {"pipeline.memory"},
    "jinja2": {"pipeline.report"},
    "yaml": {"pipeline.config", "pipeline.checkpoint", "pipeline.space", "pipeline.sweep"},
    "optuna": {"pipeline.proposals"},
}
PLAIN_FILES = {"cache.files": {"pipeline.folder"}}  # it knows no cache, nor does who imports it
READERS_OF_CACHE = (
    {"cli"}
    | LEVELS[2]
    | {
        "pipeline.train",
        "pipeline.batches",
        "pipeline.layout",
        "pipeline.mistakes",
        "pipeline.leaderboard",
    }
)


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


def level(module: str) -> int | None:
    """The module's own level, or that of the package it lies in."""
    while module:
        for number, members in enumerate(LEVELS):
            if module in members:
                return number
        module = module.rpartition(".")[0]
    return None


def violations(modules: dict[str, str]) -> list[str]:
    found = []
    for module, text in modules.items():
        own = level(module)
        if own is None and module != "pipeline":
            found.append(f"{module} has no level; give it one in LEVELS")
        for imported in imports(text):
            other = level(imported)
            package = imported.partition(".")[0]
            if package in ONLY_IN and module not in ONLY_IN[package]:
                found.append(f"{module} imports {package}, which belongs to {ONLY_IN[package]}")
            if any(imported.startswith(name) for name, who in PLAIN_FILES.items() if module in who):
                continue
            if package == "cache" and package != module.partition(".")[0]:
                if module not in READERS_OF_CACHE:
                    found.append(f"{module} reads the cache, which is not its business")
                if imported.count(".") == 1 and imported in sources() and module != "cli":
                    found.append(f"{module} imports {imported}; cache's names come from cache")
            if module.startswith("pipeline.side") and package in ("cache", "pipeline"):
                if not imported.startswith("pipeline.side"):
                    found.append(f"{module} imports {imported}; side networks see torch only")
                continue
            if module in ("cache", "pipeline"):
                continue
            above = other is not None and own is not None and other < own
            upward = above and imported != "cache"  # `from cache import files` names cache.files
            if upward:
                found.append(f"{module} imports {imported}, which lies above it")
    return found


def test_imports_point_down_only() -> None:
    assert violations(sources()) == []


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("cache.reader", "import torch, timm", "imports timm"),
        ("cache.manifest", "from cache.writer import Writer", "lies above it"),
        ("pipeline.taps", "from pipeline.train import train", "lies above it"),
        ("pipeline.side.last", "from pipeline.config import Member", "side networks see torch"),
        ("pipeline.optim", "from cache import Reader", "not its business"),
        ("pipeline.folder", "from cache import Reader", "not its business"),
        ("pipeline.checkpoint", "from cache.files import try_lock", "not its business"),
        ("pipeline.train", "import h5py", "belongs to"),
        ("pipeline.utils", "", "has no level"),
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
