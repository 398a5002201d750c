"""VTAB-1K: choose on 800 / 200 images, train on all 1,000, read the test set once; 19 tasks.

    python examples/vtab.py vtab-1k/ --out runs/vtab --model vit_base_patch16_224.orig_in21k \\
        -- --lr 1e-3,4e-3 --drop-path 0,0.1 --epochs 110 --warmup-epochs 10

Flags after `--` go to `sidecache train`: comma lists are the grid. For each task folder of FOLDER
(with train800.txt, val200.txt, test.txt and their images) three commands run, nothing else:

    sidecache extract   the backbone, once over all images, resized directly as the protocol says
    sidecache train     the grid on train800, chosen on val200; --refit trains the best setting on
                        both with every seed
    sidecache evaluate  these members on the test split

Stop it whenever you like: the same line goes on where it was, a task with a result is not touched
again, and no member reads a test set twice (evaluations.jsonl of the refit is looked at first).
--tasks shares the work among machines that see one --out.

    OUT/caches/TASK.zarr          shared by all methods
    OUT/NAME/TASK/run/            the grid; run/refit/ the members that were tested
    OUT/NAME/TASK/result.json     written last: this task is done
    OUT/NAME/results.jsonl        all results, then both averages

Disk: an image takes 3.93 MB with all 13 taps of a ViT-B/16 in float16. The test sets have 388,000
images: 1.6 TB in all, 294 GB for either dSprites task. --delete-caches removes each cache after its
result (294 GB at the peak); --taps and --extract="--dtype int8" make them smaller.

Protocol and groups: Zhai et al., https://arxiv.org/abs/1910.04867. Folders are named as NOAH's
data/vtab-source/get_vtab1k.py writes them (https://github.com/ZhangYuanhan-AI/NOAH), direct
resizing as in its --direct_resize; mean and deviation of pixels are the backbone's own.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

GROUPS = {
    "natural": [
        "cifar", "caltech101", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397",
    ],
    "specialized": ["patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy"],
    "structured": [
        "clevr_count", "clevr_dist", "dmlab", "kitti", "dsprites_loc", "dsprites_ori",
        "smallnorb_azi", "smallnorb_ele",
    ],
}  # fmt: skip
GROUP_OF = {task: group for group, tasks in GROUPS.items() for task in tasks}
LISTS = ("train800.txt", "val200.txt", "test.txt")
RESIZE = ["--crop-pct", "1", "--crop-mode", "squash", "--interpolation", "bicubic"]
OURS = {
    "--device", "--method", "--out", "--overwrite", "--refit", "--train-split", "--val-split",
}  # fmt: skip

Record = dict[str, Any]
Sidecache = Callable[[list[str]], Record]  # a command's arguments → what it answers with --json


def main(arguments: Sequence[str] | None = None, sidecache: Sidecache | None = None) -> None:
    options = parse(sys.argv[1:] if arguments is None else list(arguments))
    command = sidecache or (lambda words: run_command(options.sidecache, words))
    check_results(options)
    tasks = find_tasks(options.folder, options.tasks)
    for number, task in enumerate(tasks, start=1):
        result = options.out / options.name / task / "result.json"
        if not result.exists():
            note(f"{task} ({number} of {len(tasks)})")
            write(result, json.dumps(run_task(task, options, command), indent=1))
        if options.delete_caches:
            delete(cache_of(task, options))
    records = read_results(options)
    both = averages(records)
    lines = [json.dumps(line) for line in (*records, *both)]
    write(options.out / options.name / "results.jsonl", "\n".join(lines))
    print_table(records, both)
    kept = sum(r["cache_bytes"] for r in records if cache_of(r["task"], options).exists())
    if kept:
        note(f"{options.out / 'caches'}: {gigabytes(kept)}; --delete-caches removes them")


def parse(arguments: list[str]) -> argparse.Namespace:
    ours, train = arguments, []
    if "--" in arguments:
        cut = arguments.index("--")
        ours, train = arguments[:cut], arguments[cut + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s FOLDER --model NAME --out OUT [options] [-- flags of `sidecache train`]",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="holds a folder a task, in NOAH's layout")
    parser.add_argument("--model", required=True, help="timm's name of the backbone")
    parser.add_argument("--out", type=Path, required=True, help="folder to keep everything in")
    parser.add_argument("--method", default="last", help="of `sidecache train`  [default: last]")
    parser.add_argument("--name", help="of the results below OUT  [default: the method]")
    parser.add_argument("--seeds", default="0,1,2", help="of the refit  [default: 0,1,2]")
    parser.add_argument("--tasks", help="only these, with commas  [default: all that FOLDER has]")
    parser.add_argument("--weights", help="weights of the backbone, a file  [default: timm's own]")
    parser.add_argument("--taps", default="all", help="of `sidecache extract`  [default: all]")
    parser.add_argument(
        "--extract", default="", metavar='"FLAGS"', help="more of its flags, in quotes after an ="
    )
    parser.add_argument("--delete-caches", action="store_true", help="each, once it was tested")
    parser.add_argument("--device", default="auto", help="[default: auto]")
    parser.add_argument("-j", "--workers", default="2", help="decoding processes  [default: 2]")
    parser.add_argument(
        "--sidecache", default=str(Path(sys.executable).with_name("sidecache")), help="the command"
    )
    options = parser.parse_args(ours)
    taken = sorted({word.partition("=")[0] for word in train} & OURS)
    if taken:
        parser.error(f"{', '.join(taken)} after `--`: the protocol sets these itself")
    options.train = train
    options.name = options.name or options.method
    if options.name == "caches":
        parser.error("--name caches: that folder is for the caches")
    try:
        options.seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds {options.seeds}: expected whole numbers with commas")
    options.settings = {  # what decides a result; device and workers do not
        "model": options.model,
        "weights": options.weights,
        "taps": options.taps,
        "extract": shlex.split(options.extract),
        "method": options.method,
        "train": train,
        "seeds": options.seeds,
    }
    return options


def find_tasks(folder: Path, wanted: str | None) -> list[str]:
    """The tasks to run, in the order of the tables; says what is missing, misnamed, incomplete."""
    names = wanted.split(",") if wanted else list(GROUP_OF)
    unknown = [name for name in names if name not in GROUP_OF]
    if unknown:
        fail(f"--tasks: no task {', '.join(unknown)}; there are {', '.join(GROUP_OF)}")
    if not folder.is_dir():
        fail(f"{folder}: no such folder; expected one that holds {', '.join(GROUP_OF)}")
    there = {path.name for path in folder.iterdir() if path.is_dir()}
    if wanted and (absent := [name for name in names if name not in there]):
        fail(f"{folder}: no folder {', '.join(absent)}")
    found = [task for task in GROUP_OF if task in names and task in there]
    if not found:
        fail(f"{folder}: none of the folders {', '.join(GROUP_OF)}; there is {sorted(there)}")
    if strange := sorted(there - GROUP_OF.keys()):
        note(f"{folder}: {', '.join(strange)} not used: no names of VTAB-1K tasks")
    incomplete = [
        str(folder / task / name)
        for task in found
        for name in LISTS
        if not (folder / task / name).is_file()
    ]
    if incomplete:
        fail(f"missing: {', '.join(incomplete)}; each task needs {', '.join(LISTS)}")
    return found


def run_task(task: str, options: argparse.Namespace, sidecache: Sidecache) -> Record:
    """Extract, choose, refit, test. Each command does nothing if it was done, or goes on."""
    cache, run = cache_of(task, options), options.out / options.name / task / "run"
    weights = ["--weights", options.weights] if options.weights else []
    seeds = ",".join(str(seed) for seed in options.seeds)
    extracted = sidecache([
        "extract", str(options.folder / task), "--model", options.model, *weights,
        "--taps", options.taps, *RESIZE, *options.settings["extract"], "--out", str(cache),
        "-j", options.workers, "--device", options.device, "--json",
    ])  # fmt: skip
    note(f"{task}: {extracted['rows']:,} images cached, {gigabytes(extracted['bytes'])}")
    trained = sidecache([
        "train", str(cache), "--method", options.method, *options.train, "--refit", seeds,
        "--out", str(run), "--device", options.device, "--json",
    ])  # fmt: skip
    tested = evaluate_once(run / "refit", cache, options, sidecache)
    each = [record["top1"] for record in tested]
    (winner,) = trained["refit"]["winners"]
    return {
        "task": task,
        "group": GROUP_OF[task],
        **spread(each),
        "n": tested[0]["n"],
        "val_top1": winner["val"],
        "chosen": chosen(winner, trained["members"]),
        "members_tried": len(trained["members"]),
        "cache_bytes": extracted["bytes"],
        "settings": options.settings,
    }


def evaluate_once(
    refit: Path, cache: Path, options: argparse.Namespace, sidecache: Sidecache
) -> list[Record]:
    """The test record of each member of the refit: the first there is, or a new one."""
    members = [f"m{position}" for position in range(len(options.seeds))]
    done = test_records(refit, cache)
    missing = [member for member in members if member not in done]
    if missing:
        sidecache([
            "evaluate", str(refit), "--member", ",".join(missing), "--split", "test",
            "--cache", str(cache), "--device", options.device, "--json",
        ])  # fmt: skip
        done = test_records(refit, cache)
    return [done[member] for member in members]


def test_records(refit: Path, cache: Path) -> dict[str, Record]:
    """Member → its first record of the test split of the task's cache, from evaluations.jsonl."""
    path = refit / "evaluations.jsonl"
    found: dict[str, Record] = {}
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            fail(f"{path}, line {number}: not a whole record; remove this line and go on")
        if record["split"] == ["test"] and Path(record["source"]).name == cache.name:
            found.setdefault(record["member"], record)
    return found


