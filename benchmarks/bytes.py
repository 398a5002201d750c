"""Bytes that an image takes as features, beside its pixels and its file.

Extracts some photographs once, copies the cache to every smaller form, and divides what lies on the
disk (tables, ledger and metadata included) by the rows. One JSON line.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from measure import AMP, add_compute_flags, print_line, width_of
from PIL import Image
from synthetic import write_photographs

from cache import inspect
from pipeline.config import CopyConfig, ExtractConfig
from pipeline.copy import copy
from pipeline.extract import extract

FORMS = {
    "all taps, float16": {},
    "9 taps, float16": {"taps": "0,2,3,4,6,7,8,10,12"},
    "all taps, int8": {"dtype": "int8"},
    "sum, float16": {"gather": "sum"},
    "sum, int8": {"gather": "sum", "dtype": "int8"},
    "3 sums, int8": {"gather": "sum", "gather_groups": 3, "dtype": "int8"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", help="a folder of images  [default: 32 made-up photographs]")
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--weights", help="a file  [default: random weights]")
    add_compute_flags(parser)
    parser.add_argument("--folder", help="where temporary files go")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        images = Path(options.images) if options.images else folder / "images"
        if not options.images:
            write_photographs(images, 32)
        source = str(folder / "full.zarr")
        config = ExtractConfig(
            images=str(images),
            model=options.model,
            weights=options.weights,
            pretrained=options.weights is not None,
            out=source,
            dtype="float32",
            device=options.device,
            amp=AMP[options.precision],
        )
        rows = extract(config).rows
        measured, errors = {}, {}
        for number, (form, changes) in enumerate(FORMS.items()):
            out = folder / f"{number}.zarr"
            copy(CopyConfig(src=source, dst=str(out), **{"dtype": "float16", **changes}))  # type: ignore[arg-type]
            measured[form] = bytes_below(out) / rows
            errors[form] = inspect(out).error["tokens"]["relative"]
        files = sorted(p for p in images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
        height, width = inspect(source).identity["preprocessing"]["img_size"]
        pixels = height * width * 3
        print_line(
            "bytes",
            computing=options,
            ratio=measured["sum, int8"] / pixels,
            baseline=f"the raw {height} x {width} x 3 pixels, {pixels} bytes",
            bytes_per_image={form: round(size) for form, size in measured.items()},
            relative_error=errors,
            pixels=pixels,
            jpeg=round(np.mean([path.stat().st_size for path in files])) if files else None,
            jpeg_side=float(np.mean([Image.open(path).width for path in files])) if files else None,
            sizes={
                "model": options.model,
                "dim": width_of(options.model),
                "rows": rows,
                "images": images.name if options.images else "made up",
            },
        )


def bytes_below(folder: Path) -> int:
    """Lengths of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
