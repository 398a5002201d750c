"""What only a GPU can show: both stages there, against the CPU. `pytest -m gpu`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import extract_config, train_config

from cache import Reader, decode, verify
from pipeline.config import Member
from pipeline.extract import extract
from pipeline.records import PassStarted
from pipeline.runs.run import Run
from pipeline.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LAST = Member(method="last", epochs=4, warmup_epochs=1, drop_path=0.2, settings={"rank": 4})


def test_extraction_equals_the_cpu(images: Path, zarr_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.zarr"
    extract(extract_config(images, out, device="cuda", workers=2))
    assert verify(out).ok
    with Reader(out) as ours, Reader(zarr_cache) as cpu:
        assert ours.fingerprint == cpu.fingerprint
        rows = range(ours.rows)
        difference = torch.from_numpy(ours.read(rows) - cpu.read(rows))
    assert difference.abs().max() < 1e-2  # TF32 and other kernels


def test_sums_in_int8_equal_the_cpus(images: Path, tmp_path: Path) -> None:
    for device in ("cuda", "cpu"):
        out = tmp_path / f"{device}.zarr"
        asked = {"gather": "normsum", "gather_pooled": True, "dtype": "int8"}
        extract(extract_config(images, out, device=device, **asked))
        assert verify(out).ok
    with Reader(tmp_path / "cuda.zarr") as ours, Reader(tmp_path / "cpu.zarr") as cpu:
        rows = range(ours.rows)
        for stack in ("tokens", "pooled"):
            one, other = (decode(reader.read(rows, stack=stack), "int8") for reader in (ours, cpu))
            assert np.abs(one - other).max() <= 0.02 * np.abs(other).max()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lst", {"reduction": 4, "init": "pruned"}),
        ("miet", {"rank": 4}),
        ("miet", {"rank": 4, "head": "last", "gather": "normsum"}),
        ("attentive", {}),
        ("linear", {"last_n": 2}),
    ],
)
def test_every_method_trains_as_on_the_cpu(
    images: Path, tmp_path: Path, method: str, settings: dict[str, Any]
) -> None:
    cache = tmp_path / "c.zarr"
    extract(extract_config(images, cache, device="cuda", ladder_init="fisher", reduction=4))
    member = Member(method=method, epochs=4, warmup_epochs=1, settings=settings)
    losses = []
    for device in ("cuda", "cpu"):
        config = train_config(cache, tmp_path / device, member, member, device=device)
        train(config)
        losses.append([line["train_loss"] for line in Run(tmp_path / device).metrics()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize("resident", ["device", "ram", "disk"])
def test_training_equals_the_cpu(zarr_cache: Path, tmp_path: Path, resident: str) -> None:
    records: list[object] = []
    config = train_config(zarr_cache, tmp_path / "cpu", LAST)
    train(config)
    changes = {"device": "cuda", "resident": resident, "out": str(tmp_path / "gpu")}
    train(dataclasses.replace(config, **changes), records.append)
    (start,) = [record for record in records if isinstance(record, PassStarted)]
    assert start.resident == resident
    runs = [Run(tmp_path / name).metrics() for name in ("gpu", "cpu")]
    ours, theirs = ([line["train_loss"] for line in lines] for lines in runs)
    assert ours == pytest.approx(theirs, rel=1e-2)