def chosen(winner: Record, members: list[Record]) -> Record:
    """The winner's values of what varied in the grid; seeds are averaged, not chosen."""
    settings = [{"method": m["method"], **m["settings"]} for m in members]
    found = {"method": winner["method"], **winner["settings"]}
    return {
        name: value
        for name, value in found.items()
        if len({str(one.get(name)) for one in settings}) > 1
    }


# ---- results ------------------------------------------------------------------------------------


def spread(each: list[float]) -> Record:
    deviation = stdev(each) if len(each) > 1 else None
    return {"top1": mean(each), "deviation": deviation, "each": each}


def averages(records: list[Record]) -> list[Record]:
    """Both averages in use, each over the seeds; their names say what they lack."""
    in_group = {
        group: [r["each"] for r in records if r["group"] == group]
        for group in GROUPS
        if any(r["group"] == group for r in records)
    }
    of_tasks = mean_by_seed([record["each"] for record in records])
    of_groups = mean_by_seed([mean_by_seed(each) for each in in_group.values()])
    missing = {"missing": [task for task in GROUP_OF if task not in {r["task"] for r in records}]}
    tasks, groups = len(records), len(in_group)
    name = "mean over the 19 tasks" if tasks == 19 else f"mean over {tasks} of the 19 tasks"
    name_of_groups = "mean of the three group means"
    if groups < len(GROUPS):
        lacking = ", ".join(group for group in GROUPS if group not in in_group)
        name_of_groups = f"mean of {groups} of the three group means (no {lacking})"
    elif tasks < 19:
        counts = ", ".join(f"{g} {len(in_group[g])} of {len(GROUPS[g])}" for g in GROUPS)
        name_of_groups += f" ({counts} tasks)"
    by_group = {"groups": {g: spread(mean_by_seed(each)) for g, each in in_group.items()}}
    return [
        {"average": name, **spread(of_tasks), **missing},
        {"average": name_of_groups, **spread(of_groups), **by_group, **missing},
    ]


