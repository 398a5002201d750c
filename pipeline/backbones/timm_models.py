"""timm's models as backbones: images in, tokens of each block out.

The only file that builds timm models. Taps are read with forward hooks on the model's run of
blocks, so no forward pass is copied here and most timm models work: plain ViTs (class, distillation
and register tokens, average pooling, rotary embeddings, EVA, CLIP and SigLIP towers), and backbones
in stages (Swin, ConvNeXt, ResNet), whose maps become tokens in row-major order.

What this file does not know: caches, side networks, tasks.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.backbones.blocks import describe
from pipeline.backbones.contract import Backbone, FinalNorm, Sink
from pipeline.backbones.hooks import BlockHooks
from pipeline.backbones.weights import read_weights, weights_sha256
from pipeline.errors import BackboneError, SettingError, gist, needed_for
from pipeline.side.contract import TokenShape
from pipeline.side.tap import tap_depths
from pipeline.sources.batches import ImageBatch, Images, image_batches

with needed_for("a backbone", extra="extract"):
    import timm
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

HUB = "hf-hub:"  # timm's word for a repository of the hub that holds a model for it
STAGED = ("swin_transformer", "swin_transformer_v2", "convnext", "resnet")  # timm's modules


@dataclass(frozen=True, kw_only=True)
class ImagePreprocessing:
    """How an image becomes a (3, H, W) tensor; timm's evaluation transform and its names."""

    img_size: tuple[int, int]
    crop_pct: float
    crop_mode: str
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: lists for tuples."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def transform(self, *, normalize: bool = True) -> Callable[[Image.Image], Tensor]:
        """timm's deterministic evaluation transform: RGB image → (3, H, W) float32.

        Not normalised, it ends with pixels, uint8.
        """
        return create_transform(
            input_size=(3, *self.img_size),
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            normalize=normalize,
        )

    def levels(self) -> Tensor:
        """What `transform` makes of each value of a pixel: (3, 256) float32."""
        mean, std = (torch.tensor(values)[:, None] for values in (self.mean, self.std))
        return (torch.arange(256.0) / 255 - mean) / std


