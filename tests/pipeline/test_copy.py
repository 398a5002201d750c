"""Sums, fewer taps and smaller storage types: made by extraction and by copying, they agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import extract_config, train_config

from cache import (
    IdentityMismatch,
    Labelling,
    Manifest,
    Reader,
    Stack,
    StorageOverflow,
    Writer,
    decode,
    encode,
    encode_keys,
    inspect,
    verify,
)
from pipeline.config import CopyConfig, Member
from pipeline.copy import copy
from pipeline.errors import MissingTaps, SettingError
from pipeline.extract import extract
from pipeline.features.casting import store
from pipeline.sources.open import open_source
from pipeline.train import train
from sidecache import evaluate

MIET = Member(method="miet", epochs=4, warmup_epochs=1, settings={"rank": 4})
LOSS = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 1 / 254}  # of the largest


def values(path: Path) -> np.ndarray:
    """(rows, taps, T, D) float32."""
    with Reader(path) as reader:
        return decode(reader.read(range(reader.rows)), reader.manifest.storage)


def smaller(src: Path, dst: Path, **changes: Any) -> CopyConfig:
    return CopyConfig(src=str(src), dst=str(dst), **changes)


@pytest.mark.parametrize("dtype", LOSS)
def test_a_copied_sum_is_the_extracted_sum(
    cache: Path, images: Path, tmp_path: Path, dtype: str
) -> None:
    """Both are the sum of all taps in float32, rounded once."""
    direct, copied = tmp_path / "direct.zarr", tmp_path / "copied.h5"
    result = extract(extract_config(images, direct, gather="sum", dtype=dtype))
    copy(smaller(cache, copied, gather="sum", dtype=dtype))
    exact = values(cache).sum(axis=1, keepdims=True)
    largest = np.abs(exact).max(axis=-1, keepdims=True)
    tolerance = 2 * LOSS[dtype] * largest + 1e-5
    assert (np.abs(values(direct) - exact) <= tolerance).all()
    assert (np.abs(values(copied) - exact) <= tolerance).all()
    assert verify(direct).ok and verify(copied).ok
    width = exact.shape[-1] + (4 if dtype == "int8" else 0)
    size = {"int8": 1, "float32": 4}.get(dtype, 2)
    assert result.bytes == 24 * exact.shape[2] * width * size
    if dtype == "float32":
        assert inspect(copied).error == {}
    else:
        error = inspect(copied).error["tokens"]
        assert 0 < error["relative"] < 3 * LOSS[dtype]
        assert error["relative"] <= error["worst_token"] < 10 * LOSS[dtype]


def test_groups_and_normed_sums(cache: Path, images: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "gather": "normsum",
        "gather_groups": 2,
        "gather_k": 4,
        "gather_pooled": True,
    }
    extract(extract_config(images, tmp_path / "direct.zarr", **asked))
    copy(smaller(cache, tmp_path / "copied.zarr", **asked))
    taps = torch.from_numpy(values(cache))
    normed = torch.nn.functional.layer_norm(taps, taps.shape[-1:], eps=1e-6)
    expected = torch.stack([normed[:, :3].sum(dim=1), normed[:, 3:5].sum(dim=1)], dim=1)
    for name in ("direct", "copied"):
        with Reader(tmp_path / f"{name}.zarr") as reader:
            assert reader.manifest.stacks[0].taps == ("ln(z0..z2)", "ln(z3..z4)")
            pooled = torch.from_numpy(reader.read(range(24), stack="pooled"))[:, 0]
        torch.testing.assert_close(torch.from_numpy(values(tmp_path / f"{name}.zarr")), expected)
        both = torch.stack([taps[:, 4, 0], taps[:, 4, 1:].mean(dim=1)], dim=1)
        torch.testing.assert_close(pooled, both)


def test_int8_on_the_device_is_int8_in_numpy() -> None:
    """Extraction encodes with torch, readers decode with numpy: bit for bit the same."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(6, 5, 16, generator=generator) * 10 ** torch.linspace(-30, 30, 5)[:, None]
    tokens[0, 0] = 0
    tokens[1, 1, 3] = 1e4
    stored = torch.empty(6, 5, 20, dtype=torch.int8)
    store(tokens, stored)
    assert np.array_equal(stored.numpy(), encode(tokens.numpy(), "int8"))


