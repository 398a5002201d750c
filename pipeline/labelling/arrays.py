"""A cache of features that are in memory already, whoever computed them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cache import Labelling, Manifest, Stack, Target, Writer, encode, encode_keys
from pipeline import __version__
from pipeline.errors import SettingError
from pipeline.side.tap import tap_names

TRAIN_SHARE = 0.8  # of the rows, where nobody says splits


def write_arrays(
    out: Path,
    tokens: Any,
    *,
    labels: Any = None,
    split: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    prefix_tokens: int = 0,
    dtype: str = "float16",
    name: str = "arrays",
) -> None:
    """Write a cache; see `sidecache.from_arrays`. The same arrays again: it is left alone.

    Raises SettingError for shapes that do not agree, cache.StorageOverflow for a value that does
    not fit `dtype`, and what the cache's writer raises.
    """
    taps = _taps(tokens)
    rows = len(next(iter(taps.values())))
    stacks, values = _stacks(taps, rows, prefix_tokens, dtype)
    labelling, tables = _labelling(rows, labels, split)
    digest = hashlib.sha256()
    for array in values.values():
        digest.update(array.data)
    manifest = Manifest(
        identity={
            "backbone": {"name": name, "weights_sha256": digest.hexdigest()},
            "preprocessing": {},
            "taps": list(taps),
            "gather": "none",
            "tokens": "all",
            "dtype": dtype,
            "precision": "float32",
            "views": {"count": 1, "recipe": "eval", "seed": 0},
        },
        storage=dtype,
        parts=(rows,),
        stacks=stacks,
        final_norm={"kind": "none", "eps": 0.0},
        notes={"created_by": f"sidecache {__version__}", "source": "arrays in memory"},
    )
    chosen = list(keys) if keys is not None else [f"{row:06d}" for row in range(rows)]
    _agree("keys", len(chosen), rows)
    tables["keys"] = encode_keys(chosen)
    with Writer(out, manifest, labelling, tables) as writer:
        for slots in writer.pending:
            part = slice(slots.start, slots.stop)
            writer.write(slots.start, {stack: array[part] for stack, array in values.items()})


def _taps(tokens: Any) -> dict[str, np.ndarray]:
    """Tap → (N, T, D) float32."""
    if isinstance(tokens, Mapping):
        named = {str(tap): _numpy(array) for tap, array in tokens.items()}
    else:
        whole = _numpy(tokens)
        if whole.ndim != 4:
            raise SettingError(
                f"tokens: expected (rows, taps, tokens, dim), or a mapping of taps, came "
                f"{whole.shape}"
            )
        named = dict(zip(tap_names(range(whole.shape[1])), whole.swapaxes(0, 1), strict=True))
    if not named:
        raise SettingError("tokens: expected one tap or more, came none")
    taps = {tap: array[:, None] if array.ndim == 2 else array for tap, array in named.items()}
    rows = len(next(iter(taps.values())))
    for tap, array in taps.items():
        if array.ndim != 3 or len(array) != rows or not array.size:
            raise SettingError(
                f"tap {tap}: expected ({rows}, tokens, dim) or ({rows}, dim), came {array.shape}"
            )
    return taps


def _stacks(
    taps: Mapping[str, np.ndarray], rows: int, prefix_tokens: int, dtype: str
) -> tuple[tuple[Stack, ...], dict[str, np.ndarray]]:
    """Taps of one shape make a stack: (rows, 1, taps, tokens, width) each, as it is stored."""
    shapes: dict[tuple[int, ...], list[str]] = {}
    for tap, array in taps.items():
        shapes.setdefault(array.shape[1:], []).append(tap)
    stacks, values = [], {}
    for number, ((count, dim), names) in enumerate(shapes.items(), start=1):
        name = "tokens" if len(shapes) == 1 else f"stage{number}"
        prefix = min(prefix_tokens, count)
        stacks.append(
            Stack(name=name, taps=tuple(names), tokens=count, prefix_tokens=prefix, dim=dim)
        )
        together = np.stack([taps[tap] for tap in names], axis=1)[:, None]
        values[name] = encode(np.ascontiguousarray(together), dtype)
    return tuple(stacks), values


def _labelling(
    rows: int, labels: Any, split: Sequence[str] | None
) -> tuple[Labelling, dict[str, np.ndarray]]:
    tables: dict[str, np.ndarray] = {}
    targets: tuple[Target, ...] = ()
    if labels is not None:
        told = labels.tolist() if hasattr(labels, "tolist") else list(labels)
        _agree("labels", len(told), rows)
        target, tables["labels/label"] = _target(told)
        targets = (target,)
    names = list(split) if split is not None else _usual_split(rows)
    _agree("split", len(names), rows)
    splits = tuple(dict.fromkeys(names))
    tables["split"] = np.array([splits.index(each) for each in names], np.int16)
    return Labelling(rows=rows, targets=targets, splits=splits), tables


def _target(told: Sequence[Any]) -> tuple[Target, np.ndarray]:
    """Numbers with a point are a regression; all else, whole numbers too, names classes."""
    known = [value for value in told if value is not None]
    if known and all(isinstance(value, float) for value in known):
        values = [float("nan") if value is None else value for value in told]
        return Target(name="label", kind="regression"), np.array(values, np.float32)
    classes = sorted(set(known), key=lambda value: (isinstance(value, str), value))
    place = {value: number for number, value in enumerate(classes)}
    target = Target(name="label", classes=tuple(map(str, classes)))
    return target, np.array([place.get(value, -1) for value in told], np.int64)


def _usual_split(rows: int) -> list[str]:
    order = np.random.default_rng(0).permutation(rows)
    train = set(order[: max(1, round(TRAIN_SHARE * rows))].tolist())
    return ["train" if row in train else "val" for row in range(rows)]


def _numpy(array: Any) -> np.ndarray:
    """A numpy array or a torch tensor as float32 numbers."""
    if hasattr(array, "detach"):
        array = array.detach().float().cpu().numpy()
    return np.asarray(array, np.float32)


def _agree(what: str, came: int, rows: int) -> None:
    if came != rows:
        raise SettingError(f"{what}: expected one for each of {rows} rows, came {came}")