class TimmBackbone(Backbone):
    """A timm model; its inputs are images (B, 3, H, W), pixels (uint8) or normalised (float32)."""

    preprocessing: ImagePreprocessing

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        preprocessing: ImagePreprocessing,
        device: torch.device,
    ) -> None:
        blocks = _run_of_blocks(model)
        if not blocks:
            raise BackboneError(
                f"{name}: expected a model made of a run of blocks, came {type(model).__name__}, "
                f"which has none. `sidecache models` lists what works."
            )
        self.name = name
        self.model = model.eval().requires_grad_(False).to(device)
        self.preprocessing = preprocessing
        self.prepare = preprocessing.transform()
        self.device = device
        self._levels = preprocessing.levels().flatten().to(device)  # moved once: a copy waits
        self.blocks = len(blocks)
        self.prefix_tokens = int(getattr(model, "num_prefix_tokens", 0))
        self.weights_sha256 = weights_sha256(model)
        self.final_norm = _final_norm(model, name)
        self._channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        self._hooks = BlockHooks(blocks)
        self.taps, grids = self._measure()
        self.block_descriptions = describe(blocks, grids[1:])

    def keep(self, taps: Sequence[str]) -> None:
        """Read only these taps from now on; a plain ViT stops after the deepest."""
        self._hooks.wanted = set(taps)
        if hasattr(self.model, "blocks"):
            deepest = max(tap_depths(taps))
            self.model.blocks = self.model.blocks[: max(1, deepest)]  # type: ignore[index]

    def batches(
        self,
        rows: Images,
        *,
        pending: Sequence[range],
        batch_size: int,
        starts: Sequence[int] = (0,),
        workers: int,
        pin_memory: bool = False,
    ) -> Iterator[ImageBatch]:
        """Pixels, uint8: a quarter of the bytes; `read_taps` normalises them."""
        return image_batches(
            rows,
            self.preprocessing.transform(normalize=False),
            self.preprocessing.img_size,
            pending=pending,
            batch_size=batch_size,
            starts=starts,
            workers=workers,
            pin_memory=pin_memory,
        )

    def read_taps(self, inputs: Tensor, sink: Sink, *, precision: torch.dtype) -> None:
        """Images (B, 3, H, W) through the blocks; a map's tokens are in row-major order."""
        images = inputs.to(self.device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = self.normalised(images)
        self._run(images, lambda name, x: sink(name, self._as_tokens(x)), precision)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) uint8 → float32, bit for bit as `prepare` has them.

        Looked up, not computed: devices divide in their own ways.
        """
        first = 256 * torch.arange(3, dtype=torch.int32, device=self.device)[:, None, None]
        places = (pixels + first).flatten()
        return self._levels.index_select(0, places).view(pixels.shape)

    def _run(self, images: Tensor, sink: Sink, precision: torch.dtype) -> None:
        with (
            self._hooks.listening(sink),
            torch.inference_mode(),
            torch.autocast(self.device.type, dtype=precision, enabled=precision != torch.float32),
        ):
            self.model.forward_features(images)  # type: ignore[operator]

    def _as_tokens(self, x: Tensor) -> Tensor:
        """(B, T, D) as it is; a map (B, H, W, D) or (B, D, H, W) → (B, H W, D)."""
        if x.ndim == 4:
            x = x if self._channels_last else x.permute(0, 2, 3, 1)  # (B, H, W, D)
            x = x.flatten(1, 2)  # (B, H W, D)
        return x

    def _measure(self) -> tuple[dict[str, TokenShape], list[tuple[int, int] | None]]:
        """The shape of each tap, and its grid (H, W) if it is a map."""
        taps: dict[str, TokenShape] = {}
        grids: list[tuple[int, int] | None] = []

        def sink(name: str, x: Tensor) -> None:
            if x.ndim not in (3, 4):
                raise BackboneError(
                    f"{self.name}: expected tap {name} to be (batch, tokens, dim) or a map, came "
                    f"{tuple(x.shape)}"
                )
            _, tokens, dim = self._as_tokens(x).shape
            taps[name] = TokenShape(tokens=tokens, prefix_tokens=self.prefix_tokens, dim=dim)
            side = x.shape[1:3] if self._channels_last else x.shape[2:4]
            grids.append((side[0], side[1]) if x.ndim == 4 else None)

        blank = torch.zeros(1, 3, *self.preprocessing.img_size, device=self.device)
        self._run(blank, sink, torch.float32)
        return taps, grids


def load_backbone(
    name: str,
    *,
    device: torch.device,
    weights: str | Path | None = None,
    pretrained: bool = True,
    seed: int = 0,
    preprocessing: dict[str, Any] | None = None,
) -> TimmBackbone:
    """Build a timm model, load its weights strictly, freeze it.

    `name` is timm's, with a tag or without, or `hf-hub:` and a repository of the hub. `weights` is
    a file (safetensors, pth, npz) used instead of the hub; `pretrained=False` draws weights from
    `seed`. `preprocessing` overrides fields of the model's own `ImagePreprocessing`, in values as
    they are or as JSON has them (None is ignored). Raises BackboneError (unknown name, weights that
    do not fit, hub out of reach) and SettingError (a preprocessing value that cannot be).
    """
    of_hub = name.startswith(HUB)
    if not of_hub and not timm.is_model(name):
        raise BackboneError(_unknown_model(name))
    overrides: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value  # as JSON returns them
        for key, value in (preprocessing or {}).items()
        if value is not None
    }
    size = overrides.get("img_size")
    shape = {"img_size": size if size is None or len(set(size)) > 1 else size[0]} if size else {}
    with torch.random.fork_rng(devices=[]), _quiet_timm():
        torch.manual_seed(seed)
        if weights is not None:
            model = _with_weights_file(name, Path(weights), shape)
        else:
            model = _build(name, pretrained=pretrained, **shape)
    how = _preprocessing(model, overrides)
    model.reset_classifier(0)  # type: ignore[operator]
    tag = getattr(model, "pretrained_cfg", {}).get("tag") or ""
    whole = of_hub or "." in name or weights is not None or not pretrained
    full = name if whole else f"{name}.{tag}"
    return TimmBackbone(
        model,
        name=full.removesuffix("."),
        preprocessing=how,
        device=device,
    )


def _preprocessing(model: nn.Module, overrides: dict[str, Any]) -> ImagePreprocessing:
    """The model's own, but for what `overrides` says."""
    unknown = set(overrides) - {field.name for field in fields(ImagePreprocessing)}
    if unknown:
        raise SettingError(f"preprocessing has no field {', '.join(sorted(unknown))}")
    data = resolve_model_data_config(model)
    own = ImagePreprocessing(
        img_size=tuple(data["input_size"][1:]),
        crop_pct=float(data["crop_pct"]),
        crop_mode=data["crop_mode"],
        interpolation=data["interpolation"],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )
    return replace(own, **overrides)


def list_models(pattern: str = "") -> list[str]:
    """Names of timm's models that match, as `extract` takes them: plain ViTs first, then stages.

    Judged by architecture family, without building each model.
    """
    modules = ("vision_transformer", "deit", "eva", "beit", *STAGED)
    wanted = f"*{pattern}*" if pattern and "*" not in pattern else pattern
    return [
        name
        for module in modules
        for name in timm.list_models(wanted, module=module, pretrained=True)
    ]


