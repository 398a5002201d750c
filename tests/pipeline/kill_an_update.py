"""Run by test_update.py in a process of its own: it forks, and pytest may have threads.

Every change of the disk is a step. At every third step a child that updates a cache kills itself;
another child runs the same update to its end; the result must be that of an undisturbed one.
"""

import itertools
import shutil
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path.cwd() / "tests"))
sys.path.insert(0, str(Path.cwd()))

import h5py  # noqa: F401  (once here, not in every child)
import torch
import zarr  # noqa: F401
from conftest import extract_config, paint
from kill_steps import in_child, kill_at
from PIL import Image

from cache import Reader, verify
from pipeline.extract import extract

EVERY = 3


def update(images: Path, out: Path, step: int) -> None:
    kill_at(step)
    extract(extract_config(images, out, update=True))


def check(images: Path, out: Path, expected: tuple[str, str, str]) -> None:
    update(images, out, 0)
    with Reader(out) as reader:
        found = (reader.fingerprint, reader.labelling_digest, reader.content)
    if found != expected or not verify(out).ok:
        raise AssertionError(f"{found} in place of {expected}")


def main() -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    suffix, folder = sys.argv[1], Path(sys.argv[2])
    images = paint(folder / f"images-{suffix}", train=2, val=1, test=0)
    base, reference = folder / f"base.{suffix}", folder / f"reference.{suffix}"
    extract(extract_config(images, base))
    first, second, *_ = sorted(images.rglob("*.png"))
    Image.open(first).rotate(90).save(first)
    second.rename(second.with_name("renamed.png"))
    Image.open(first).rotate(45).save(first.with_name("new.png"))
    copy = shutil.copytree if base.is_dir() else shutil.copy
    copy(base, reference)
    with_update = extract(extract_config(images, reference, update=True))
    expected = (with_update.fingerprint, with_update.labelling, with_update.content)
    for step in itertools.count(1, EVERY):
        out = folder / f"killed.{suffix}"
        copy(base, out)
        killed = in_child(partial(update, images, out, step))
        in_child(partial(check, images, out, expected))
        shutil.rmtree(out) if out.is_dir() else out.unlink()
        if not killed:
            break
    sys.stdout.write(f"{step - EVERY}\n")


main()
