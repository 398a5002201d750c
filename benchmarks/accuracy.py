"""Test accuracy of LAST and of the linear probe on real image sets, through the command line.

For every set: extract once; train a grid of members in one pass with the first seed; the validation
split chooses the settings; train those with every seed; read the test split once for each of these
members. What each command answered is kept below --work, so that a run that was stopped goes on
where it was, and no test split is read twice. One JSON line per set.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from measure import print_line

SETS = "sign_digits coil40_azimuth brain_mri cifar10 pacs_sketch"
GRIDS = {
    "linear": {"lr": "1e-3,3e-3,1e-2,3e-2", "pool": "cls,mean"},
    "last": {"lr": "1e-3,4e-3", "pool": "cls,mean"},
}
SIDECACHE = str(Path(sys.executable).with_name("sidecache"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="SET/{train,val,test}/CLASS/…")
    parser.add_argument("--weights", help="weights of the model, a file  [default: timm's own]")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--sets", nargs="+", default=SETS.split())
    parser.add_argument("--work", type=Path, required=True, help="folder to keep everything in")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--linear-lr", default=GRIDS["linear"]["lr"])
    parser.add_argument("--last-lr", default=GRIDS["last"]["lr"])
    parser.add_argument("--epochs", help="of every member  [default: the method's recipe]")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    for name in options.sets:
        measure(options, name)


def measure(options: argparse.Namespace, name: str) -> None:
    stages = Stages(options.work / name, options.device)
    cache = str(stages.folder / "features.zarr")
    weights = ["--weights", options.weights] if options.weights else []
    source = [str(options.data / name), "--model", options.model, *weights]
    extracted = stages.run("extract", ["extract", *source, "--out", cache])
    results = {
        "linear": one_method(stages, "linear", options.linear_lr, cache, options),
        "last": one_method(stages, "last", options.last_lr, cache, options),
    }
    print_line(
        "accuracy",
        device=options.device,
        set=name,
        ratio=results["last"]["top1"] / results["linear"]["top1"],
        baseline="the linear probe, chosen the same way",
        test=results,
        seconds=stages.seconds,
        sizes={"model": options.model, "rows": extracted["rows"], "seeds": options.seeds},
        fingerprint=extracted["fingerprint"],
    )


def one_method(
    stages: Stages, method: str, lr: str, cache: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Choose on validation with the first seed, train with all, measure each on the test split."""
    seeds = options.seeds.split(",")
    train = ["train", cache, "--method", method]
    if options.epochs:
        warmup = "0" if int(options.epochs) < 10 else "3"
        train += ["--epochs", options.epochs, "--warmup-epochs", warmup]
    grid = ["--lr", lr, "--pool", GRIDS[method]["pool"], "--seed", seeds[0]]
    tried = stages.run(
        f"{method}_grid", [*train, *grid, "--out", str(stages.folder / f"{method}_grid")]
    )
    best = max(tried["members"], key=lambda m: (m["val_top1"], -m["val_loss"]))
    chosen = {name: best["settings"][name] for name in ("lr", "pool")}
    run = str(stages.folder / f"{method}_seeds")
    settings = ["--lr", str(chosen["lr"]), "--pool", chosen["pool"], "--seed", options.seeds]
    trained = stages.run(f"{method}_seeds", [*train, *settings, "--out", run])
    tested = [
        stages.run(f"{method}_test_{m['id']}", ["evaluate", run, "--member", m["id"]])
        for m in trained["members"]
    ]
    top1 = [result["top1"] for result in tested]
    return {
        "top1": mean(top1),
        "deviation": stdev(top1) if len(top1) > 1 else None,
        "each": top1,
        "n": tested[0]["n"],
        "chosen": chosen,
        "val_top1": best["val_top1"],
        "members_tried": len(tried["members"]),
    }


class Stages:
    """Commands of one set, each run once: its JSON and its seconds are kept beside its output."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self.seconds: dict[str, float] = {}
        (folder / "stages").mkdir(parents=True, exist_ok=True)

    def run(self, stage: str, arguments: list[str]) -> dict[str, Any]:
        command = [*arguments, "--device", self.device, "--json"]
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
            answer = subprocess.run([SIDECACHE, *command], check=True, stdout=subprocess.PIPE)
            seconds = time.perf_counter() - begin
            kept = {"command": command, "seconds": seconds, "result": json.loads(answer.stdout)}
            partial = record.with_suffix(".partial")
            partial.write_text(json.dumps(kept, indent=1) + "\n")
            partial.replace(record)
        self.seconds[stage] = kept["seconds"]
        return kept["result"]


if __name__ == "__main__":
    main()
