"""Test accuracy of every method on real image sets, through the command line.

For every set and method: a small grid of members is trained in one pass with the first seed; the
validation split chooses; the winner is trained with the other seeds; each of these members reads
the test split once. Variants of a method (LST's starts, MIET's storage types) take the settings
that were chosen for its first. What each command answered is kept below --work, so that a run that
was stopped goes on where it was, and no test split is read twice. One JSON line per set.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from measure import AMP, add_compute_flags, print_line, width_of

SETS = "sign_digits coil40_azimuth brain_mri cifar10 pacs_sketch"


@dataclass(frozen=True)
class System:
    """A row of the table: a method, the cache that it trains from, its grid, its fixed flags."""

    method: str
    cache: str
    grid: dict[str, str]
    fixed: dict[str, str] = field(default_factory=dict)
    like: str | None = None  # take the settings chosen for that system


SIDE_LR = "2e-3,5e-3"
HALF = {"keep-layers": "every:2"}  # as for T5-large: 6 of a ViT-Ti's 12
SYSTEMS = {
    "linear": System("linear", "full", {"lr": "3e-3,1e-2,3e-2", "pool": "cls,mean"}),
    "attentive": System("attentive", "full", {"lr": "5e-4,2e-3"}),
    "lst_random": System("lst", "full", {"lr": SIDE_LR}, {**HALF, "init": "random"}),
    "lst_magnitude": System("lst", "magnitude", {}, {**HALF, "init": "pruned"}, like="lst_random"),
    "lst_fisher": System("lst", "full", {}, {**HALF, "init": "pruned"}, like="lst_random"),
    "miet_float32": System("miet", "sum_float32", {"lr": SIDE_LR}),
    "miet_float16": System("miet", "sum_float16", {}, like="miet_float32"),
    "miet_int8": System("miet", "sum_int8", {}, like="miet_float32"),
    "miet_normsum": System("miet", "full", {}, {"gather": "normsum"}, like="miet_float32"),
    "miet_3_sums": System("miet", "full", {}, {"groups": "3", "modules": "6"}, like="miet_float32"),
    "miet_head_last": System("miet", "full", {}, {"head": "last"}, like="miet_float32"),
    "last": System("last", "full", {"lr": SIDE_LR}),
}
CACHES = {  # how each is made: flags of extract, or the cache it is copied from and flags of copy
    "full": ["extract", "--ladder-init", "fisher"],
    "magnitude": ["extract", "--ladder-init", "magnitude"],
    "sum_float32": ["extract", "--gather", "sum", "--dtype", "float32"],
    "sum_float16": ["copy", "sum_float32", "--dtype", "float16"],
    "sum_int8": ["copy", "sum_float32", "--dtype", "int8"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="SET/{train,val,test}/CLASS/…")
    parser.add_argument("--weights", help="weights of the model, a file  [default: timm's own]")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--sets", nargs="+", default=SETS.split())
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--work", type=Path, required=True, help="folder to keep everything in")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", help="of every side network  [default: the method's recipe]")
    add_compute_flags(parser)
    parser.add_argument(
        "--sidecache", default=str(Path(sys.executable).with_name("sidecache")), help="the command"
    )
    parser.add_argument("--keep-caches", action="store_true", help="do not delete them at the end")
    options = parser.parse_args()
    for name in options.sets:
        measure(options, name)


def measure(options: argparse.Namespace, name: str) -> None:
    stages = Stages(options.work / name, options)
    results = {}
    for system in options.systems:
        cache = make_cache(stages, SYSTEMS[system].cache, name, options)
        results[system] = one_system(stages, system, cache, options, results)
        top1, deviation = results[system]["top1"], results[system]["deviation"] or 0.0
        print(f"{name} {system}: {top1:.1%} ± {deviation:.1%}", file=sys.stderr)
    baseline = results.get("linear")
    print_line(
        "accuracy",
        computing=options,
        set=name,
        ratio=results["last"]["top1"] / baseline["top1"]
        if baseline and "last" in results
        else None,
        baseline="the linear probe, chosen the same way",
        test=results,
        seconds=stages.seconds,
        sizes={
            "model": options.model,
            "dim": width_of(options.model),
            "seeds": options.seeds,
            "epochs": options.epochs,
        },
    )
    if not options.keep_caches:
        for cache in stages.folder.glob("*.zarr"):
            shutil.rmtree(cache)


def make_cache(stages: Stages, kind: str, name: str, options: argparse.Namespace) -> str:
    """Extract or copy, unless it was done; the location."""
    out = str(stages.folder / f"{kind}.zarr")
    command, *flags = CACHES[kind]
    if command == "copy":
        source = make_cache(stages, flags[0], name, options)
        stages.run(kind, ["copy", source, out, *flags[1:]], where=False)
    else:
        weights = ["--weights", options.weights] if options.weights else []
        source = [str(options.data / name), "--model", options.model, *weights]
        stages.run(kind, ["extract", *source, "--out", out, *flags])
    return out


def one_system(
    stages: Stages,
    name: str,
    cache: str,
    options: argparse.Namespace,
    results: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Choose on validation with the first seed, train with all, measure each on the test split."""
    system = SYSTEMS[name]
    first, *others = options.seeds.split(",")
    train = ["train", cache, "--method", system.method, *flags_of(system.fixed)]
    if options.epochs and system.method != "linear":
        train += ["--epochs", options.epochs]
    grid, rest = (str(stages.folder / f"{name}_{part}") for part in ("grid", "seeds"))
    axes = results[system.like]["chosen"] if system.like else system.grid
    tried = stages.run(f"{name}_grid", [*train, *flags_of(axes), "--seed", first, "--out", grid])
    best = max(tried["members"], key=lambda m: (m["val_top1"], -m["val_loss"]))
    chosen = {axis: str(best["settings"][axis]) for axis in axes}
    members = [(grid, best["id"])]
    if others:
        seeds = ["--seed", ",".join(others), "--out", rest]
        trained = stages.run(f"{name}_seeds", [*train, *flags_of(chosen), *seeds])
        members += [(rest, member["id"]) for member in trained["members"]]
    top1 = [
        stages.run(f"{name}_test_{seed}", ["evaluate", run, "--member", member, "--cache", cache])[
            "top1"
        ]
        for seed, (run, member) in zip([first, *others], members, strict=True)
    ]
    return {
        "top1": mean(top1),
        "deviation": stdev(top1) if len(top1) > 1 else None,
        "each": top1,
        "chosen": chosen,
        "val_top1": best["val_top1"],
        "members_tried": len(tried["members"]),
    }


