"""Initial weights of LST's side blocks, cut out of the backbone: structural pruning.

From the paper's code, `pruning_v2` with `fisher-v2` [code], on T5:

    keep the 1/r channels of the embedding with the largest L1 importance
    then matrix by matrix, in the network's order: keep the columns of the channels kept before,
    and of what is left the 1/r rows of the largest L1 importance. q, k and v are one step, and
    count with the product of their importances; norms keep what the matrix before them kept.

The walk goes through every layer, also those that a ladder drops. Each matrix chooses its own
rows: the channels of the residual stream are not kept in line ("without residual"). Rows of q, k, v
are chosen over all heads at once, in ascending order, and the side block cuts them into heads anew
(the code also has v3 and v4, which keep whole heads; its scripts run v2). Importance is the
weight itself (`magnitude`), or the empirical Fisher information: squared gradients of the loss,
summed over training images one at a time (`fisher`). Ladders, gates and Up are not pruned.

Carried over to a ViT, [ours]: the patch embedding's output channels are the first step, as what
makes tokens; position embedding and class token are added to them and choose nothing, as T5's
position bias does not. Biases and layer scale keep what their matrix's rows kept. Norms of q and k,
shared by the heads, take the mean of the weights that the new heads' places had. SwiGLU's gate and
value are one step, like q, k and v. Products are taken in float64 (in float32 those of three Fisher
values vanish). The loss for the Fisher information needs a classifier, which T5 brings along: a
linear probe, fitted on the same images first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.backbones.blocks import describe, matrices
from pipeline.side.ladder_geometry import check_reduction

Images = Callable[[], Iterable[tuple[Tensor, int]]]  # (3, H, W) and its label, each time anew
Report = Callable[[int, int], None]
MATRICES = ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")
L2 = 1e-3  # on the probe's weights; without it separable images would end in gradients of zero
PROBE_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Importance:
    """How much weights matter: `first` (D, …) of the patch embedding, `blocks` of `MATRICES`."""

    first: Tensor
    blocks: Sequence[dict[str, Tensor]]


def ladder_tables(
    model: Any,
    *,
    how: str,
    reduction: int,
    layers: Sequence[int],
    images: Images,
    classes: int,
    pool: str,
    prefix_tokens: int,
    device: torch.device,
    seed: int,
    report: Report | None = None,
) -> dict[str, np.ndarray]:
    """Pruned initial weights of the side blocks `layers` (from 0) and of the side norm.

    `how` is `magnitude`, which reads no images, or `fisher`. ValueError if the model is no plain
    ViT, or not divisible by the reduction.
    """
    blocks = _plain_blocks(model, reduction)
    if how == "magnitude":
        importance = magnitude(model, blocks)
    else:
        importance = fisher(
            model,
            blocks,
            images,
            classes=classes,
            pool=pool,
            prefix_tokens=prefix_tokens,
            device=device,
            seed=seed,
            report=report,
        )
    return prune(
        [matrices(block) for block in blocks],
        importance,
        norm=_final_norm(model),
        heads=blocks[0].attn.num_heads,
        reduction=reduction,
        layers=layers,
    )


def _plain_blocks(model: Any, reduction: int) -> list[Any]:
    blocks = list(getattr(model, "blocks", []))
    described = describe(blocks, [None] * len(blocks))
    kinds = {block["kind"] for block in described}
    if kinds != {"vit"} or not hasattr(getattr(model, "patch_embed", None), "proj"):
        raise ValueError(
            f"pruned weights for LST: expected a plain ViT, came {type(model).__name__}; lst "
            f"starts from random weights there"
        )
    for layer, block in enumerate(described):
        check_reduction(block, layer, reduction)
    return blocks


def _final_norm(model: Any) -> dict[str, Tensor]:
    """Weight and bias of the norm that ends the backbone, where it has one."""
    for norm in (getattr(model, "norm", None), getattr(model, "fc_norm", None)):
        found = {kind: getattr(norm, kind, None) for kind in ("weight", "bias")}
        if found["weight"] is not None:
            return {kind: values.detach() for kind, values in found.items() if values is not None}
    return {}


def magnitude(model: Any, blocks: Sequence[Any]) -> Importance:
    """A weight matters as much as it is large."""

    def size(values: Tensor) -> Tensor:
        return values.detach().abs()

    return Importance(
        first=size(model.patch_embed.proj.weight),
        blocks=[_chosen(matrices(block, size)) for block in blocks],
    )


def _chosen(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: named[name] for name in MATRICES}


def fisher(
    model: Any,
    blocks: Sequence[Any],
    images: Images,
    *,
    classes: int,
    pool: str,
    prefix_tokens: int,
    device: torch.device,
    seed: int,
    report: Report | None = None,
) -> Importance:
    """A weight matters as much as the loss of a fitted probe changes with it.

    `model` is a timm ViT in evaluation mode. Its gradients are switched on for the pruned matrices
    and back to what they were. `report` hears (images done, images in all) of the second pass.
    """

    def features(batch: Tensor) -> Tensor:
        tokens = model.forward_features(batch)  # (B, T, D), final-normed unless fc_norm follows
        pooled = tokens[:, 0] if pool == "cls" else tokens[:, prefix_tokens:].mean(dim=1)
        return getattr(model, "fc_norm", nn.Identity())(pooled)

    pooled, labels = _pooled(images, features, device)
    weight, bias = fit_probe(pooled, labels, classes, seed)
    parameters = [model.patch_embed.proj.weight, *_pruned(blocks)]

    def losses() -> Iterator[Tensor]:
        for done, (image, label) in enumerate(images(), start=1):
            logits = features(image[None].to(device)) @ weight.T + bias
            yield functional.cross_entropy(logits, torch.tensor([label], device=device))
            if report is not None:
                report(done, len(labels))

    sums = _squared_gradients(parameters, losses())

    def information(values: Tensor) -> Tensor:
        return sums.get(id(values), values).detach()

    return Importance(
        first=sums[id(parameters[0])],
        blocks=[_chosen(matrices(block, information)) for block in blocks],
    )


def _squared_gradients(
    parameters: Sequence[nn.Parameter], losses: Iterator[Tensor]
) -> dict[int, Tensor]:
    """By id of each parameter, the sum over losses of its squared gradient."""
    before = [parameter.requires_grad for parameter in parameters]
    sums = {id(parameter): torch.zeros_like(parameter) for parameter in parameters}
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            for loss in losses:
                gradients = torch.autograd.grad(loss, parameters)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    sums[id(parameter)] += gradient.square()
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)
    return sums


def _pruned(blocks: Sequence[Any]) -> list[nn.Parameter]:
    """The blocks' own parameters that `MATRICES` are made of."""
    return [
        parameter
        for block in blocks
        for name, parameter in block.named_parameters()
        if name.endswith("weight") and parameter.ndim == 2
    ]


