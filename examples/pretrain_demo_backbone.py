"""Pretrain the demo's backbone: timm's test_vit, from scratch, on the rendered "shape" task.

    python examples/pretrain_demo_backbone.py --out pipeline/demo/backbone.safetensors

Position, orientation and colour are nuisances of that task: nothing rewards the class token for
keeping them, and the demo then asks for two of them. Besides the class token's loss, each patch
token must name the class of the shape that covers it ("token labelling", Jiang et al. 2021,
https://arxiv.org/abs/2104.10858); without it so small a ViT learns very slowly from scratch.
The head for that is thrown away.

Everything is drawn from --seed, on the CPU; float sums differ between machines and thread counts,
so weights repeat closely, not bitwise. float32 on purpose: at width 64 bfloat16 autocast is slower
(450 against 530 images/s, 2 cores). Weights are saved after every epoch.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.demo.shapes import TASKS, mask, pictures, render

MODEL = "test_vit"
CLASSES = TASKS["shape"].classes
PATCH = 16
BACKGROUND_WEIGHT = 0.15  # most patches are background


def rendered(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Red, green, blue and the shape's mask as bytes, (count, 4, side, side); labels."""
    images, labels = [], []
    for label, picture in pictures("shape", seed=seed, split="train", count=count):
        cover = (mask(picture)[..., None] * 255).astype(np.uint8)
        layers = np.concatenate([np.asarray(render(picture)), cover], axis=2)
        images.append(torch.from_numpy(layers).permute(2, 0, 1).contiguous())
        labels.append(label)
    return torch.stack(images), torch.tensor(labels)


def augmented(images: Tensor, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cropped, mirrored, transposed, recoloured pixels; share of each patch that is shape.

    Every change leaves shape and texture what they are. Crop and mirrors are one per batch.
    """

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    top, left = draw(images.shape[2] - side + 1), draw(images.shape[3] - side + 1)
    images = images[:, :, top : top + side, left : left + side]
    if draw(2):
        images = images.transpose(2, 3)
    images = images.flip([axis for axis in (2, 3) if draw(2)]).float() / 255
    gain = 0.8 + 0.4 * torch.rand(len(images), 3, 1, 1, generator=generator)
    pixels = (images[:, torch.randperm(3, generator=generator)] * gain).clamp(0, 1)
    return pixels, functional.avg_pool2d(images[:, 3:], PATCH).flatten(1)  # (B, patches)


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(count, generator=generator)[: count // size * size].split(size)


def learning_rate(step: int, steps: int, peak: float) -> float:
    warmup = steps // 30 + 1
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def initialise(model: nn.Module) -> None:
    """timm starts every ViT at standard deviation 0.02, made for widths ten times test_vit's.

    Positions start as sines and cosines of row and column: a task that does not ask for position
    would leave a random start random, and neighbours would then have nothing in common.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "head":
            nn.init.xavier_uniform_(module.weight)
    nn.init.normal_(model.cls_token, std=0.2)
    nn.init.normal_(model.patch_embed.proj.weight, std=1.5 / math.sqrt(3 * PATCH * PATCH))
    grid = list(model.patch_embed.grid_size)
    sines = build_sincos2d_pos_embed(grid, dim=model.embed_dim, temperature=100.0)
    with torch.no_grad():
        model.pos_embed[:, model.num_prefix_tokens :] = 0.7 * sines


@torch.inference_mode()
def accuracy(model: nn.Module, count: int, seed: int) -> float:
    """On the val split, through the very transform that extraction uses."""
    transform = create_transform(**resolve_model_data_config(model))
    model.eval()
    drawn = list(pictures("shape", seed=seed, split="val", count=count))
    hits = 0
    for first in range(0, count, 100):
        labels, chosen = zip(*drawn[first : first + 100], strict=True)
        inputs = torch.stack([transform(render(picture)) for picture in chosen])
        hits += int((model(inputs).argmax(1) == torch.tensor(labels)).sum())
    model.train()
    return hits / count


def save(model: nn.Module, out: Path, **facts: object) -> None:
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    versions = {"torch": torch.__version__, "timm": timm.__version__}
    metadata = {
        "script": "examples/pretrain_demo_backbone.py",
        "model": MODEL,
        "classes": ",".join(CLASSES),
        "date": datetime.now(UTC).date().isoformat(),
        **{name: str(value) for name, value in {**versions, **facts}.items()},
    }
    partial = out.with_suffix(".partial")
    save_file(tensors, partial, metadata=metadata)
    partial.replace(out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("pipeline/demo/backbone.safetensors"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=8000, help="rendered once; 0.9 GB")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    settings = parse()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    model = timm.create_model(MODEL, num_classes=len(CLASSES))
    initialise(model)
    patch_head = nn.Linear(model.num_features, len(CLASSES) + 1)  # class 0: background
    patch_weights = torch.tensor([BACKGROUND_WEIGHT] + [1.0] * len(CLASSES))
    config = resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    parameters = [*model.parameters(), *patch_head.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim == 2], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr)

    start = time.perf_counter()
    images, labels = rendered(settings.images, settings.seed)
    print(f"rendered {settings.images} images in {time.perf_counter() - start:.0f} s", flush=True)

    start, losses, hits, seen = time.perf_counter(), 0.0, 0, 0
    order = batches(settings.images, settings.batch_size, generator)
    for step in range(settings.steps):
        rows = next(order)
        pixels, cover = augmented(images[rows], config["input_size"][-1], generator)
        targets = labels[rows]
        patch_targets = torch.where(cover > 0.4, targets[:, None] + 1, 0)  # (B, patches)

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings.lr)
        tokens = model.forward_features((pixels - mean) / std)
        logits = model.forward_head(tokens)
        patch_logits = patch_head(tokens[:, model.num_prefix_tokens :])
        loss = functional.cross_entropy(logits, targets) + functional.cross_entropy(
            patch_logits.flatten(0, 1), patch_targets.flatten(), weight=patch_weights
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

        losses += float(loss.detach()) * len(rows)
        hits += int((logits.argmax(1) == targets).sum())
        seen += len(rows)
        if seen + settings.batch_size > settings.images or step + 1 == settings.steps:
            seconds = round(time.perf_counter() - start)
            val = accuracy(model, 20 * len(CLASSES), settings.seed)
            print(
                f"step {step + 1}/{settings.steps}  loss {losses / seen:.3f}"
                f"  train accuracy {hits / seen:.3f}  val accuracy {val:.4f}  {seconds} s",
                flush=True,
            )
            facts = {**vars(settings), "step": step + 1, "val_accuracy": val, "seconds": seconds}
            save(model, settings.out, **{k: v for k, v in facts.items() if k != "out"})
            losses, hits, seen = 0.0, 0, 0


if __name__ == "__main__":
    main()