def flags_of(settings: dict[str, str]) -> list[str]:
    """{"lr": "1e-3"} → ["--lr", "1e-3"]."""
    return [part for name, value in settings.items() for part in (f"--{name}", value)]


class Stages:
    """Commands of one set, each run once: its JSON and its seconds are kept beside its output."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.sidecache = folder, options.sidecache
        amp = {None: [], True: ["--amp"], False: ["--no-amp"]}[AMP[options.precision]]
        self.where = ["--device", options.device, *amp]
        self.seconds: dict[str, float] = {}
        (folder / "stages").mkdir(parents=True, exist_ok=True)

    def run(self, stage: str, arguments: list[str], *, where: bool = True) -> dict[str, Any]:
        """The answer of a command; `where` if it computes, and has to be told on what."""
        command = [*arguments, *(self.where if where else []), "--json"]
        record = self.folder / "stages" / f"{stage}.json"
        if record.exists():
            kept = json.loads(record.read_text())
            if kept["command"] != command:
                raise SystemExit(
                    f"{record}: made by `sidecache {' '.join(kept['command'])}`, asked for is "
                    f"`sidecache {' '.join(command)}`. Choose another --work."
                )
        else:
            print(f"{self.folder.name}: {stage}", file=sys.stderr)
            begin = time.perf_counter()
            answer = subprocess.run([self.sidecache, *command], check=True, stdout=subprocess.PIPE)
            seconds = time.perf_counter() - begin
            kept = {"command": command, "seconds": seconds, "result": json.loads(answer.stdout)}
            partial = record.with_suffix(".partial")
            partial.write_text(json.dumps(kept, indent=1) + "\n")
            partial.replace(record)
        self.seconds[stage] = kept["seconds"]
        return kept["result"]


if __name__ == "__main__":
    main()
