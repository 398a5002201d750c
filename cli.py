"""The command line: parse, call one library function, print. The only place that prints.

stdout carries results (`--json` on every command that has one), stderr everything else. Exit
codes: 0; 1 a known error, one line without traceback; 2 usage; 130 and 143 after Ctrl-C and
SIGTERM. Nothing heavy is imported before a
command runs, so that help answers at once.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import click

from pipeline import __version__
from pipeline.process import Sigterm, Terminated

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class CommaList(click.ParamType):
    """`1e-3,3e-3` → [0.001, 0.003]. Lists of several flags multiply."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.name = f"{ {int: 'int', float: 'float', str: 'text'}[kind] },…"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[Any]:
        parts = value if isinstance(value, list | tuple) else str(value).split(",")
        try:
            return [self.kind(str(part).strip()) for part in parts]
        except ValueError:
            self.fail(f"{value!r}: expected {self.name.removesuffix(',…')}, or several with commas")


class Words(click.ParamType):
    """A list of values that have commas of their own: `1,2,3 every:2` → two values."""

    name = "text …"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return list(value) if isinstance(value, list | tuple) else str(value).split()


class Names(CommaList):
    """`train,val` → ("train", "val"); `none` → ()."""

    def __init__(self) -> None:
        super().__init__(str)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        names = tuple(super().convert(value, param, ctx))
        return () if names == ("none",) else names


class ImageSize(click.ParamType):
    """`224` or `224x196` (height x width) → (224, 196)."""

    name = "N|HxW"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        parts = value if isinstance(value, list | tuple) else str(value).lower().split("x")
        if len(parts) not in (1, 2) or not all(str(part).isdigit() for part in parts):
            self.fail(f"{value!r}: expected one side, or height x width, such as 224 or 224x196")
        sides = [int(part) for part in parts]
        return (sides[0], sides[-1])


class Triple(click.ParamType):
    """`0.5` or `0.485,0.456,0.406` → three floats."""

    name = "X|R,G,B"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        try:
            parts = [float(part) for part in str(value).split(",")]
        except ValueError:
            parts = []
        if len(parts) not in (1, 3):
            self.fail(f"{value!r}: expected one number, or three with commas")
        return tuple(parts * 3 if len(parts) == 1 else parts)


STORAGE_TYPES = ["float16", "bfloat16", "float32", "int8"]


def gather_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Flags of the commands that can store sums over taps."""
    function = click.option(
        "--gather-groups", default=1, show_default=True, help="That many sums over runs of taps."
    )(function)
    function = click.option(
        "--gather-pooled", is_flag=True, help="Keep zK's pooled tokens too (miet --head last)."
    )(function)
    function = click.option(
        "--gather-k", type=int, help="Sum z0 … zK.  [default: the deepest tap]"
    )(function)
    return click.option(
        "--gather",
        type=click.Choice(["none", "sum", "normsum"]),
        default="none",
        show_default=True,
        help="Store the sum of the taps alone (MIET); normsum normalises each first.",
    )(function)


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(
        function
    )


def dataset_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Flags of every command that opens images: what timm asks of a dataset string."""
    options = (
        click.option("--data-dir", help="Where a timm dataset string finds its files."),
        click.option("--input-key", help="Its column of images.  [default: timm's, mostly image]"),
        click.option("--target-key", help="Its column of labels.  [default: timm's, mostly label]"),
    )
    for option in reversed(options):
        function = option(function)
    return function


def compute_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Flags of every command that computes with torch."""
    function = click.option(
        "--amp/--no-amp",
        default=None,
        help="bfloat16 products, or float32 throughout.  [default: what the run began in, "
        "or what the hardware does fast]",
    )(function)
    return click.option(
        "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
    )(function)


def pass_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Flags of a training pass: what its members share, and what is done with the winner."""
    options = (
        click.option(
            "--taps", default="all", show_default=True, help="Use only these of the cache's."
        ),
        click.option("--train-split", type=Names(), default="train", show_default=True),
        click.option(
            "--val-split", type=Names(), default="val", show_default=True, help="Or none."
        ),
        click.option("-b", "--batch-size", default=32, show_default=True, help="Of the pass."),
        click.option("--order-seed", default=0, show_default=True, help="Order of batches."),
        click.option(
            "--resident",
            type=click.Choice(["auto", "device", "ram", "disk"]),
            default="auto",
            show_default=True,
            help="Where the features live.",
        ),
        compute_options,
        click.option(
            "--refit",
            type=CommaList(int),
            help="Then train the winner on train + val with these seeds, into OUT/refit.",
        ),
        click.option("--overwrite", is_flag=True, help="Replace another run in --out."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def _load_config(ctx: click.Context, _param: click.Parameter, path: str | None) -> None:
    if path is None:
        return
    from pipeline.config import read_yaml
    from pipeline.errors import SettingError

    known = [p.name for p in ctx.command.params if p.name not in ("config", "as_json")]
    try:
        values = read_yaml(path, [str(name) for name in known])
    except SettingError as error:
        raise click.UsageError(str(error)) from None
    ctx.default_map = {**(ctx.default_map or {}), **values}


config_option = click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False),
    is_eager=True,
    expose_value=False,
    callback=_load_config,
    help="YAML file of defaults (flag: value); flags on the command line win.",
)


