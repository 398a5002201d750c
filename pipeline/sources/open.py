"""Opening a source: what is there decides how it is read.

    a folder        class folders, or split folders above class folders: `folders`
    a .csv, .tsv    header `path,label[,split]`, or columns of several targets: `tables`
    a VTAB-1K       task folder in the NOAH layout, train800.txt, val200.txt, test.txt, …: `vtab`
    a .tar          of images in class folders: `tars`
    hfds/…, …       timm's data sets: `timm_sets`

The idea to hold: opening a source finds every fault of the *list* (missing files, unknown labels,
empty classes) before the backbone runs; faults of one *image* come later, as ImageError, so that
`--on-error skip` can leave that row out. Rows without any split belong to "train". All kinds but
tables have one target, the class "label".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from pipeline.errors import SourceError
from pipeline.sources.source import REPAIR, REPAIR_OR_SKIP, Source
from pipeline.sources.tables import SEPARATORS, Classes, open_table
from pipeline.sources.tars import open_tar
from pipeline.sources.vtab import is_vtab, open_vtab

TIMM_PREFIXES = ("hfds", "hfids", "tfds", "torch", "wds")


def open_source(
    images: str | Path,
    *,
    splits: tuple[str, ...] | None = None,
    classes: Classes | None = None,
    data_dir: str | None = None,
    input_key: str | None = None,
    target_key: str | None = None,
    download: bool = False,
    advice: str = REPAIR_OR_SKIP,
) -> Source:
    """Open `images`; raise SourceError saying what was looked for and what was found.

    What is on the disk comes first: a folder `torch/cifar100` here hides timm's data set.

    splits: keep these alone. For timm dataset strings: the names to ask timm for, or `name=what`
        to ask for something else under a name of ours (`val=train[800:]`); ("train",) if None.
    classes: those of another cache, by target; its labels are then numbered by them, and others
        refused.
    data_dir, input_key, target_key, download: timm's `--data-dir`, `--input-key`, `--target-key`,
        `--dataset-download`; for timm dataset strings only.
    advice: what to do about an image that cannot be read, where rows cannot be skipped.
    """
    path, text = Path(images), str(images)
    if not path.exists() and text.partition("/")[0].lower() in TIMM_PREFIXES and "/" in text:
        from pipeline.sources.timm_sets import TimmOptions, open_timm

        source: Source = open_timm(
            text,
            splits=splits or ("train",),
            classes=(classes or {}).get("label"),
            options=TimmOptions(data_dir, input_key, target_key, download),
        )
    elif data_dir or input_key or target_key or download:
        raise SourceError(
            f"{text}: --data-dir, --input-key, --target-key and --dataset-download belong to timm "
            f"dataset strings ({', '.join(f'{prefix}/…' for prefix in TIMM_PREFIXES)}); leave them "
            "out, as this is none"
        )
    else:
        source = _open_path(path, splits, classes or {})
    return source if source.advice == advice else replace(source, advice=advice)


def _open_path(path: Path, splits: tuple[str, ...] | None, classes: Classes) -> Source:
    """What is on the disk."""
    of_label = classes.get("label")
    if path.is_dir() and is_vtab(path):
        return open_vtab(path, splits, of_label)
    if path.is_dir():
        from pipeline.sources.folders import open_folder  # Pillow says which files are images

        return open_folder(path, splits, of_label)
    if path.is_file() and path.suffix.lower() in SEPARATORS:
        return open_table(path, splits, classes)
    if path.is_file() and path.suffix.lower() == ".tar":
        return open_tar(path, splits, of_label)
    raise SourceError(
        f"{path}: {'a file of another kind' if path.exists() else 'nothing there'}; expected a "
        "folder with a folder per class (or train/, val/, test/ above those), a .csv or .tsv with "
        "path,label[,split], a VTAB-1K task folder, a .tar of images, or a timm dataset string: "
        + ", ".join(f"{prefix}/…" for prefix in TIMM_PREFIXES)
    )


def opener(
    images: str | None,
    *,
    data_dir: str | None = None,
    input_key: str | None = None,
    target_key: str | None = None,
) -> Callable[..., Source] | None:
    """`open_source` for `images`, to be called with what is known later; None if there are none."""
    if images is not None:
        return partial(
            open_source,
            images,
            data_dir=data_dir,
            input_key=input_key,
            target_key=target_key,
            advice=REPAIR,
        )
    if data_dir or input_key or target_key:
        raise SourceError(
            "--data-dir, --input-key and --target-key say how images are opened, and there are "
            "none here: name those too, or leave them out"
        )
    return None
