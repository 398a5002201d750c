"""`extract` against a bare loop that only decodes the images and runs the backbone over them.

Both use the same files, DataLoader workers, transform, batch size, precision and process settings
(pipeline/process.py), and both start their workers inside the clock. Ours also hooks every block,
casts, copies, hashes, writes and forces to the disk; the bare loop throws its output away. Building
the model is in neither. The share left is what a cache costs over the forward pass that nobody can
avoid.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from measure import add_compute_flags, alternate, medians, precision_of, print_line
from PIL import Image
from synthetic import write_photographs

from pipeline.process import settle_process

if TYPE_CHECKING:  # torch is loaded after `settle_process`
    import torch
    from torch import Tensor, nn

GOAL = 0.9
FORMATS = ("zarr", "h5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    add_compute_flags(parser)
    parser.add_argument("--folder", help="where to put the files  [default: a temporary folder]")
    options = parser.parse_args()
    settle_process()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    import timm
    import torch
    from timm.data import resolve_model_data_config

    from pipeline.config import ExtractConfig
    from pipeline.device import pick_device
    from pipeline.extract import extract

    photographs = folder / "photographs"
    write_photographs(photographs, options.images)
    device = pick_device(options.device)
    model = timm.create_model(options.model, pretrained=options.pretrained)
    model = model.eval().requires_grad_(False).to(device)
    data = Photographs(photographs, resolve_model_data_config(model))
    legs: dict[str, dict[str, float]] = {}

    def bare() -> float:
        return forward_all(model, data, device, options)

    def ours(suffix: str) -> float:
        config = ExtractConfig(
            images=str(photographs),
            model=options.model,
            pretrained=options.pretrained,
            out=str(folder / f"cache.{suffix}"),
            batch_size=options.batch_size,
            workers=options.workers,
            device=options.device,
            amp=precision_of(options) != torch.float32,
        )
        result = extract(config)
        assert result.complete and result.extracted_rows == options.images
        legs[suffix] = result.legs
        discard(Path(config.out))
        return result.images_per_second

    few = Photographs(photographs, data.config, limit=2 * options.batch_size)
    forward_all(model, few, device, options)  # warm
    systems = {"bare": bare, **{suffix: lambda s=suffix: ours(s) for suffix in FORMATS}}
    rates = alternate(systems, options.rounds)
    speed = medians(rates)
    print_line(
        "extract",
        computing=options,
        ratio={suffix: speed[suffix] / speed["bare"] for suffix in FORMATS},
        goal=GOAL,
        baseline="decode and forward_features, nothing kept",
        images_per_second=speed,
        legs_seconds=legs,
        rounds=rates,
        sizes={
            "dim": model.num_features,
            **{k: getattr(options, k) for k in ("model", "images", "batch_size", "workers")},
        },
    )


class Photographs:
    """The files, decoded and transformed with timm's own evaluation transform."""

    def __init__(self, folder: Path, config: dict, limit: int | None = None) -> None:
        from timm.data import create_transform

        self.paths = sorted(folder.rglob("*.jpg"))[:limit]
        self.config, self.transform = config, create_transform(**config)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def forward_all(
    model: nn.Module, data: Photographs, device: torch.device, options: argparse.Namespace
) -> float:
    """Images per second of one pass over the data."""
    import torch
    from torch.utils.data import DataLoader

    on_gpu = device.type == "cuda"
    begin = time.perf_counter()
    loader = DataLoader(
        data, batch_size=options.batch_size, num_workers=options.workers, pin_memory=on_gpu
    )
    precision = precision_of(options)
    mixed = torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)
    with torch.inference_mode(), mixed:
        for images in loader:
            model.forward_features(images.to(device, non_blocking=True))
    if on_gpu:
        torch.cuda.synchronize()
    return len(data) / (time.perf_counter() - begin)


def discard(cache: Path) -> None:
    """Outside the clock: the cache's disk and page cache, and the backbone's memory."""
    if cache.is_dir():
        shutil.rmtree(cache)
    else:
        cache.unlink()
    gc.collect()


if __name__ == "__main__":
    main()