def mean_by_seed(rows: list[list[float]]) -> list[float]:
    return [mean(values) for values in zip(*rows, strict=True)]


def print_table(records: list[Record], both: list[Record]) -> None:
    seeds = len(records[0]["each"])
    done = {record["task"]: record for record in records}
    title = f"test top-1, % (mean of {seeds} seeds)" if seeds > 1 else "test top-1, %"
    lines = [["task", title, "val", "test images", "chosen"]]
    for group, tasks in GROUPS.items():
        there = [done[task] for task in tasks if task in done]
        for task in tasks:
            if task in done:
                record = done[task]
                told = ", ".join(f"{name} {value}" for name, value in record["chosen"].items())
                numbers = [f"{record['val_top1']:.1%}"[:-1], f"{record['n']:,}"]
                lines.append([task, percent(record), *numbers, told])
            else:
                lines.append([task, "missing", "", "", ""])
        count = f"{group} ({len(there)} of {len(tasks)} tasks)"
        lines.append([f"= {count}", percent(both[1]["groups"].get(group)), "", "", ""])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip())
    for average in both:
        print(f"{average['average']}: {percent(average)}")
    if missing := both[0]["missing"]:
        print(f"Not VTAB-1K's averages: {len(missing)} of 19 tasks missing ({', '.join(missing)})")


def percent(score: Record | None) -> str:
    if score is None:
        return "missing"
    deviation = "" if score["deviation"] is None else f" ± {100 * score['deviation']:.2f}"
    return f"{100 * score['top1']:.2f}{deviation}"


def read_results(options: argparse.Namespace) -> list[Record]:
    """Of all tasks that are done, those of earlier calls too, in the order of the tables."""
    paths = [options.out / options.name / task / "result.json" for task in GROUP_OF]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def check_results(options: argparse.Namespace) -> None:
    """Results of other settings may not stand in one table with these."""
    for record in read_results(options):
        differing = [
            f"{name}: {record['settings'].get(name)!r} there, {value!r} asked for"
            for name, value in options.settings.items()
            if record["settings"].get(name) != value
        ]
        if differing:
            fail(
                f"{options.out / options.name}: {record['task']} was done with other settings:\n  "
                + "\n  ".join(differing)
                + "\nChoose another --name (caches are shared) or another --out."
            )


# ---- files and commands -------------------------------------------------------------------------


def cache_of(task: str, options: argparse.Namespace) -> Path:
    return options.out / "caches" / f"{task}.zarr"


def delete(cache: Path) -> None:
    """Renamed first: a half-deleted cache never bears a cache's name."""
    doomed = cache.with_suffix(".deleted")
    if doomed.exists():
        shutil.rmtree(doomed)
    if cache.exists():
        cache.rename(doomed)
        shutil.rmtree(doomed)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(path)


def run_command(sidecache: str, words: list[str]) -> Record:
    note(f"$ sidecache {shlex.join(words)}")
    done = subprocess.run([sidecache, *words], stdout=subprocess.PIPE)
    if done.returncode:
        fail(
            f"`sidecache {words[0]}` ended with exit code {done.returncode}; the same call goes on"
        )
    return json.loads(done.stdout)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def fail(text: str) -> None:
    raise SystemExit(f"vtab.py: {text}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("vtab.py: interrupted; the same call goes on from there") from None