class Sidecache(click.Group):
    """Turns known errors into one line on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        kept = "what was finished is kept, the same command goes on from there"
        with Sigterm() as sigterm:
            try:
                return super().invoke(ctx)
            except Terminated:
                _fail(f"terminated; {kept}", 143)
            except KeyboardInterrupt:
                _fail(f"interrupted; {kept}", 130)
            except BrokenPipeError:
                raise SystemExit(1) from None
            except Exception as error:
                if _known(error):
                    _fail(str(error), 1)
                if sigterm.has_come():  # and a worker died of it first
                    _fail(f"terminated; {kept}", 143)
                raise


def _known(error: Exception) -> bool:
    """Whether our own trees raised it; looked up by name, so as not to import them for `--help`."""
    roots = (("cache.errors", "CacheError"), ("pipeline.errors", "PipelineError"))
    trees = tuple(
        getattr(sys.modules[module], name) for module, name in roots if module in sys.modules
    )
    return isinstance(error, trees)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"sidecache: {message}", err=True)
    raise SystemExit(code)


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
    _settle()
    from pipeline import extract as stage
    from pipeline.config import ExtractConfig

    config = ExtractConfig(**values)
    with Progress() as progress:

        def report(record: Any) -> None:
            match record:
                case stage.Hashed(done=done, total=total):
                    progress.update("hashing", done, total)
                case stage.Weighed(done=done, total=total, skipped=skipped):
                    detail = f"{_counted(skipped, 'unreadable image')} skipped" if skipped else ""
                    progress.update("weighing weights", done, total, detail)
                case stage.Repeated(split=split, other=other, rows=rows, example=(key, twin)):
                    images = f"{_counted(rows, f'{split} image')} {'is' if rows == 1 else 'are'}"
                    progress.note(f"{images} also in {other} (e.g. {key} = {twin})")
                case stage.Plan():
                    if record.pending_rows:
                        progress.note(_plan_line(record, config))
                        if record.begun_batch_size not in (None, config.batch_size):
                            progress.note(_batch_line(record, config))
                case stage.Extracted(rows=rows, total=total, bytes=size, seconds=seconds):
                    detail = f"{rows / max(seconds, 1e-9):,.0f} images/s, {_gb(size)} written"
                    progress.update("extracting", rows, total, detail)
                case stage.Skipped(key=key, reason=reason):
                    progress.note(f"skipped {key}: {reason}")

        result = stage.extract(config, report)
    if as_json:
        keys = ("rows", "bytes", "complete", "fingerprint", "content")
        fields = {key: getattr(result, key) for key in keys}
        extra = ("seconds", "images_per_second", "extracted_rows", "skipped", "legs")
        _print_json({**fields, **{key: getattr(result, key) for key in extra}})
        return
    if not result.extracted_rows:
        click.echo(f"{config.out}: already complete, nothing to do ({result.rows:,} rows)")
        return
    click.echo(
        f"{config.out}: {result.rows:,} rows, {_gb(result.bytes)}, "
        f"{result.images_per_second:,.0f} images/s, fingerprint {result.fingerprint[:12]}"
    )
    if result.skipped:
        click.echo(f"{len(result.skipped)} unreadable images skipped; `inspect` lists them")
    total = sum(result.legs.values()) or 1.0
    shares = ", ".join(f"{leg} {value / total:.0%}" for leg, value in result.legs.items())
    click.echo(f"{result.seconds:.1f} s, spent waiting for: {shares}", err=True)


def _plan_line(plan: Any, config: Any) -> str:
    resumed = plan.rows - plan.pending_rows
    images = f"{plan.pending_rows:,} images"
    already = f" ({resumed:,} of {plan.rows:,} rows already there)" if resumed else ""
    shapes = ", ".join(f"{_run_of(s.taps)} x {s.tokens} x {s.dim}" for s in plan.stacks)
    return (
        f"{config.model} on {plan.device}, {plan.precision}: {images}{already}, "
        f"taps {shapes}, {_gb(plan.bytes)} of {config.dtype} to {config.out}"
    )


def _batch_line(plan: Any, config: Any) -> str:
    return (
        f"begun with -b {plan.begun_batch_size}: with -b {config.batch_size}, the rest may differ "
        f"from it in the last bits"
    )


def _run_of(taps: Any) -> str:
    """`z0…z12 (13)`; a name alone as it is."""
    return taps[0] if len(taps) == 1 else f"{taps[0]}…{taps[-1]} ({len(taps)})"


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
        _print_json(found.to_dict())
        return
    state = "complete" if found.complete else f"INCOMPLETE: {found.rows_done:,} rows done"
    lines = [
        ("cache", f"{cache} ({found.format}), {state}"),
        ("rows", f"{found.rows:,} x {found.views} view, {_gb(found.bytes)} of {found.storage}"),
        ("bytes a row", f"{found.bytes / max(found.rows, 1):,.0f}"),
    ]
    for stack in found.stacks:
        taps = stack["taps"]
        shape = f"{len(taps)} taps x {stack['tokens']} tokens x {stack['dim']}"
        lines.append((f"stack {stack['name']}", f"{shape}: {' '.join(taps)}"))
        if error := found.error.get(stack["name"]):
            worst = f"worst token {error['worst_token']:.2g}"
            lines.append(
                ("rounding error", f"{error['relative']:.2g} of the values' size; {worst}")
            )
    lines.append(("splits", ", ".join(f"{k} {v:,}" for k, v in found.splits.items())))
    for name, classes in found.targets.items():
        if found.kinds[name] == "regression":
            rows, *spread = classes.items()
            shown = "".join(f", {k} {v:.4g}" for k, v in spread if v is not None)
            lines.append((f"target {name}", f"regression, {rows[1]:,} rows{shown}"))
            continue
        few = list(classes.items())[:8]
        more = f", … {len(classes) - 8} more" if len(classes) > 8 else ""
        counts = ", ".join(f"{k} {v:,}" for k, v in few)
        kind = "" if found.kinds[name] == "class" else f"{found.kinds[name]}, "
        lines.append((f"target {name}", f"{kind}{len(classes)} classes: {counts}{more}"))
    if found.seconds is not None:
        made = "copying" if "copied" in found.identity else "extraction"
        lines.append((made, f"{found.seconds:,.{0 if found.seconds >= 10 else 2}f} s"))
    lines += [(f"skipped row {row}", reason) for row, reason in found.skipped.items()]
    lines += list(_flatten(found.identity))
    lines += [("fingerprint", found.fingerprint), ("content", found.content or "(incomplete)")]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        click.echo(f"{name:<{width}}  {text}")


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        elif name != "taps":
            yield prefix + name, str(value)


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
        result = verify_cache(
            cache,
            lambda r: progress.update(
                "verifying", r.rows_done, r.rows, f"{_gb(r.bytes_done)} read"
            ),
        )
    if as_json:
        damaged = [{**vars(d), "file": str(d.file)} for d in result.damaged]
        _print_json(
            {"ok": result.ok, "rows": result.rows, "bytes": result.bytes, "damaged": damaged}
        )
    else:
        for damage in result.damaged:
            click.echo(str(damage))
        verdict = "no damage" if result.ok else f"{len(result.damaged)} damaged"
        click.echo(f"{cache}: {result.rows:,} rows, {_gb(result.bytes)} read, {verdict}")
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
    _settle()
    from pipeline import copy as stage
    from pipeline.config import CopyConfig

    config = CopyConfig(**values)
    with Progress() as progress:
        result = stage.copy(
            config,
            lambda r: progress.update("copying", r.rows, r.total, f"{_gb(r.bytes)} written"),
        )
    if as_json:
        _print_json(dataclasses.asdict(result))
        return
    if not result.copied_rows:
        click.echo(f"{config.dst}: already complete, nothing to do ({result.rows:,} rows)")
        return
    click.echo(
        f"{config.dst}: {result.rows:,} rows, {_gb(result.bytes)} "
        f"({result.bytes / result.source_bytes:.1%} of {config.src}'s), {result.seconds:.1f} s"
    )


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
    _settle()
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
        result = stage.train(config, lambda record: _show_pass(progress, record, "training"))
        refitted = _refit(progress, config.out, refit, overwrite) if refit else None
    if as_json:
        values = dataclasses.asdict(result)
        values["members"] = [member.to_dict() for member in result.members]
        _print_json({**values, "refit": refitted} if refitted else values)
        return
    if not result.epochs_trained:
        click.echo(f"{out}: already finished, nothing to do")
    _print_members(result.members)
    if refitted:
        _print_refit(refitted)
    where = refitted["run"] if refitted else out
    if result.epochs_trained or refitted:
        click.echo(
            f"{out}: {result.seconds:.1f} s, {result.images_per_second:,.0f} images/s. "
            f"Next: sidecache evaluate {shlex.quote(where)}",
            err=True,
        )


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
        lambda record: _show_pass(progress, record, "refitting"),
        overwrite=overwrite,
    )
    open_settings = _varying([member.all_settings for member in run.config().members])
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


def _print_refit(refitted: dict[str, Any]) -> None:
    for winner in refitted["winners"]:
        chosen = [name for name in winner["chosen"] if name != "task"]
        shown = "".join(f", {name} {_short(winner['settings'][name])}" for name in chosen)
        seeds = winner["val_seeds"]
        spread = f" ± {winner['val_deviation']:.4f}" if len(seeds) > 1 else ""
        click.echo(
            f"refit {winner['task']}: {winner['method']}{shown}, "
            f"val {winner['val']:.4f}{spread} "
            f"over {_counted(len(seeds), 'seed')}; trained on train + val with "
            f"{_counted(len(refitted['seeds']), 'seed')}: {refitted['run']}"
        )


def _show_pass(progress: Progress, record: Any, what: str) -> None:
    """One of the records that `train` reports."""
    from pipeline import records

    match record:
        case records.Loading(rows=rows, total=total):
            progress.update("loading features", rows, total)
        case records.PassStarted():
            progress.note(_start_line(record))
        case records.EpochDone(epoch=epoch, epochs=epochs, metric=metric, score=score):
            scored = "" if score is None else f", val {metric} {_score_text(metric, score)}"
            detail = f"loss {record.train_loss:.3f}{scored}"
            progress.update(what, epoch, epochs, detail)
        case records.MemberStopped(id=member, epoch=epoch, reason=reason, pruned=False):
            progress.note(f"member {member}: {reason} (epoch {epoch}); it stops, the others go on")


def _start_line(start: Any) -> str:
    again = f", continuing after epoch {start.epochs_done}" if start.epochs_done else ""
    left_out = f" ({start.left_out:,} without any label left out)" if start.left_out else ""
    where = "on disk" if start.resident == "disk" else f"in {start.resident}"
    return (
        f"{_counted(start.members, 'member')}, {start.parameters:,} parameters, "
        f"{start.train_rows:,} + {start.val_rows:,} rows{left_out} on {start.device}, "
        f"{start.precision}; features {where}, {_gb(start.bytes)}; "
        f"about {start.seconds_per_epoch:.2g} s an epoch{again}"
    )


def _print_members(members: list[Any]) -> None:
    """A leaderboard a task."""
    for task in dict.fromkeys(member.settings["task"] for member in members):
        same = [member for member in members if member.settings["task"] == task]
        if len(same) < len(members):
            click.secho(f"task {task}", bold=True)
        _print_table(same)


def _print_table(members: list[Any]) -> None:
    """Leaderboard: the settings that differ between members, best validation first."""
    names = list(dict.fromkeys(name for member in members for name in member.settings))
    if len(members) == 1:
        shown = [n for n in names if n in ("rank", "gap", "depth", "pool", "lr", "epochs", "seed")]
    else:
        shown = _varying([member.settings for member in members])
    metric = members[0].metric
    header = ["id", "method", *shown, "parameters", _titled(metric), "val loss", ""]
    ranked = sorted(members, key=lambda member: member.rank)
    rows = [
        [
            m.id,
            m.method,
            *(str(m.settings.get(name, "")) for name in shown),
            f"{m.parameters:,}",
            _score_text(metric, m.score),
            _loss_text(m.scores["val_loss"]),
            m.stopped or "",
        ]
        for m in ranked
    ]
    _echo_columns(header, rows)


def _varying(settings: list[dict[str, Any]]) -> list[str]:
    """Names of the settings that are not the same for all."""
    names = dict.fromkeys(name for each in settings for name in each)
    return [n for n in names if len({str(each.get(n)) for each in settings}) > 1]


def _titled(metric: str) -> str:
    """`val_top1` → `val top-1`."""
    return metric.replace("_", " ").replace("top", "top-").replace("map", "mAP")


def _score_text(metric: str, value: float | None) -> str:
    """Fractions as percent; r2 and mae as they are."""
    if value is None:
        return ""
    return f"{value:.4f}" if metric.endswith(("r2", "mae")) else f"{value:.2%}"


def _loss_text(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _echo_columns(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    for line in [header, *rows]:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())


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
    _settle()
    from pipeline import records
    from pipeline import sweep as stage
    from pipeline.config import SweepConfig

    config = SweepConfig(**values)
    with Progress() as progress:

        def report(record: Any) -> None:
            match record:
                case records.RoundStarted(round=number, rounds=rounds, members=members):
                    told = f"{record.trials_done} of {record.trials} trials are done"
                    progress.note(f"round {number} of {rounds}: {members} members; {told}")
                case records.TrialDone(state="failed", number=number, reason=reason):
                    progress.note(f"trial {number + 1} failed: {reason}")
                case records.TrialDone() | records.MemberStopped():  # both are in the table below
                    pass
                case _:
                    _show_pass(progress, record, "training")

        result = stage.sweep(config, report)
        refitted = _refit(progress, config.out, refit, config.overwrite) if refit else None
    if as_json:
        values = dataclasses.asdict(result)
        _print_json({**values, "refit": refitted} if refitted else values)
        return
    if not result.trained:
        click.echo(f"{config.out}: already finished, nothing to do")
    _print_trials(result.trials, result.metric)
    counts = f"{result.done} done, {result.pruned} stopped early, {result.failed} failed"
    best = f"best {result.best}" if result.best else "none was scored"
    click.echo(f"{config.out}: {counts}; {best}")
    if refitted:
        _print_refit(refitted)
    where = refitted["run"] if refitted else config.out
    if (result.trained or refitted) and result.best:
        click.echo(
            f"{result.seconds:.1f} s. Next: sidecache evaluate {shlex.quote(where)}", err=True
        )


def _print_trials(trials: list[Any], metric: str | None) -> None:
    """The best trials with the settings that the space left open."""
    trained = [trial for trial in trials if trial.member]
    shown = trained[:10]
    names = list(dict.fromkeys(name for trial in shown for name in trial.settings))
    header = ["id", "method", *names, _titled(metric or "score"), "val loss", ""]
    rows = [
        [
            trial.member,
            trial.method,
            *(_short(trial.settings.get(name, "")) for name in names),
            _score_text(metric or "", trial.score),
            _loss_text(trial.loss),
            trial.reason or "",
        ]
        for trial in shown
    ]
    _echo_columns(header, rows)
    if len(trained) > len(shown):
        click.echo(f"… {len(trained) - len(shown)} more in summary.csv")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


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
    _settle()
    from pipeline import evaluate as stage

    with Progress() as progress:
        results = stage.evaluate(
            run,
            images=images,
            report=lambda r: progress.update("evaluating", r.rows, r.total),
            **values,
        )
    spread = {
        task: stage.mean_and_deviation(same)
        for task in dict.fromkeys(r.task for r in results)
        if len(same := [r for r in results if r.task == task]) > 1
    }
    if as_json:
        listed = [result.to_dict() for result in results]
        _print_json(listed[0] if len(listed) == 1 else {"members": listed, "mean": spread})
        return
    several = len({result.task for result in results}) > 1
    for result in results:
        named = f"{result.member} ({result.task})" if several else result.member
        scores = "".join(
            f"{_titled(k)} {_score_text(k, v) or '–'}, " for k, v in result.scores.items()
        )
        click.echo(
            f"{run} {named}, {'+'.join(result.split)}{' (live)' if result.live else ''}: "
            f"{scores}loss {_loss_text(result.loss, 4) or '–'}, n = {result.n:,}"
        )
    for task, of_task in spread.items():
        members = sum(result.task == task for result in results)
        told = ", ".join(
            f"{_titled(k)} {' ± '.join(_score_text(k, v) for v in both) if both else '–'}"
            for k, both in of_task.items()
        )
        click.echo(f"{run} mean of {_counted(members, 'member')}{f', {task}' * several}: {told}")


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
    _settle()
    from pipeline.report import report as write_report

    written = write_report(runs, **values)
    for text in written.left_out:
        click.echo(f"left out: {text}", err=True)
    if as_json:
        _print_json(dataclasses.asdict(written))
        return
    of = "" if written.runs == 1 else f" of {written.runs} runs"
    click.echo(f"{written.out}: {_counted(written.members, 'member')}{of}")


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
    _settle()
    from pipeline.predict import predict as predict_photos

    with Progress() as progress:
        found = predict_photos(
            run, photos, report=lambda d, t: progress.update("predicting", d, t), **values
        )
    read = [prediction for prediction in found if prediction.error is None]
    if csv_file:
        with Path(csv_file).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "rank", "class", "probability"])
            for p in read:
                if p.value is not None:
                    writer.writerow([p.path, 1, f"{p.value:.6g}", ""])
                ranked = enumerate(zip(p.classes, p.probabilities, strict=True), start=1)
                writer.writerows([p.path, rank, c, f"{q:.6f}"] for rank, (c, q) in ranked)
    if as_json:
        _print_json([_prediction_json(p) for p in read])
    elif csv_file:
        click.echo(f"{csv_file}: {len(read):,} photographs")
    else:
        for p in read:
            best = zip(p.classes, p.probabilities, strict=True)
            told = ", ".join(f"{name} {value:.1%}" for name, value in best)
            click.echo(f"{p.path}: {told if p.value is None else f'{p.value:.6g}'}")
    for p in found:
        if p.error is not None:
            click.echo(f"sidecache: {p.error}", err=True)
    if len(read) < len(found):
        raise SystemExit(1)


def _prediction_json(prediction: Any) -> dict[str, Any]:
    keys = (
        ("path", "value") if prediction.value is not None else ("path", "classes", "probabilities")
    )
    return {key: getattr(prediction, key) for key in keys}


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
    _settle()
    from pipeline.demo import tour

    folder, begin = Path(out), time.perf_counter()
    click.echo("Rendering images of two tasks that the backbone was not trained for …")
    tour.render_images(folder)
    for command in tour.commands(folder):
        click.secho(f"\n$ sidecache {shlex.join(command)}", bold=True)
        main.main(command, standalone_mode=False)
    click.echo()
    table = tour.results(folder)
    _echo_columns(
        ["task", "method", "parameters", "val top-1", "test top-1"],
        [
            [r.task, r.method, f"{r.parameters:,}", f"{r.val_top1:.1%}", f"{r.test_top1:.1%}"]
            for r in table
        ],
    )
    try:
        tour.draw_curves(folder, folder / "curves.png")
        click.echo(f"\nLearning curves: {folder / 'curves.png'}")
    except ImportError:
        click.echo("\n(no picture: pip install matplotlib)", err=True)
    click.echo(f"Caches and runs: {folder}/  ({time.perf_counter() - begin:.0f} s)")


# --- printing ---------------------------------------------------------------------------------


class Progress:
    """A progress bar on a terminal, a plain line every few seconds elsewhere; always on stderr."""

    SECONDS = 5.0

    def __enter__(self) -> Progress:
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._begin: dict[str, float] = {}
        self._done: dict[str, int] = {}
        self._last = self._previous = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, what: str, done: int, total: int, detail: str = "") -> None:
        if done < self._done.get(what, 0):  # the next round of the same
            del self._begin[what]
        self._done[what] = done
        begin = self._begin.setdefault(what, self._previous)
        self._previous = time.monotonic()
        if sys.stderr.isatty():
            self._draw(what, done, total, detail)
        elif time.monotonic() - self._last >= self.SECONDS:
            self._last = time.monotonic()
            left = (self._last - begin) / max(done, 1) * (total - done)
            told = f", {detail}" if detail else ""
            click.echo(f"{what} {done:,} of {total:,}{told}, {_clock(left)} left", err=True)

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            click.echo(text, err=True)

    def _draw(self, what: str, done: int, total: int, detail: str) -> None:
        if self._bar is None:
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[detail]}", markup=False),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total, detail=detail)
        self._bar.update(self._tasks[what], completed=done, total=total, detail=detail)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _settle() -> None:
    """Process-wide settings, before torch is loaded; see `pipeline/process.py`."""
    from pipeline.process import settle_process

    settle_process()


if __name__ == "__main__":
    main(prog_name="sidecache")