def _run_of_blocks(model: nn.Module) -> list[nn.Module]:
    """In order: `blocks`, or those of `layers`, of `stages`, or of `layer1` … `layer4`."""
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, nn.Sequential | nn.ModuleList):
        return list(blocks)
    for attribute in ("layers", "stages"):
        stages = getattr(model, attribute, None) or []
        if all(hasattr(stage, "blocks") for stage in stages):
            found = [block for stage in stages for block in stage.blocks]
            if found:
                return found
    return [block for i in range(1, 5) for block in getattr(model, f"layer{i}", [])]


def _build(name: str, **arguments: Any) -> nn.Module:
    try:
        return _create(name, **arguments)
    except TypeError as error:
        raise BackboneError(f"{name} does not take {', '.join(arguments)}: {error}") from error
    except (AssertionError, ValueError) as error:
        raise SettingError(f"{name}: {error}") from error
    except (OSError, RuntimeError) as error:
        raise BackboneError(
            f"{name}: the pretrained weights could not be loaded ({gist(error)}). "
            f"Without a way to the hub, give a file with --weights."
        ) from error


def _create(name: str, **arguments: Any) -> nn.Module:
    try:
        return timm.create_model(name, **arguments)
    except TypeError as error:
        if "img_size" not in arguments or "img_size" not in str(error):
            raise
        del arguments["img_size"]  # a network of convolutions takes any size
        return timm.create_model(name, **arguments)


def _with_weights_file(name: str, path: Path, shape: dict[str, Any]) -> nn.Module:
    """Through timm's own loader, which knows every format's renames; strict about the keys.

    timm loads strictly only if the number of classes is the file's, so that is read first. It gets
    the tensors, not the file: older versions of timm execute what a pickle holds.
    """
    if not path.is_file():
        raise BackboneError(f"--weights {path}: there is no such file")
    overlay: dict[str, Any] = {"label_offset": 0}
    candidates: Iterable[int | None] = [None]
    if path.suffix == ".npz":
        overlay |= {"file": str(path), "custom_load": True}
    else:
        overlay["state_dict"] = timm.models.clean_state_dict(read_weights(path))
        candidates = _class_counts(name, overlay["state_dict"])
    unfit = (AssertionError, AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError)
    errors: list[Exception] = []
    for classes in candidates:
        count: dict[str, Any] = {} if classes is None else {"num_classes": classes}
        try:
            model = _create(
                name, pretrained=True, pretrained_cfg_overlay={**overlay, **count}, **count, **shape
            )
        except unfit as error:  # timm's renames take a file of other contents apart
            errors.append(error)
        else:
            model.pretrained_cfg.pop("state_dict", None)  # type: ignore[operator, union-attr]
            return model
    raise BackboneError(
        f"--weights {path} does not fit {name}: {gist(errors[0])}. "
        f"Expected a safetensors, pth or npz file with that model's weights."
    ) from errors[0]


def _class_counts(name: str, state: dict[str, Any]) -> list[int | None]:
    """Numbers of classes to try: the file's own if it has a classifier, timm's default, none."""
    classifier = timm.get_pretrained_cfg_value(name, "classifier") or "head"
    first = classifier if isinstance(classifier, str) else classifier[0]
    weight = state.get(f"{first}.weight")
    return [len(weight)] if weight is not None else [None, 0]


def _final_norm(model: nn.Module, name: str) -> FinalNorm:
    """`norm` if the model has one, else `fc_norm` or `head.norm` (models that pool first)."""
    head = getattr(model, "head", None)
    candidates = [getattr(model, name, None) for name in ("norm", "fc_norm")]
    for norm in [*candidates, getattr(head, "norm", None)]:
        if norm is None or isinstance(norm, nn.Identity):
            continue
        kind = "rms" if "RMS" in type(norm).__name__ else "layer"
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        if not hasattr(norm, "eps"):
            raise BackboneError(
                f"{name}: the final norm is a {type(norm).__name__}; expected LayerNorm or RMSNorm"
            )
        return FinalNorm(
            kind=kind,
            eps=float(norm.eps),
            weight=None if weight is None else weight.detach().float().cpu().clone(),
            bias=None if bias is None else bias.detach().float().cpu().clone(),
        )
    return FinalNorm(kind="none", eps=0.0, weight=None, bias=None)


def _unknown_model(name: str) -> str:
    close = difflib.get_close_matches(name, timm.list_models(), 4, cutoff=0.5)
    return (
        f"timm has no model {name!r}; close to it: {', '.join(close) or 'none'}. "
        f"`sidecache models` lists what works."
    )


class _quiet_timm:
    """timm and the hub's client log while they load; what matters comes as an exception."""

    def __enter__(self) -> None:
        self._loggers = [logging.getLogger(name) for name in ("timm", "huggingface_hub")]
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)