def test_training_from_sums_equals_training_from_taps(zarr_cache: Path, tmp_path: Path) -> None:
    sums = tmp_path / "sums.h5"
    copy(smaller(zarr_cache, sums, gather="sum"))
    results = [
        train(train_config(path, tmp_path / name, MIET)).members[0]
        for name, path in (("full", zarr_cache), ("sums", sums))
    ]
    assert results[0].scores["val_loss"] == pytest.approx(results[1].scores["val_loss"], rel=1e-4)
    for run, other in (("full", sums), ("sums", zarr_cache)):  # and each may read the other
        (scores,) = evaluate(tmp_path / run, cache=other, split=("val",), device="cpu", amp=False)
        assert scores.loss == pytest.approx(results[0].scores["val_loss"], rel=1e-4)
    with pytest.raises(
        MissingTaps, match=r"last needs .* \(there are z0\.\.z6\).*miet alone reads"
    ):
        train(train_config(sums, tmp_path / "last"))


def test_fewer_taps_train_the_same_where_they_suffice(zarr_cache: Path, tmp_path: Path) -> None:
    """LAST with a gap of two reads every second tap: from the full cache, from a part of its taps
    (`--taps`), and from a smaller cache."""
    member = Member(method="last", epochs=3, warmup_epochs=1, settings={"rank": 4, "gap": 2})
    copy(smaller(zarr_cache, tmp_path / "few.zarr", taps="every:2"))
    losses = [
        train(train_config(path, tmp_path / name, member, taps=taps)).members[0].scores["val_loss"]
        for name, path, taps in (
            ("full", zarr_cache, "all"),
            ("part", zarr_cache, "0,2,4,6"),
            ("few", tmp_path / "few.zarr", "all"),
        )
    ]
    assert losses[0] == losses[1] == losses[2]
    with pytest.raises(SettingError, match="the cache has no z1; it has z0, z2, z4, z6"):
        train(train_config(tmp_path / "few.zarr", tmp_path / "no", member, taps="0,1"))


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("method", ["miet", "miet, head last", "linear", "attentive"])
def test_a_member_trained_on_a_small_cache_goes_live(
    images: Path, tmp_path: Path, method: str
) -> None:
    """Behind its backbone it makes what it was trained on: sums, or an earlier tap."""
    method, _, last = method.partition(", head ")
    gather: dict[str, Any] = {"taps": "0,2,4"}
    if method == "miet":
        gather = {"gather": "sum", "gather_k": 4, "gather_pooled": bool(last)}
    extract(extract_config(images, tmp_path / "c.zarr", **gather))
    settings = {"head": last} if last else {}
    member = Member(method=method, epochs=4, warmup_epochs=1, settings=settings)
    train(train_config(tmp_path / "c.zarr", tmp_path / "run", member))
    arguments: dict[str, Any] = {"split": ("test",), "device": "cpu", "amp": False}
    (cached,) = evaluate(tmp_path / "run", **arguments)
    (live,) = evaluate(tmp_path / "run", images=str(images), workers=0, **arguments)
    assert live.loss == pytest.approx(cached.loss, rel=1e-3)


def test_a_copy_keeps_rows_splits_and_labels(cache: Path, tmp_path: Path) -> None:
    dst = tmp_path / "few.h5"
    result = copy(smaller(cache, dst, taps="last:2", split=("val", "test"), dtype="float16"))
    with Reader(cache) as old, Reader(dst) as new:
        rows = old.split_rows("val", "test")
        assert new.keys == [old.keys[row] for row in rows]
        assert new.labels().tolist() == old.labels()[rows].tolist()
        assert np.array_equal(new.source_sha256, old.source_sha256[rows])
        for split in ("val", "test"):
            ours = [new.keys[row] for row in new.split_rows(split)]
            assert ours == [old.keys[row] for row in old.split_rows(split)]
        assert np.array_equal(new.final_norm["weight"], old.final_norm["weight"])
        expected = decode(old.read(rows), "float32")[:, -2:].astype(np.float16)
        assert np.array_equal(new.read(range(12)), expected)
    assert result.rows == 12 and result.copied_rows == 12
    assert (
        copy(smaller(cache, dst, taps="last:2", split=("val", "test"), dtype="float16")).copied_rows
        == 0
    )
    with pytest.raises(IdentityMismatch, match="taps"):
        copy(smaller(cache, dst, taps="last:3", split=("val", "test"), dtype="float16"))


