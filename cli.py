"""The command line: configuration in, one call, tables out.

stdout carries results (`--json` on every command that has one), stderr everything else. Exit
codes: 0; 1 a known error, one line without traceback; 2 usage; 130 and 143 after Ctrl-C and
SIGTERM. What is heavy is imported by the command that needs it, so that help answers at once.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline import __version__
from pipeline.config import (
    CopyConfig,
    EvaluateConfig,
    ExtractConfig,
    LabelConfig,
    PassConfig,
    PredictConfig,
    ReportConfig,
    SweepConfig,
    TrainConfig,
    VerifyConfig,
)
from pipeline.setting import settings_of
from pipeline.terminal.exits import Sidecache
from pipeline.terminal.flags import config_option, flags, json_option, member_flags, refit_option
from pipeline.terminal.progress import (
    Progress,
    copying,
    evaluating,
    extracting,
    predicting,
    searching,
    training,
    verifying,
)
from pipeline.terminal.results import caches, passes, runs

if TYPE_CHECKING:
    from pipeline.records import RefitResult

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(cls=Sidecache, context_settings=CONTEXT)
@click.version_option(__version__, message="%(prog)s %(version)s")
def main() -> None:
    """Cache a frozen vision transformer's layers once; train side networks from the cache alone.

    \b
      sidecache extract photos/ --model vit_base_patch16_224 --out photos.zarr
      sidecache train photos.zarr --method last --out runs/last
      sidecache evaluate runs/last
      sidecache report runs/last
      sidecache predict runs/last new_photos/
    """


# --- stage one --------------------------------------------------------------------------------


@main.command(params=flags(ExtractConfig))
@json_option
@config_option
def extract(as_json: bool, **values: Any) -> None:
    """Run the frozen backbone over IMAGES once and write its layers' tokens to a cache.

    IMAGES is a folder with a folder per class (or train/, val/, test/ above those), a CSV with
    path,label[,split], a VTAB-1K task folder, a .tar, or a timm dataset string. In place of label,
    a CSV may have any of label:NAME, labels:NAME (a;b) and value:NAME. Run the same command
    again to continue after an interruption; a complete cache is left alone. --update computes
    images that are new or changed since, and those alone.

    \b
    Example:
      sidecache extract photos/ --model vit_base_patch16_224 --out photos.zarr
    """
    from pipeline import extract as stage

    config = ExtractConfig(**values)
    with Progress() as progress:
        result = stage.extract(config, extracting(progress, config))
    caches.show_extract(config, result, as_json)


@main.command()
@click.argument("cache")
@json_option
def inspect(cache: str, as_json: bool) -> None:
    """Say what a cache is: identity, shapes, bytes, splits, and whether it is complete.

    \b
    Example:
      sidecache inspect photos.zarr --json
    """
    from cache import inspect as inspect_cache

    caches.show_inspect(cache, inspect_cache(cache), as_json)


@main.command(params=flags(VerifyConfig))
@json_option
def verify(as_json: bool, **values: Any) -> None:
    """Recompute every checksum of a cache; name the files and rows that are damaged.

    With --repair, damaged rows are computed again, and nothing else. Exits with 1 if anything is
    damaged, or stays so.

    \b
    Examples:
      sidecache verify photos.zarr
      sidecache verify photos.zarr --repair photos/
    """
    from cache import verify as verify_cache

    config = VerifyConfig(**values)
    with Progress() as progress:
        repaired = None
        if config.repair is not None:
            from pipeline.repair import repair

            repaired = repair(config, verifying(progress))
        result = verify_cache(config.cache, verifying(progress))
    caches.show_verify(config.cache, result, repaired, as_json)
    if not result.ok:
        raise SystemExit(1)


@main.command(params=flags(LabelConfig))
@click.option("--show", is_flag=True, help="Print the labelling as CSV; change nothing.")
@json_option
def label(as_json: bool, show: bool, **values: Any) -> None:
    """Ask other things of a cache's rows: labels, splits, groups, folds. No feature is computed.

    SOURCE is a list, .csv or .tsv with path or key and any of label, label:NAME, labels:NAME,
    value:NAME, split, fold; or anything that `extract` takes. What it does not speak of stays. The
    labelling is replaced in one step.

    \b
    Examples:
      sidecache label photos.zarr corrected.csv
      sidecache label photos.zarr --folds 5 --stratify
      sidecache label photos.zarr --show > labels.csv
    """
    from pipeline import label as stage

    if show:
        caches.print_labelling(stage.columns_of(values["cache"]))
    else:
        caches.show_label(stage.label(LabelConfig(**values)), as_json)


@main.command(params=flags(CopyConfig))
@json_option
def copy(as_json: bool, **values: Any) -> None:
    """Make a smaller cache DST from the cache SRC: fewer taps, their sum, another storage type.

    No backbone is loaded. DST may have the other format; the same command continues a copy that
    was interrupted.

    \b
    Example:
      sidecache copy photos.zarr sums.h5 --gather sum --dtype int8
    """
    from pipeline import copy as stage

    config = CopyConfig(**values)
    with Progress() as progress:
        result = stage.copy(config, copying(progress))
    caches.show_copy(config, result, as_json)


# --- stage two --------------------------------------------------------------------------------


@main.command(params=flags(PassConfig, member_flags()))
@refit_option
@json_option
@config_option
def train(as_json: bool, method: list[str], refit: list[int] | None, **values: Any) -> None:
    """Train side networks from CACHE alone; no backbone is loaded.

    Every setting takes a comma list, and lists multiply: all members train in one pass. Settings
    left out come from the method's recipe (docs/methods.md). The same command continues a killed
    run.

    \b
    Example:
      sidecache train photos.zarr --method last --lr 1e-3,4e-3 --out runs/last
    """
    from pipeline import train as stage
    from pipeline.training.members import make_members

    shared = {name: values.pop(name) for name in settings_of(PassConfig)}
    axes = {name: chosen for name, chosen in values.items() if chosen is not None}
    config = TrainConfig(members=make_members(method, axes), **shared)
    with Progress() as progress:
        result = stage.train(config, training(progress))
        refitted = _refit(progress, config, refit)
    passes.show_train(config.out, result, refitted, as_json)


def _refit(progress: Progress, config: PassConfig, seeds: list[int] | None) -> RefitResult | None:
    if not seeds:
        return None
    from pipeline.train import refit

    report = training(progress, "refitting")
    return refit(config.out, seeds, report, overwrite=config.overwrite)


@main.command(params=flags(SweepConfig))
@refit_option
@json_option
@config_option
def sweep(as_json: bool, refit: list[int] | None, **values: Any) -> None:
    """Search the settings in --space: propose members, train many in one pass, repeat.

    Every setting of `train` may stand in the space; what it leaves out comes from the method's
    recipe. Validation ranks. RUN is then a run directory like that of `train`, with all members.
    The same command continues a killed sweep; with more --trials it goes on.

    \b
    Example:
      sidecache sweep photos.zarr --space examples/space.yaml --trials 64 --out runs/sweep
    """
    from pipeline import sweep as stage

    config = SweepConfig(**values)
    with Progress() as progress:
        result = stage.sweep(config, searching(progress))
        refitted = _refit(progress, config, refit)
    passes.show_sweep(config.out, result, refitted, as_json)


@main.command(params=flags(EvaluateConfig))
@json_option
def evaluate(as_json: bool, **values: Any) -> None:
    """Score trained members of RUN on a split: from the cache, or live from IMAGES.

    What is measured is also appended to RUN/evaluations.jsonl.

    \b
    Example:
      sidecache evaluate runs/last --split test
    """
    from pipeline import evaluate as stage

    config = EvaluateConfig(**values)
    with Progress() as progress:
        evaluations = stage.evaluate(config, evaluating(progress))
    runs.show_evaluate(config.run, evaluations, as_json)


@main.command(params=flags(ReportConfig))
@json_option
def report(as_json: bool, **values: Any) -> None:
    """Write one page about finished RUNS: leaderboard, curves, settings, mistakes, cost.

    The page is one HTML file that needs no network. Mistakes are those on the validation split;
    test rows are never read here. The page of several runs is report.html in this folder, and
    ranks members together where they learned the same task from the same images.

    \b
    Example:
      sidecache report runs/last --images photos/
    """
    from pipeline import report as stage

    runs.show_report(stage.report(ReportConfig(**values)), as_json)


@main.command(params=flags(PredictConfig))
@click.option("--csv", "csv_file", type=click.Path(dir_okay=False), help="Write a CSV instead.")
@json_option
def predict(as_json: bool, csv_file: str | None, **values: Any) -> None:
    """Classify PHOTOS (files or folders) with a trained member of RUN.

    A photograph that cannot be read is named on stderr, the others go on; the exit code is then 1.

    \b
    Example:
      sidecache predict runs/last holiday/ --top-k 3 --csv holiday.csv
    """
    from pipeline import predict as stage

    with Progress() as progress:
        found = stage.predict(PredictConfig(**values), predicting(progress))
    runs.show_predict(found, csv_file, as_json)
    if any(prediction.error for prediction in found):
        raise SystemExit(1)


@main.command()
@click.argument("pattern", default="")
def models(pattern: str) -> None:
    """List timm's backbones whose names match PATTERN: plain ViTs, then those in stages.

    Every method works on plain ViTs; linear, attentive and lst on the others too.

    \b
    Example:
      sidecache models '*dinov2*'
    """
    from pipeline.backbones.timm_models import list_models

    for name in list_models(pattern):
        click.echo(name)


@main.command()
@click.option("--out", default="demo", show_default=True, type=click.Path(), help="Folder to make.")
def demo(out: str) -> None:
    """Offline tour: render images, extract, train a linear probe and LAST, evaluate, compare.

    Runs the same commands as everyone, and shows them. About two minutes on two cores.

    \b
    Example:
      sidecache demo --out demo
    """
    from pipeline.demo import tour

    folder, begin = Path(out), time.perf_counter()
    click.echo("Rendering images of two tasks that the backbone was not trained for …")
    tour.render_images(folder)
    for command in tour.commands(folder):
        click.secho(f"\n$ sidecache {shlex.join(command)}", bold=True)
        main.main(command, standalone_mode=False)
    click.echo()
    runs.show_demo(tour.results(folder))
    try:
        tour.draw_curves(folder, folder / "curves.png")
        click.echo(f"\nLearning curves: {folder / 'curves.png'}")
    except ImportError:
        click.echo("\n(no picture: pip install matplotlib)", err=True)
    click.echo(f"Caches and runs: {folder}/  ({time.perf_counter() - begin:.0f} s)")


if __name__ == "__main__":
    main(prog_name="sidecache")
