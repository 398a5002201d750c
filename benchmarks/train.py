"""LAST trained from a cache, against LAST trained live and against LoRA, in images a second.

    ours  systems.train_members: resident features, the batch selected, one member
    live  the same LAST, the backbone run over the batch at every step (no gradient)
    lora  peft, rank 8 on qkv, head trained, AdamW; forward and backward through the backbone

Each system lives in a process of its own, so that its peak memory can be told, and the processes
take turns. Live and LoRA get random tensors for images: they are spared the decoding, which a real
training pays at every epoch. A fourth process measures the matrix rate for the floor (floor.py).
All four compute in one precision: bfloat16 where the hardware multiplies it, else float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from measure import alternate, medians, precision_of, print_line
from synthetic import CLASSES
from systems import Round, features_parser, processes, train_members, with_cache

GOALS = {"live": 10.0, "lora": 20.0, "memory": 0.35}


def main() -> None:
    parser = features_parser(__doc__, rows=128, epochs=3, rounds=5)
    parser.add_argument("--model", default="vit_base_patch16_224", help="for live and LoRA")
    parser.add_argument("--steps", type=int, default=2, help="of live and LoRA, a round")
    with_cache(parser.parse_args(), measure)


def measure(options: argparse.Namespace, cache: Path) -> None:
    sizes = {"taps": options.taps, "tokens": options.tokens, "dim": options.dim}
    with processes(SYSTEMS, options, cache) as systems:
        rates = alternate({name: system.round for name, system in systems.items()}, options.rounds)
        memory = {name: system.finish() for name, system in systems.items() if name != "matrix"}
    speed = medians(rates)
    matrix = speed.pop("matrix")
    from floor import last_step_operations  # torch, which the parent of the processes does without

    operations = last_step_operations(
        tokens=options.tokens, dim=options.dim, rank=16, modules=options.taps - 1
    )
    floor = matrix / sum(operations.values())
    features = memory["ours"]["features"]
    own = memory["ours"]["peak"] - features
    print_line(
        "train",
        computing=options,
        ratio={
            "live": speed["ours"] / speed["live"],
            "lora": speed["ours"] / speed["lora"],
            "memory": own / memory["lora"]["peak"],
        },
        goal=GOALS,
        baseline="the same LAST behind its backbone; LoRA (peft, r = 8 on qkv)",
        images_per_second=speed,
        peak_bytes={name: record["peak"] for name, record in memory.items()},
        ready_bytes={name: record["ready"] for name, record in memory.items()},
        feature_bytes=features,
        floor={
            "operations_per_image": operations,
            "matrix_operations_per_second": matrix,
            "images_per_second": floor,
            "reached": speed["ours"] / floor,
        },
        rounds=rates,
        sizes={
            **sizes,
            **{k: getattr(options, k) for k in ("model", "rows", "batch_size", "epochs", "steps")},
        },
    )


# --- the systems ----------------------------------------------------------------------------------


def live(options: argparse.Namespace, cache: Path, device: Any) -> Round:
    import torch

    from cache import Reader
    from pipeline.backbones.timm_models import load_backbone
    from pipeline.config import Member
    from pipeline.features.labelled import feature_spec
    from pipeline.features.operands import Batch
    from pipeline.tasks import task_of
    from pipeline.training.cohort import make_cohorts

    with Reader(cache) as reader:
        spec = feature_spec(reader, CLASSES)
        task = task_of(reader.target())
    backbone = load_backbone(options.model, device=device, pretrained=False, preprocessing={})
    backbone.keep(spec.taps)
    (cohort,) = make_cohorts(
        [Member(method="last", task="label", epochs=10**6)], spec, {task.question: task}, device
    )
    images, labels = random_batch(options, device)
    precision = precision_of(options)
    shape = (options.batch_size, options.tokens, options.dim)
    features = {tap: torch.empty(shape, dtype=torch.float16, device=device) for tap in spec.taps}

    def keep(tap: str, tokens: torch.Tensor) -> None:
        features[tap].copy_(tokens)

    def run() -> float:
        cohort.begin_epoch(cohort.optimiser.steps // options.steps, options.steps)
        for _ in range(options.steps):
            backbone.read_taps(images, keep, precision=precision)
            with torch.no_grad():
                operands = cohort.network.operands(features, precision)
            cohort.step(Batch({0: operands}, {task.question: labels}), 0)
        return options.steps * options.batch_size

    return run, 0


def lora(options: argparse.Namespace, cache: Path, device: Any) -> Round:
    import timm
    import torch
    from peft import LoraConfig, get_peft_model

    model = timm.create_model(options.model, pretrained=False, num_classes=CLASSES)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["qkv"], modules_to_save=["head"])
    network = get_peft_model(model, config).to(device).train()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-3)
    images, labels = random_batch(options, device)
    precision = precision_of(options)
    mixed = precision != torch.float32

    def run() -> float:
        for _ in range(options.steps):
            with torch.autocast(device.type, dtype=precision, enabled=mixed):
                logits = network(images)
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return options.steps * options.batch_size

    return run, 0


def matrix(options: argparse.Namespace, cache: Path, device: Any) -> Round:
    from floor import matrix_products

    return matrix_products(device, precision_of(options)), 0


def random_batch(options: argparse.Namespace, device: Any) -> Any:
    import torch

    random = torch.Generator().manual_seed(0)
    images = torch.randn(options.batch_size, 3, 224, 224, generator=random).to(device)
    labels = torch.randint(CLASSES, (options.batch_size,), generator=random).to(device)
    return images, labels


SYSTEMS = {"ours": train_members, "live": live, "lora": lora, "matrix": matrix}

if __name__ == "__main__":
    main()