def _pooled(
    images: Images, features: Callable[[Tensor], Tensor], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Pooled features (N, D) and labels (N) of all images."""
    parts: list[Tensor] = []
    waiting: list[Tensor] = []
    labels: list[int] = []
    with torch.no_grad():
        for image, label in images():
            waiting.append(image)
            labels.append(label)
            if len(waiting) == PROBE_BATCH:
                parts.append(features(torch.stack(waiting).to(device)))
                waiting.clear()
        if waiting:
            parts.append(features(torch.stack(waiting).to(device)))
    return torch.cat(parts), torch.tensor(labels, device=device)


def fit_probe(pooled: Tensor, labels: Tensor, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """A linear classifier (C, D), (C) at the minimum of cross-entropy + L2 / 2 |weight|^2.

    The problem is convex; `seed` draws the start, which decides the last digits only.
    """
    generator = torch.Generator().manual_seed(seed)
    start = 0.01 * torch.randn(classes, pooled.shape[1], generator=generator, dtype=torch.float64)
    x = pooled.double()
    weight = start.to(x.device).requires_grad_()
    bias = torch.zeros(classes, dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=500,
        tolerance_grad=1e-8,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(x @ weight.T + bias, labels)
        loss = loss + L2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach().to(pooled.dtype), bias.detach().to(pooled.dtype)


def prune(
    weights: Sequence[dict[str, Tensor]],
    importance: Importance,
    *,
    norm: dict[str, Tensor],
    heads: int,
    reduction: int,
    layers: Sequence[int],
) -> dict[str, np.ndarray]:
    """Walk the network and cut out the side blocks: `block<i>/<name>`, `norm_weight`, `norm_bias`.

    `weights` holds each block's parameters as `pipeline.backbones.blocks.matrices` names them,
    `norm` those of the final norm.
    """
    tables: dict[str, Tensor] = {}
    kept = _largest([importance.first.flatten(1)], len(importance.first) // reduction)
    for layer, (block, scores) in enumerate(zip(weights, importance.blocks, strict=True)):
        side, kept = _prune_block(block, scores, kept, heads, reduction)
        if layer in layers:
            named = {name.replace(".", "_"): values for name, values in side.items()}
            tables |= {f"block{layer}/{name}": values for name, values in named.items()}
    tables |= {f"norm_{kind}": values[kept] for kind, values in norm.items()}
    return {name: values.float().cpu().numpy() for name, values in tables.items()}


def _prune_block(
    block: dict[str, Tensor],
    scores: dict[str, Tensor],
    entering: Tensor,
    heads: int,
    reduction: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """One side block's parameters, and the channels of its output, from those of its input."""
    inner, dim = block["proj.weight"].shape[1], block["proj.weight"].shape[0]
    hidden = block["fc2.weight"].shape[1]
    parts = len(block["fc1.weight"]) // hidden  # 2 with a gate
    side: dict[str, Tensor] = {}

    def step(name: str, columns: Tensor, count: int, parts: int = 1) -> Tensor:
        """Cut a matrix of `parts` parts one below the other; returns the rows that each keeps."""
        rows = _largest(list(scores[f"{name}.weight"][:, columns].chunk(parts)), count)
        size = len(block[f"{name}.weight"]) // parts
        every = torch.cat([rows + part * size for part in range(parts)])
        side[f"{name}.weight"] = block[f"{name}.weight"][every][:, columns]
        take([f"{name}.bias"], every)
        return rows

    def take(names: Sequence[str], rows: Tensor) -> None:
        side.update({name: block[name][rows] for name in names if name in block})

    take(["norm1.weight", "norm1.bias"], entering)
    attended = step("qkv", entering, heads * (inner // heads // reduction), parts=3)
    side |= _qk_norms(block, attended, heads)
    middle = step("proj", attended, dim // reduction)
    take(["ls1", "norm2.weight", "norm2.bias"], middle)
    active = step("fc1", middle, max(1, hidden // reduction), parts=parts)
    leaving = step("fc2", active, dim // reduction)
    take(["ls2"], leaving)
    return side, leaving


def _largest(scores: Sequence[Tensor], count: int) -> Tensor:
    """The `count` rows, ascending, with the largest L1 norm of the product of (n, columns) each."""
    product = torch.stack([part.double() for part in scores]).prod(dim=0)
    order = product.abs().sum(dim=1).argsort(stable=True)
    return order[len(order) - count :].sort().values


def _qk_norms(block: dict[str, Tensor], rows: Tensor, heads: int) -> dict[str, Tensor]:
    """Weights of the norms of q and k: place t of the new heads takes the mean over heads."""
    names = [name for name in block if name.startswith(("q_norm.", "k_norm."))]
    places = rows.unflatten(0, (heads, -1))  # (H, e)
    return {name: block[name][places % len(block[name])].mean(dim=0) for name in names}
