"""Made-up inputs: JPEG photographs, and caches of random features. Speed does not depend on them,
except that a JPEG must cost about what a photograph costs to decode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from cache import Labelling, Manifest, Stack, Target, Writer, encode_keys

CLASSES = 10


def write_photographs(folder: Path, count: int, side: int = 256) -> None:
    """`count` JPEG files in class folders: soft blobs, detail and grain, about 35 kB each."""
    for number in range(count):
        place = folder / f"class{number % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        photograph(number, side).save(place / f"{number:06d}.jpg", quality=90)


def photograph(seed: int, side: int) -> Image.Image:
    random = np.random.default_rng(seed)
    pixels = np.full((side, side, 3), 128, np.float32)
    for cells, strength in ((4, 50), (16, 20), (64, 12)):
        coarse = random.normal(0, strength, (cells, cells, 3))
        tiny = Image.fromarray(np.clip(coarse + 128, 0, 255).astype(np.uint8))
        pixels += np.asarray(tiny.resize((side, side), Image.Resampling.BICUBIC)) - np.float32(128)
    pixels += random.normal(0, 4, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def write_features(location: Path, *, rows: int, taps: int, tokens: int, dim: int) -> None:
    """A complete cache of normal random float16 features, random labels, one split."""
    random = np.random.default_rng(0)
    classes = tuple(f"class{i}" for i in range(CLASSES))
    manifest = Manifest(
        identity={"features": "random", "seed": 0},
        storage="float16",
        parts=(rows,),
        stacks=(
            Stack(
                name="tokens",
                taps=tuple(f"z{i}" for i in range(taps)),
                tokens=tokens,
                prefix_tokens=1,
                dim=dim,
            ),
        ),
        final_norm={"kind": "layer", "eps": 1e-6},
    )
    target = Target(name="label", classes=classes)
    labelling = Labelling(rows=rows, targets=(target,), splits=("train",))
    tables = {
        "keys": encode_keys([f"{row:06d}" for row in range(rows)]),
        "labels/label": random.integers(0, CLASSES, rows),
        "split": np.zeros(rows, np.uint8),
        "final_norm/weight": np.ones(dim, np.float32),
        "final_norm/bias": np.zeros(dim, np.float32),
    }
    with Writer(location, manifest, labelling, tables) as writer:
        for run in writer.pending:
            for row in run:
                values = random.standard_normal((1, 1, taps, tokens, dim), np.float32)
                writer.write(row, {"tokens": values.astype(np.float16)})