def test_a_copy_keeps_targets_of_every_kind(images: Path, tmp_path: Path) -> None:
    lines = ["path,value:age,label:colour,labels:marks,split"]
    for number, row in enumerate(open_source(images).rows):
        age, marks = ("", 1.5, -number)[number % 3], ("", "-", "a", "a;b")[number % 4]
        colour = row.key.split("/")[1]
        lines.append(f"{images}/{row.key},{age},{colour},{marks},{row.split}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    src, dst = tmp_path / "all.zarr", tmp_path / "few.h5"
    extract(extract_config(tmp_path / "list.csv", src))
    copy(smaller(src, dst, split=("test", "train")))
    with Reader(src) as old, Reader(dst) as new:
        rows = old.split_rows("train", "test")
        assert new.labelling.targets == old.labelling.targets
        for name in ("age", "colour", "marks"):
            np.testing.assert_array_equal(new.labels(name), old.labels(name)[rows])
        assert new.seconds is not None


def test_formats_copy_into_each_other_unchanged(cache: Path, tmp_path: Path) -> None:
    for suffix in ("zarr", "h5"):
        result = copy(smaller(cache, tmp_path / f"c.{suffix}"))
        with Reader(cache) as reader:
            assert result.content == reader.content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gather": "sum", "gather_k": 9}, "needs z7, z8, z9, which .* lacks; it has z0"),
        ({"gather": "sum", "gather_groups": 9}, "expected 1 to 7 groups"),
        ({"taps": "3,9"}, "no tap z9"),
        ({"split": ("nowhere",)}, "no split 'nowhere'"),
    ],
)
def test_impossible_copies(
    zarr_cache: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((SettingError, KeyError), match=message):
        copy(smaller(zarr_cache, tmp_path / "c.zarr", **changes))
    assert not (tmp_path / "c.zarr").exists()


def test_sums_are_not_summed_again(zarr_cache: Path, tmp_path: Path) -> None:
    copy(smaller(zarr_cache, tmp_path / "sums.zarr", gather="sum"))
    with pytest.raises(SettingError, match="holds sums already"):
        copy(smaller(tmp_path / "sums.zarr", tmp_path / "c.zarr", gather="sum"))


@pytest.mark.parametrize(
    "changes", [{"gather_k": 3}, {"gather": "sum", "taps": "0,1"}, {"gather": "mean"}]
)
def test_impossible_gathers(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=r"gather|taps"):
        CopyConfig(src="a.zarr", dst="b.zarr", **changes)


def test_a_sum_that_does_not_fit_is_named(tmp_path: Path) -> None:
    """Maps added up may leave float16's range where no single one does."""
    manifest = Manifest(
        identity={"made": "by hand"},
        storage="float16",
        parts=(2,),
        stacks=(Stack(name="tokens", taps=("z0", "z1"), tokens=3, prefix_tokens=1, dim=4),),
    )
    with Writer(
        tmp_path / "c.zarr", manifest, Labelling(rows=2), {"keys": encode_keys(["a", "b"])}
    ) as writer:
        writer.write(0, {"tokens": np.full((2, 1, 2, 3, 4), 5e4, np.float16)})
    with pytest.raises(
        StorageOverflow, match=r"tap z0\.\.z1 of a: values .* to 9.997e\+04 do not fit float16"
    ):
        copy(smaller(tmp_path / "c.zarr", tmp_path / "sum.zarr", gather="sum"))
    copy(smaller(tmp_path / "c.zarr", tmp_path / "sum8.zarr", gather="sum", dtype="int8"))
    assert np.allclose(values(tmp_path / "sum8.zarr"), 2 * np.float32(np.float16(5e4)))
