"""The command line: configuration in, one call, tables out.

stdout carries results (`--json` on every command that has one), stderr everything else. Exit
codes: 0; 1 a known error, one line without traceback; 2 usage; 130 and 143 after Ctrl-C and
SIGTERM. What is heavy is imported by the command that needs it, so that help answers at once.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any

import click

from pipeline import __version__
from pipeline.terminal import results
from pipeline.terminal.exits import Sidecache
from pipeline.terminal.flags import (
    STORAGE_TYPES,
    CommaList,
    ImageSize,
    Names,
    Triple,
    Words,
    compute_options,
    config_option,
    dataset_options,
    gather_options,
    json_option,
    pass_options,
)
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
from pipeline.terminal.tables import print_json, varying

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


@main.command()
@click.argument("images")
@click.option("--model", required=True, help="timm's name of a backbone (`sidecache models`).")
@click.option("--out", required=True, help="The cache: a folder F.zarr or a file F.h5.")
@click.option("--weights", type=click.Path(), help="Weights from a file, not the hub.")
@click.option("--pretrained/--no-pretrained", default=True, help="Random weights, from --seed.")
@click.option("--split", type=Names(), help="Only these splits, e.g. train,val.")
@dataset_options
@click.option("--dataset-download", is_flag=True, help="Let torch/… fetch what is not there.")
@click.option("--taps", default="all", show_default=True, help="all, 0,3,6, every:N or last:N.")
@gather_options
@click.option(
    "--dtype",
    type=click.Choice(STORAGE_TYPES),
    default="float16",
    show_default=True,
    help="Storage type; int8 has one scale a token.",
)
@click.option(
    "--ladder-init",
    type=click.Choice(["magnitude", "fisher"]),
    help="Keep pruned backbone weights for LST to start from.",
)
@click.option("--reduction", default=8, show_default=True, help="LST's r, with --ladder-init.")
@click.option(
    "--keep-layers", default="all", show_default=True, help="LST's layers, with --ladder-init."
)
@click.option(
    "--fisher-samples", default=1024, show_default=True, help="Training images weighed by."
)
@click.option("--img-size", type=ImageSize(), help="Input side.  [default: the model's own]")
@click.option("--crop-pct", type=float, help="Share kept by the centre crop.")
@click.option("--crop-mode", type=click.Choice(["center", "squash", "border"]))
@click.option("--interpolation", help="bicubic, bilinear, …")
@click.option("--mean", type=Triple(), help="Normalisation mean.")
@click.option("--std", type=Triple(), help="Normalisation deviation.")
@click.option("-b", "--batch-size", default=64, show_default=True)
@click.option("-j", "--workers", default=2, show_default=True, help="Decoding processes.")
@compute_options
@click.option("--seed", default=0, show_default=True, help="Of --no-pretrained's weights.")
@click.option(
    "--on-error",
    type=click.Choice(["raise", "skip"]),
    default="raise",
    show_default=True,
    help="What an unreadable image does.",
)
@click.option("--overwrite", is_flag=True, help="Replace a cache of another identity.")
@json_option
@config_option
def extract(as_json: bool, **values: Any) -> None:
    """Run the frozen backbone over IMAGES once and write its layers' tokens to a cache.

    IMAGES is a folder with a folder per class (or train/, val/, test/ above those), a CSV with
    path,label[,split], a VTAB-1K task folder, a .tar, or a timm dataset string. In place of label,
    a CSV may have any of label:NAME, labels:NAME (a;b) and value:NAME. Run the same command
    again to continue after an interruption; a complete cache is left alone.

    \b
    Example:
      sidecache extract photos/ --model vit_base_patch16_224 --out photos.zarr
    """
    from pipeline import extract as stage
    from pipeline.config import ExtractConfig

    config = ExtractConfig(**values)
    with Progress() as progress:
        result = stage.extract(config, extracting(progress, config))
    if as_json:
        print_json(results.extract_json(result))
    else:
        results.show_extract(config, result)


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

    found = inspect_cache(cache)
    if as_json:
        print_json(found.to_dict())
    else:
        results.show_inspect(cache, found)


@main.command()
@click.argument("cache")
@json_option
def verify(cache: str, as_json: bool) -> None:
    """Recompute every checksum of a cache; name the files and rows that are damaged.

    Exits with 1 if anything is damaged.

    \b
    Example:
      sidecache verify photos.zarr
    """
    from cache import verify as verify_cache

    with Progress() as progress:
        result = verify_cache(cache, verifying(progress))
    if as_json:
        print_json(results.verify_json(result))
    else:
        results.show_verify(cache, result)
    if not result.ok:
        raise SystemExit(1)


@main.command()
@click.argument("src")
@click.argument("dst")
@click.option("--taps", default="all", show_default=True, help="all, 0,3,6, every:N or last:N.")
@gather_options
@click.option("--dtype", type=click.Choice(STORAGE_TYPES), help="Storage type.  [default: SRC's]")
@click.option("--split", type=Names(), help="Only these splits, e.g. train,val.")
@click.option("--overwrite", is_flag=True, help="Replace a cache of another identity.")
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
    from pipeline.config import CopyConfig

    config = CopyConfig(**values)
    with Progress() as progress:
        result = stage.copy(config, copying(progress))
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        results.show_copy(config, result)


# --- stage two --------------------------------------------------------------------------------


@main.command()
@click.argument("cache")
@click.option(
    "--method", type=CommaList(str), required=True, help="last, lst, miet, attentive, linear."
)
@click.option("--out", required=True, help="The run directory to make, or to continue.")
@click.option("--lr", type=CommaList(float), help="Learning rate.")
@click.option("--weight-decay", type=CommaList(float), help="Not on biases and norms.")
@click.option("--epochs", type=CommaList(int), help="With the warm-up.")
@click.option("--warmup-epochs", type=CommaList(int), help="The first of the epochs.")
@click.option("--warmup-lr", type=CommaList(float), help="Where the warm-up begins.")
@click.option("--sched", type=CommaList(str), help="cosine or constant.")
@click.option("--drop-path", type=CommaList(float), help="Of each residual branch and image.")
@click.option("--smoothing", type=CommaList(float), help="Label smoothing.")
@click.option("--seed", type=CommaList(int), help="Initialisation and drop-path.")
@click.option("--task", type=CommaList(str), help="Targets to learn.  [default: the cache's first]")
@click.option("--pool", type=CommaList(str), help="mean (patch tokens), cls; linear: clsmean.")
@click.option("--rank", type=CommaList(int), help="last, miet: R.")
@click.option("--heads", type=CommaList(int), help="last, miet, attentive: attention heads.")
@click.option("--gap", type=CommaList(int), help="last: blocks per group.")
@click.option("--depth", type=CommaList(int), help="last: modules per group.")
@click.option("--modules", type=CommaList(int), help="miet: attention modules.")
@click.option("--head", type=CommaList(str), help="miet: sum, or last (zk's pooled token).")
@click.option("--k", type=CommaList(int), help="miet: sum z0 … zk.")
@click.option("--gather", type=CommaList(str), help="miet: sum or normsum.")
@click.option("--groups", type=CommaList(int), help="miet: number of sums.")
@click.option("--reduction", type=CommaList(int), help="lst: r.")
@click.option(
    "--keep-layers", type=Words(), help="lst: all, every:2, last:3 or 1,2,3; several: spaces."
)
@click.option("--init", type=CommaList(str), help="lst: random or pruned.")
@click.option("--temperature", type=CommaList(float), help="lst: of the gates.")
@click.option("--mlp-ratio", type=CommaList(float), help="attentive: of the feed-forward block.")
@click.option("--tap", type=CommaList(int), help="linear: the deepest tap it reads.")
@click.option("--last-n", type=CommaList(int), help="linear: that many taps up to it.")
@click.option("--merge", type=CommaList(str), help="linear: concat or mean of several taps.")
@pass_options
@json_option
@config_option
def train(
    cache: str,
    method: list[str],
    out: str,
    taps: str,
    train_split: tuple[str, ...],
    val_split: tuple[str, ...],
    batch_size: int,
    order_seed: int,
    resident: str,
    device: str,
    amp: bool | None,
    refit: list[int] | None,
    overwrite: bool,
    as_json: bool,
    **axes: list[Any] | None,
) -> None:
    """Train side networks from CACHE alone; no backbone is loaded.

    Every setting takes a comma list, and lists multiply: all members train in one pass. Settings
    left out come from the method's recipe (docs/methods.md). The same command continues a killed
    run.

    \b
    Example:
      sidecache train photos.zarr --method last --lr 1e-3,4e-3 --out runs/last
    """
    from pipeline import train as stage
    from pipeline.config import TrainConfig
    from pipeline.training.members import make_members

    chosen = {name: values for name, values in axes.items() if values is not None}
    config = TrainConfig(
        cache=cache,
        out=out,
        members=make_members(method, chosen),
        taps=taps,
        train_split=train_split,
        val_split=val_split,
        batch_size=batch_size,
        order_seed=order_seed,
        resident=resident,
        device=device,
        amp=amp,
        overwrite=overwrite,
    )
    with Progress() as progress:
        result = stage.train(config, training(progress))
        refitted = _refit(progress, out, refit, overwrite) if refit else None
    if as_json:
        values = dataclasses.asdict(result)
        values["members"] = [member.to_dict() for member in result.members]
        print_json({**values, "refit": refitted} if refitted else values)
    else:
        results.show_train(out, result, refitted)


def _refit(progress: Progress, out: str, seeds: list[int], overwrite: bool) -> dict[str, Any]:
    """Choose by validation, train on train + val; what `--json` shows of it."""
    from pipeline.refit import refit as refit_winners
    from pipeline.refit import winners
    from pipeline.runs.run import Run

    run = Run(out)
    winning = winners(run)
    result = refit_winners(
        run,
        seeds,
        winning,
        training(progress, "refitting"),
        overwrite=overwrite,
    )
    open_settings = varying([member.all_settings for member in run.config().members])
    return {
        "run": result.run,
        "seeds": list(seeds),
        "seconds": result.seconds,
        "winners": [
            {
                "task": winner.task,
                "method": winner.member.method,
                "settings": {k: v for k, v in winner.member.all_settings.items() if k != "seed"},
                "chosen": [
                    n for n in open_settings if n != "seed" and n in winner.member.all_settings
                ],
                "val": winner.score,
                "val_deviation": winner.deviation,
                "val_seeds": list(winner.seeds),
            }
            for winner in winning
        ],
    }


@main.command()
@click.argument("cache")
@click.option(
    "--space",
    type=click.Path(exists=True, dir_okay=False),
    required=True,
    help="YAML file: setting: value, list of values, or {low, high, log, step}.",
)
@click.option("--out", required=True, help="The run directory to make, or to continue.")
@click.option("--trials", type=int, help="Members to propose.  [default with grid: all]")
@click.option(
    "--sampler",
    type=click.Choice(["tpe", "random", "grid"]),
    default="tpe",
    show_default=True,
    help="tpe learns from earlier rounds; grid tries every combination.",
)
@click.option("--sampler-seed", default=0, show_default=True, help="Same seed, same proposals.")
@click.option("--at-once", default=16, show_default=True, help="Members trained in one pass.")
@click.option("--halving", is_flag=True, help="Stop members early that lag behind others.")
@pass_options
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
    from pipeline.config import SweepConfig

    config = SweepConfig(**values)
    with Progress() as progress:
        result = stage.sweep(config, searching(progress))
        refitted = _refit(progress, config.out, refit, config.overwrite) if refit else None
    if as_json:
        found = dataclasses.asdict(result)
        print_json({**found, "refit": refitted} if refitted else found)
    else:
        results.show_sweep(config.out, result, refitted)


@main.command()
@click.argument("run")
@click.argument("images", required=False)
@click.option(
    "--member",
    "members",
    type=Names(),
    default=(),
    help="Member ids, or all.  [default: the best on validation; all of a refit]",
)
@click.option("--task", help="Of a run with several.  [default: the best member of each]")
@click.option("--cache", help="Another cache than the run's own.")
@click.option("--split", type=Names(), default="test", show_default=True)
@dataset_options
@click.option("--weights", type=click.Path(), help="Backbone weights, with IMAGES.")
@click.option("-b", "--batch-size", default=64, show_default=True, help="With IMAGES.")
@click.option("-j", "--workers", default=2, show_default=True, help="With IMAGES.")
@compute_options
@json_option
def evaluate(as_json: bool, run: str, images: str | None, **values: Any) -> None:
    """Score trained members of RUN on a split: from the cache, or live from IMAGES.

    What is measured is also appended to RUN/evaluations.jsonl.

    \b
    Example:
      sidecache evaluate runs/last --split test
    """
    from pipeline import evaluate as stage

    with Progress() as progress:
        evaluations = stage.evaluate(run, images=images, report=evaluating(progress), **values)
    if as_json:
        print_json(results.evaluate_json(evaluations))
    else:
        results.show_evaluate(run, evaluations)


@main.command()
@click.argument("runs", nargs=-1, required=True)
@click.option(
    "--out", type=click.Path(dir_okay=False), help="The page.  [default: RUN/report.html]"
)
@click.option("--member", help="Look closely at this one.  [default: the best on validation]")
@click.option("--images", help="The cache's images, as in `extract`: thumbnails of mistakes.")
@dataset_options
@compute_options
@json_option
def report(as_json: bool, runs: tuple[str, ...], **values: Any) -> None:
    """Write one page about finished RUNS: leaderboard, curves, settings, mistakes, cost.

    The page is one HTML file that needs no network. Mistakes are those on the validation split;
    test rows are never read here. The page of several runs is report.html in this folder, and
    ranks members together where they learned the same task from the same images.

    \b
    Example:
      sidecache report runs/last --images photos/
    """
    from pipeline.report import report as write_report

    written = write_report(runs, **values)
    if as_json:
        print_json(dataclasses.asdict(written))
    else:
        results.show_report(written)


@main.command()
@click.argument("run")
@click.argument("photos", nargs=-1, required=True)
@click.option("--top-k", default=5, show_default=True)
@click.option("--csv", "csv_file", type=click.Path(dir_okay=False), help="Write a CSV instead.")
@click.option("--member", help="Member id.  [default: the best on validation]")
@click.option("--task", help="Whose best member, in a run of several tasks.")
@click.option("--weights", type=click.Path(), help="Backbone weights from a file.")
@click.option("-b", "--batch-size", default=64, show_default=True)
@click.option("-j", "--workers", default=0, show_default=True, help="Decoding processes.")
@compute_options
@json_option
def predict(
    run: str, photos: tuple[str, ...], csv_file: str | None, as_json: bool, **values: Any
) -> None:
    """Classify PHOTOS (files or folders) with a trained member of RUN.

    A photograph that cannot be read is named on stderr, the others go on; the exit code is then 1.

    \b
    Example:
      sidecache predict runs/last holiday/ --top-k 3 --csv holiday.csv
    """
    from pipeline.predict import predict as predict_photos

    with Progress() as progress:
        found = predict_photos(run, photos, report=predicting(progress), **values)
    if csv_file:
        results.write_predictions(csv_file, found)
    if as_json:
        print_json(results.predict_json(found))
    elif csv_file:
        results.show_written(csv_file, found)
    else:
        results.show_predict(found)
    if results.show_unread(found):
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
    results.show_demo(tour.results(folder))
    try:
        tour.draw_curves(folder, folder / "curves.png")
        click.echo(f"\nLearning curves: {folder / 'curves.png'}")
    except ImportError:
        click.echo("\n(no picture: pip install matplotlib)", err=True)
    click.echo(f"Caches and runs: {folder}/  ({time.perf_counter() - begin:.0f} s)")


if __name__ == "__main__":
    main(prog_name="sidecache")
