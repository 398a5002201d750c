"""The structure that the project promises: who may import whom, and what is never loaded.

The folders say it: imports point down `ROOMS`. Within a room files import each other without a
circle; the files of `pipeline/` itself are the commands and, at the bottom, its foundations.
"""

from __future__ import annotations

import ast
import configparser
import graphlib
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from conftest import train_config

from cache import Reader
from pipeline.train import train

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
    "PIL": {
        *("pipeline.backbones.timm_models", "pipeline.demo.shapes", "pipeline.features.filling"),
        *("pipeline.report", "pipeline.sources"),
    },
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


DISTRIBUTIONS = {"PIL": "pillow", "google_crc32c": "google-crc32c", "yaml": "pyyaml"}
EXTRAS = "timm torchvision PIL optuna jinja2"
IF_THERE = {"matplotlib"}  # draws the demo's curves; whoever lacks it is told


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


def test_records_are_exported() -> None:
    from pipeline import records

    own = {n for n, v in vars(records).items() if getattr(v, "__module__", "") == records.__name__}
    assert own <= set(records.__all__) <= set(vars(records))


@pytest.fixture(scope="module")
def trained(zarr_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    train(train_config(zarr_cache, out))
    return out


def without(packages: str, *commands: str) -> tuple[list[str], list[str], set[str]]:
    """Run commands where the packages cannot be imported: exit codes, lines of stderr, and the
    top-level packages that are loaded in the end."""
    code = f"""import sys
sys.modules.update(dict.fromkeys({packages.split()}))
import cli
codes = []
for command in {commands}:
    try:
        cli.main(command.split())
    except SystemExit as ended:
        codes.append(ended.code)
print()
print(*codes)
print(*{{name.partition(".")[0] for name, module in sys.modules.items() if module}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *_, codes, loaded = done.stdout.splitlines()
    return codes.split(), done.stderr.splitlines(), set(loaded.split())


def test_stage_two_needs_no_extra(zarr_cache: Path, tmp_path: Path) -> None:
    """What `pip install sidecache` promises: caches are read, copied, labelled, trained from."""
    with Reader(zarr_cache) as reader:
        lines = [f"{key},{key.split('/')[1]}" for key in reader.keys]
    (tmp_path / "list.csv").write_text("\n".join(["key,label", *lines]) + "\n")
    quick = "--epochs 2 --warmup-epochs 0 --device cpu"
    codes, _, loaded = without(
        EXTRAS,
        "--help",
        f"inspect {zarr_cache}",
        f"verify {zarr_cache}",
        f"copy {zarr_cache} {tmp_path}/c.h5 --taps last:2",
        f"label {tmp_path}/c.h5 {tmp_path}/list.csv",
        f"label {tmp_path}/c.h5 --folds 2 --stratify",
        f"train {zarr_cache} --method last --refit 0,1 {quick} --out {tmp_path}/run",
        f"evaluate {tmp_path}/run --device cpu",
    )
    assert codes == ["0"] * 8
    assert "torch" in loaded
    assert (tmp_path / "run" / "evaluations.jsonl").exists()


@pytest.mark.parametrize(
    ("packages", "expected"),
    [
        (
            EXTRAS,
            {
                "extract {images} --model test_vit --out {out}.h5": "a backbone needs timm",
                "predict {run} {images}": "a backbone needs timm",
                "evaluate {run} {images} --device cpu": "a backbone needs timm",
                "verify {cache} --repair {images}": "a backbone needs timm",
                "models": "a backbone needs timm",
                "demo --out {out}": "a backbone needs timm",
                "label {cache} {images}": "reading images needs pillow",
                "label {cache} torch/image_folder": "a timm data set needs pillow",
                "sweep {cache} --space {cache}/zarr.json --out {out}": "a sweep needs optuna",
                "report {run}": "a report needs jinja2",
            },
        ),
        (
            "torchvision PIL",
            {
                "models": "a backbone needs torchvision",
                "report {run}": "a report needs pillow",
            },
        ),
    ],
    ids=["all extras", "what they bring along"],
)
def test_what_is_missing_is_named_with_the_command_that_adds_it(
    packages: str,
    expected: dict[str, str],
    zarr_cache: Path,
    images: Path,
    trained: Path,
    tmp_path: Path,
) -> None:
    places = {"images": images, "cache": zarr_cache, "run": trained, "out": tmp_path / "out"}
    codes, told, _ = without(packages, *(command.format(**places) for command in expected))
    extras = [c.split()[0] if c.startswith(("sweep", "report")) else "extract" for c in expected]
    assert told == [
        f"sidecache: {needs}, which is not installed: pip install 'sidecache[{extra}]'"
        for needs, extra in zip(expected.values(), extras, strict=True)
    ]
    assert codes == ["1"] * len(expected)
    assert not list(tmp_path.iterdir()), "something was written"


def needs(node: ast.AST, extra: str = "") -> Iterator[tuple[str, str]]:
    """The extra, "" for none, and the distribution of each import of another's package."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.With) and ast.unparse(node).startswith("with needed_for("):
        call = node.items[0].context_expr
        extra = next(
            ast.literal_eval(k.value) for k in ast.walk(call) if isinstance(k, ast.keyword)
        )
    if isinstance(node, ast.Import | ast.ImportFrom):
        for package in {imported.partition(".")[0] for imported in imports(ast.unparse(node))}:
            if package not in {*sys.stdlib_module_names, *IF_THERE, "cache", "cli", "pipeline"}:
                yield extra, DISTRIBUTIONS.get(package, package)
    for child in ast.iter_child_nodes(node):
        yield from needs(child, extra)


def needed(modules: Mapping[str, str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for text in modules.values():
        for extra, distribution in needs(ast.parse(text)):
            found[extra].add(distribution)
    return dict(found)


def test_each_installation_brings_what_is_imported_and_nothing_else() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    extras = parser["options.extras_require"]
    found = needed(sources())
    listed = {
        "": parser["options"]["install_requires"],
        **{name: extras[name] for name in found if name},
    }
    assert found == {
        name: {re.split("[>=]", line)[0] for line in lines.split()}
        for name, lines in listed.items()
    }
    every = re.fullmatch(r"sidecache\[(.+)\]", extras["all"].strip())
    assert every and {"", *every[1].split(",")} == found.keys()
    assert "sidecache[all]" in extras["dev"].split()
    planted = {
        "pipeline.train": "import scipy\nwith needed_for('x', extra='sweep'):\n    import ray"
    }
    assert needed(planted) == {"": {"scipy"}, "sweep": {"ray"}}


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
