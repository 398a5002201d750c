"""The demo: a ViT pretrained on one rendered task, adapted to two others, by the usual commands.

The backbone (timm's `test_vit`, pretrained by `examples/pretrain_demo_backbone.py` to tell shapes
and textures apart wherever they are) ships with the package; the images are rendered. What this
file makes is a list of command lines, the same that everyone types, and nothing else runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.backbones import timm_models  # noqa: F401  missing? told before rendering
from pipeline.demo.shapes import write_task
from pipeline.runs.run import Run

WEIGHTS = Path(__file__).parent / "backbone.safetensors"
TASKS = ("orientation", "position")
METHODS = ("linear", "last")
TRAIN, VAL, TEST = 1200, 300, 600


@dataclass(frozen=True, kw_only=True)
class Result:
    """One line of the demo's table."""

    task: str
    method: str
    parameters: int
    val_top1: float
    test_top1: float


def render_images(out: Path) -> None:
    """Write the class folders of every task below `out`/images."""
    for seed, task in enumerate(TASKS, start=1):
        write_task(out / "images" / task, task, seed=seed, train=TRAIN, val=VAL, test=TEST)


def commands(out: Path) -> list[list[str]]:
    """The command lines of the demo, without the leading `sidecache`."""
    lines: list[list[str]] = []
    for task in TASKS:
        cache = str(out / f"{task}.zarr")
        images = str(out / "images" / task)
        model = ["--model", "test_vit", "--weights", str(WEIGHTS)]
        lines.append(["extract", images, *model, "--out", cache])
        for method in METHODS:
            run = str(out / f"{task}-{method}")
            lines.append(["train", cache, "--method", method, "--pool", "cls", "--out", run])
            lines.append(["evaluate", run])
    return lines


def results(out: Path) -> list[Result]:
    """Read the table back from the run directories."""
    table = []
    for task in TASKS:
        for method in METHODS:
            run = out / f"{task}-{method}"
            row = Run(run).summary()[0]
            table.append(
                Result(
                    task=task,
                    method=method,
                    parameters=int(row["parameters"]),
                    val_top1=float(row["val_top1"]),
                    test_top1=float(Run(run).evaluations()[-1]["top1"]),
                )
            )
    return table


def draw_curves(out: Path, picture: Path) -> None:
    """Learning curves of all runs, one panel a task, as PNG. Needs matplotlib (ImportError)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours: dict[str, Any] = {"linear": "#8a8f98", "last": "#0b6e99"}
    names = {"linear": "linear probe", "last": "LAST"}
    figure, panels = pyplot.subplots(1, len(TASKS), figsize=(8, 3.2), sharey=True, dpi=150)
    for panel, task in zip(panels, TASKS, strict=True):
        for method in METHODS:
            lines = Run(out / f"{task}-{method}").metrics()
            share = [line["epoch"] / len(lines) for line in lines]
            top1 = [100 * line["val_top1"] for line in lines]
            panel.plot(share, top1, color=colours[method], linewidth=2)
            label = f"{names[method]}  {top1[-1]:.0f} %"
            panel.annotate(
                label, (1, top1[-1]), xytext=(0, -10), textcoords="offset points",
                ha="right", va="top", color=colours[method], fontsize=9,
            )  # fmt: skip
        panel.set_title(f"{task}", loc="left", fontsize=11)
        panel.set_xlabel("share of training done")
        panel.set_xlim(0, 1)
        panel.set_ylim(0, 100)
        panel.grid(axis="y", color="#e6e6e6")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("validation top-1, %")
    figure.tight_layout()
    figure.savefig(picture)
    pyplot.close(figure)
