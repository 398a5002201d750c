"""Stage one as a whole: what is written, resumed, refused."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import extract_config, paint
from PIL import Image

import cli
from cache import (
    CacheIncomplete,
    IdentityMismatch,
    LabellingMismatch,
    Reader,
    StorageOverflow,
    decode,
    verify,
)
from pipeline import extract as stage
from pipeline.backbones.timm_models import ImagePreprocessing, TimmBackbone, load_backbone
from pipeline.errors import ImageError, SettingError
from pipeline.extract import extract
from pipeline.features.filling import Skipped
from pipeline.sources.batches import image_batches
from pipeline.sources.open import open_source

CPU = torch.device("cpu")


def arrays(path: Path) -> np.ndarray:
    with Reader(path) as reader:
        return reader.read(range(reader.rows))


def test_cache_holds_every_tap_of_every_image(cache: Path, images: Path) -> None:
    """Row by row against the model called by hand."""
    backbone = load_backbone(
        "test_vit", device=CPU, pretrained=False, preprocessing={"img_size": (32, 32)}
    )
    source = open_source(images)
    transform = backbone.preprocessing.transform()
    with Reader(cache) as reader:
        assert reader.keys == [row.key for row in source.rows]
        assert reader.labels().tolist() == source.target("label").values.tolist()
        assert {name: len(reader.split_rows(name)) for name in ("train", "val", "test")} == {
            "train": 12, "val": 6, "test": 6,
        }  # fmt: skip
        assert reader.manifest.stacks[0].taps == tuple(f"z{i}" for i in range(7))
        norm = reader.final_norm
        for row in (0, 11, 23):
            taps: dict[str, torch.Tensor] = {}
            image = transform(source.open(row))[None]
            backbone.read_taps(
                image, lambda tap, x, taps=taps: taps.update({tap: x[0]}), precision=torch.float32
            )
            stored = torch.from_numpy(reader.read([row])[0])
            torch.testing.assert_close(stored, torch.stack([taps[f"z{i}"] for i in range(7)]))
    model: Any = backbone.model
    assert np.array_equal(norm["weight"], model.norm.weight.numpy())
    assert norm["eps"] == model.norm.eps


def several(images: Path, out: Path, *, marks: str = "dark", order: str = "age,marks") -> Path:
    """The images as a CSV beside them: a class (but of one row), a multilabel target, a number."""
    columns = {"age": "value:age", "marks": "labels:marks"}
    lines = [",".join(["path", "label:colour", "split", *(columns[n] for n in order.split(","))])]
    for number, row in enumerate(open_source(images).rows):
        cells = {"age": number / 4 if number % 5 else "", "marks": (marks, "-", "")[number % 3]}
        colour = row.key.split("/")[1] if number else ""
        named = (str(cells[name]) for name in order.split(","))
        lines.append(",".join([f"{images}/{row.key}", colour, row.split, *named]))
    out.write_text("\n".join(lines))
    return out


def test_a_source_with_several_targets(images: Path, zarr_cache: Path, tmp_path: Path) -> None:
    table = several(images, tmp_path / "list.csv")
    extract(extract_config(table, tmp_path / "c.zarr"))
    with Reader(tmp_path / "c.zarr") as reader:
        assert [(t.name, t.kind, t.classes) for t in reader.labelling.targets] == [
            ("colour", "class", ("blue", "green", "red")),
            ("age", "regression", ()),
            ("marks", "multilabel", ("dark",)),
        ]
        colours = ["blue", "green", "red"]
        known = [colours.index(row.key.split("/")[1]) for row in open_source(images).rows[1:]]
        assert reader.labels().tolist() == [-1, *known]
        expected = [n / 4 if n % 5 else np.nan for n in range(24)]
        np.testing.assert_array_equal(reader.labels("age"), np.array(expected, np.float32))
        assert reader.labels("marks")[:, 0].tolist() == [1, 0, -1] * 8
    assert np.array_equal(arrays(tmp_path / "c.zarr"), arrays(zarr_cache))
    shown = CliRunner().invoke(cli.main, ["inspect", str(tmp_path / "c.zarr")]).stdout
    lines = dict(re.split(" {2,}", line, maxsplit=1) for line in shown.splitlines())
    assert lines["target colour"] == "3 classes: blue 7, green 8, red 8"
    assert lines["target age"] == "regression, 19 rows, min 0.25, mean 2.974, max 5.75"
    assert lines["target marks"] == "multilabel, 1 classes: dark 8"
    assert re.fullmatch(r"\d+(\.\d\d)? s", lines["extraction"])


def test_other_labels_of_any_target_are_told(images: Path, tmp_path: Path) -> None:
    config = extract_config(several(images, tmp_path / "list.csv"), tmp_path / "c.zarr")
    extract(config)
    several(images, tmp_path / "list.csv", marks="dim")
    with pytest.raises(LabellingMismatch, match=r"sidecache label .*c\.zarr .*list\.csv"):
        extract(config)
    several(images, tmp_path / "list.csv", order="marks,age")
    with pytest.raises(LabellingMismatch):  # another one comes second
        extract(config)
    several(images, tmp_path / "list.csv")
    assert extract(config).extracted_rows == 0


def test_the_identity_is_that_of_the_features(zarr_cache: Path) -> None:
    """What is asked of the inputs, and which inputs there are, is not in it."""
    with Reader(zarr_cache) as reader:
        names = set(reader.manifest.identity)
    assert names == {
        "backbone", "preprocessing", "taps", "gather", "tokens", "dtype", "precision", "views",
        "versions",
    }  # fmt: skip


def test_deep_grey_is_part_of_the_identity(tmp_path: Path, zarr_cache: Path) -> None:
    """Its pixels were others once: such a cache is refused, not mixed. Any other is as ever."""
    images = paint(tmp_path / "images", train=1, val=1, test=1)
    scan = images / "train" / "red" / "0.png"
    pixels = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(pixels * 64).save(scan)
    extract(extract_config(images, tmp_path / "deep.zarr"))
    Image.fromarray((pixels * 64 * 255.0 / 65535).round().astype(np.uint8)).save(scan)
    extract(extract_config(images, tmp_path / "flat.zarr"))
    assert np.array_equal(arrays(tmp_path / "deep.zarr"), arrays(tmp_path / "flat.zarr"))
    kept = [tmp_path / "deep.zarr", tmp_path / "flat.zarr", zarr_cache]
    identities = []
    for cache in kept:
        with Reader(cache) as reader:
            identities.append(reader.manifest.identity.get("decoding"))
    assert identities == [{"grey": "by depth"}, None, None]


def test_extraction_seconds_add_up_over_legs(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache.manifest.SHARD_BYTES", 1)
    seen: list[float] = []

    def stop(record: object) -> None:
        if isinstance(record, stage.Extracted) and record.rows >= 15:
            raise KeyboardInterrupt

    begin = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        extract(extract_config(images, tmp_path / "c.zarr"), stop)
    for _ in range(2):
        with Reader(tmp_path / "c.zarr", allow_incomplete=True) as reader:
            assert reader.seconds is not None
            seen.append(reader.seconds)
        result = extract(extract_config(images, tmp_path / "c.zarr"))
    assert 0 < seen[0] < seen[1] < time.perf_counter() - begin
    assert result.extracted_rows == 0


def test_formats_hold_the_same_bytes(images: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "float16", "bfloat16"):
        outs = [tmp_path / f"{dtype}.{suffix}" for suffix in ("zarr", "h5")]
        results = [extract(extract_config(images, out, dtype=dtype)) for out in outs]
        assert results[0].content == results[1].content
        assert results[0].fingerprint == results[1].fingerprint
        assert arrays(outs[0]).tobytes() == arrays(outs[1]).tobytes()
        assert all(verify(out).ok for out in outs)


def test_storage_types_round_the_float32_features(
    zarr_cache: Path, images: Path, tmp_path: Path
) -> None:
    exact = arrays(zarr_cache)
    for dtype, error in (("float16", 2**-11), ("bfloat16", 2**-8)):
        out = tmp_path / f"{dtype}.zarr"
        extract(extract_config(images, out, dtype=dtype))
        stored = decode(arrays(out), dtype)
        assert (np.abs(stored - exact) <= np.abs(exact) * error + 1e-6).all()


def test_images_travel_as_bytes(images: Path) -> None:
    """A batch in shared memory takes a byte a pixel and channel; one that fails is black."""
    source = open_source(images)
    how = ImagePreprocessing(img_size=(32, 32), crop_pct=1.0, crop_mode="center",
                        interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)  # fmt: skip
    (batch,) = image_batches(
        source, how.transform(normalize=False), how.img_size,
        pending=[range(24)], batch_size=24, workers=1,
    )  # fmt: skip
    assert batch.images.nbytes == 24 * 3 * 32 * 32
    assert torch.equal(batch.images[7], how.transform(normalize=False)(source.open(7)))


def test_worker_processes_change_nothing(zarr_cache: Path, images: Path, tmp_path: Path) -> None:
    extract(extract_config(images, tmp_path / "c.zarr", workers=2))
    assert np.array_equal(arrays(tmp_path / "c.zarr"), arrays(zarr_cache))


def test_a_second_call_does_nothing(cache: Path, images: Path) -> None:
    files = [p for p in ([cache] if cache.is_file() else cache.rglob("*")) if p.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert extract(extract_config(images, cache)).extracted_rows == 0
    assert {path: path.stat().st_mtime_ns for path in files} == before


@pytest.mark.parametrize("suffix", ["zarr", "h5"])
def test_an_interrupted_extraction_goes_on(
    images: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row a shard, stopped in the middle; batches do not line up with what is left."""
    monkeypatch.setattr("cache.manifest.SHARD_BYTES", 1)
    whole, broken = tmp_path / f"whole.{suffix}", tmp_path / f"broken.{suffix}"
    extract(extract_config(images, whole))
    seen = []

    def stop(record: object) -> None:
        seen.append(record)
        if isinstance(record, stage.Extracted) and record.rows >= 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(extract_config(images, broken), stop)
    with pytest.raises(CacheIncomplete, match="of 24"):
        Reader(broken)
    result = extract(extract_config(images, broken))
    assert 0 < result.extracted_rows < 24
    assert np.array_equal(arrays(broken), arrays(whole))


@pytest.mark.parametrize("suffix", ["zarr", "h5"])
def test_kill_9_then_the_same_command(images: Path, tmp_path: Path, suffix: str) -> None:
    """The command line, killed as soon as its first shards are on disk, then run again."""
    whole, killed = tmp_path / f"whole.{suffix}", tmp_path / f"killed.{suffix}"
    arguments = ["extract", str(images), "--model", "test_vit", "--no-pretrained", "--no-amp"]
    arguments += ["--img-size", "32", "-j", "0", "-b", "5", "--dtype", "float32", "--device", "cpu"]
    script = (
        "import time, cache.manifest, cli, pipeline.features.filling as stage\n"
        "cache.manifest.SHARD_BYTES, real = 1, stage._write\n"
        "stage._write = lambda *a: (time.sleep(0.4), real(*a))[1]\n"
        "cli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments, "--out", str(killed)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if _rows_done(killed) >= 5:
            break
        time.sleep(0.02)
    assert process.poll() is None, "the process ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = _rows_done(killed)
    assert 5 <= done < 24
    extract(extract_config(images, whole))
    result = extract(extract_config(images, killed))
    assert result.extracted_rows == 24 - done
    assert np.array_equal(arrays(killed), arrays(whole))
    assert verify(killed).ok


def _rows_done(path: Path) -> int:
    if not path.exists():
        return 0
    with Reader(path, allow_incomplete=True) as reader:
        return reader.rows_done


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model": "test_vit2"}, "backbone.name"),
        ({"seed": 1}, "backbone.weights_sha256"),
        ({"img_size": (48, 48)}, "preprocessing.img_size"),
        ({"crop_pct": 0.5}, "preprocessing.crop_pct"),
        ({"taps": "last:2"}, "taps"),
        ({"dtype": "float16"}, "dtype"),
        ({"amp": True}, "precision"),
    ],
)
def test_another_identity_is_refused(
    cache: Path, images: Path, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(IdentityMismatch, match=field.replace(".", r"\.")) as caught:
        extract(dataclasses.replace(extract_config(images, cache), **changes))
    assert field in [name for name, _, _ in caught.value.differences]
    assert "--overwrite" in str(caught.value)


def test_other_inputs_are_refused_and_counted(cache: Path, images: Path) -> None:
    config = dataclasses.replace(extract_config(images, cache), split=("train",))
    with pytest.raises(IdentityMismatch, match=r"(?s)12 vanished.*--update.*--overwrite") as caught:
        extract(config)
    assert caught.value.differences == [("inputs.vanished", 12, 0)]


def test_a_changed_image_is_refused_and_named(tmp_path: Path) -> None:
    images = paint(tmp_path / "images", train=1, val=1, test=1)
    out = tmp_path / "c.zarr"
    extract(extract_config(images, out))
    before = arrays(out)
    Image.new("RGB", (32, 32), "white").save(images / "val" / "green" / "0.png")
    with pytest.raises(IdentityMismatch, match=r"1 changed: val/green/0\.png"):
        extract(extract_config(images, out))
    assert np.array_equal(arrays(out), before)
    assert extract(extract_config(images, out, overwrite=True)).extracted_rows == 9
    assert not np.array_equal(arrays(out), before)


def test_an_unreadable_image_raises_or_is_left_out(tmp_path: Path) -> None:
    images = paint(tmp_path / "images", train=2, val=1, test=1)
    bad = images / "train" / "red" / "1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    (images / "test" / "blue" / "0.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"red/1\.png: truncated.*--on-error skip"):
        extract(extract_config(images, tmp_path / "a.zarr"))
    skipped: list[Skipped] = []

    def note(record: object) -> None:
        if isinstance(record, Skipped):
            skipped.append(record)

    result = extract(extract_config(images, tmp_path / "b.zarr", on_error="skip"), note)
    assert sorted(result.skipped) == ["test/blue/0.png", "train/red/1.png"]
    assert sorted(record.key for record in skipped) == sorted(result.skipped)
    with Reader(tmp_path / "b.zarr") as reader:
        assert len(reader.split_rows("train")) == 5
        assert not reader.read([reader.keys.index("train/red/1.png")]).any()


def test_a_value_that_does_not_fit_names_tap_and_image(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TimmBackbone.read_taps

    def huge(self: Any, batch: torch.Tensor, sink: Any, **keywords: Any) -> None:
        def scaled(tap: str, tokens: torch.Tensor) -> None:
            tokens = tokens.clone()
            if tap == "z3" and len(tokens) > 2:
                tokens[2, 1, 5] = 1e6
            sink(tap, tokens)

        real(self, batch, scaled, **keywords)

    monkeypatch.setattr(TimmBackbone, "read_taps", huge)
    with pytest.raises(StorageOverflow, match=r"tap z3 of .*blue/2\.png.*float16.*bfloat16"):
        extract(extract_config(images, tmp_path / "c.zarr", dtype="float16"))
    extract(extract_config(images, tmp_path / "d.zarr", dtype="bfloat16"))


def test_images_in_several_splits_are_told(tmp_path: Path) -> None:
    """By their bytes, whatever they are called; when the cache is complete as well."""
    images = paint(tmp_path / "images")
    shutil.copy(images / "train" / "blue" / "0.png", images / "test" / "blue" / "1.png")
    shutil.copy(images / "train" / "blue" / "0.png", images / "test" / "red" / "twin.png")
    shutil.copy(images / "train" / "red" / "2.png", images / "val" / "red" / "1.png")
    shutil.copy(images / "val" / "red" / "1.png", images / "val" / "red" / "again.png")
    shutil.copy(images / "val" / "red" / "1.png", images / "test" / "red" / "1.png")
    for name in ("train/blue/1.png", "test/blue/0.png"):
        (images / name).write_bytes(b"")
    config = extract_config(images, tmp_path / "c.zarr", on_error="skip")
    for _ in range(2):
        records: list[object] = []
        extract(config, records.append)
        assert [r for r in records if isinstance(r, stage.Repeated)] == [
            stage.Repeated(
                split=split, other=other, rows=rows, example=(f"{split}/{key}", f"{other}/{twin}")
            )
            for split, other, rows, key, twin in (
                ("val", "train", 2, "red/1.png", "red/2.png"),
                ("test", "train", 3, "blue/1.png", "blue/0.png"),
                ("test", "val", 1, "red/1.png", "red/1.png"),
            )
        ]
    arguments = ["extract", str(images), "--model", "test_vit", "--no-pretrained", "-j", "0"]
    arguments += ["--img-size", "32", "--on-error", "skip", "--out", str(tmp_path / "d.zarr")]
    lines = CliRunner().invoke(cli.main, arguments).stderr.splitlines()
    assert "3 test images are also in train (e.g. test/blue/1.png = train/blue/0.png)" in lines
    assert "1 test image is also in val (e.g. test/red/1.png = val/red/1.png)" in lines


@pytest.mark.parametrize("size", [5, 4])
def test_a_resume_with_another_batch_size_is_told(
    images: Path, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, where rows are there already; the identity does not know it."""
    monkeypatch.setattr("cache.manifest.SHARD_BYTES", 1)
    out = tmp_path / "c.zarr"

    def stop(record: object) -> None:
        if isinstance(record, stage.Extracted) and record.rows >= 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(extract_config(images, out), stop)
    arguments = ["extract", str(images), "--model", "test_vit", "--no-pretrained", "-j", "0"]
    arguments += ["--img-size", "32", "--no-amp", "--device", "cpu", "--dtype", "float32"]
    arguments += ["-b", str(size), "--out", str(out)]
    for told in (size != 5, False):  # a complete cache has nothing to tell
        result = CliRunner().invoke(cli.main, arguments)
        assert result.exit_code == 0, result.output
        assert (f"begun with -b 5: with -b {size}, the rest" in result.stderr) == told
    with Reader(out) as reader:
        assert reader.manifest.notes["batch_size"] == 5


def ladder(path: Path) -> dict[str, np.ndarray]:
    with Reader(path) as reader:
        return reader.tables_below("ladder")


@pytest.mark.parametrize("how", ["magnitude", "fisher"])
def test_pruned_weights_are_kept_and_not_computed_again(
    images: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are part of the cache's identity; a continued extraction takes those that are there."""
    out = tmp_path / "c.zarr"
    config = extract_config(images, out, ladder_init=how, reduction=4, fisher_samples=5)
    records: list[object] = []
    extract(config, records.append)
    weighed = [record for record in records if isinstance(record, stage.Weighed)]
    assert [(w.done, w.total) for w in weighed] == (
        [(i, 5) for i in range(1, 6)] if how == "fisher" else []
    )
    tables = ladder(out)
    assert {name.partition("/")[0] for name in tables} >= {"block0", "block5"}
    monkeypatch.setattr(stage, "ladder_tables", None)
    assert extract(config).extracted_rows == 0
    monkeypatch.undo()
    extract(extract_config(images, tmp_path / "d.zarr", ladder_init=how, reduction=4,
                           fisher_samples=5))  # fmt: skip
    assert all(np.array_equal(tables[name], other) for name, other in
               ladder(tmp_path / "d.zarr").items())  # fmt: skip
    for change in ({"reduction": 2}, {"ladder_init": None}):
        with pytest.raises(IdentityMismatch, match="ladder"):
            extract(dataclasses.replace(config, **change))  # type: ignore[arg-type]


def test_fisher_skips_what_the_extraction_skips(tmp_path: Path) -> None:
    """The next image drawn takes its place, so that the weights are those of the rest alone."""
    images = paint(tmp_path / "images")
    pruned = {"ladder_init": "fisher", "reduction": 4, "fisher_samples": 50}
    for name in ("red/1.png", "blue/0.png"):
        (images / "train" / name).write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"\.png: not an image.*--on-error skip"):
        extract(extract_config(images, tmp_path / "a.zarr", **pruned))
    records: list[object] = []
    skip = {**pruned, "on_error": "skip"}
    result = extract(extract_config(images, tmp_path / "a.zarr", **skip), records.append)
    assert sorted(result.skipped) == ["train/blue/0.png", "train/red/1.png"]
    weighed = [record for record in records if isinstance(record, stage.Weighed)]
    assert weighed[-1] == stage.Weighed(done=10, total=10, skipped=2)  # of 12 training rows
    extract(extract_config(images, tmp_path / "b.zarr", **{**skip, "fisher_samples": 10}))
    assert all(np.array_equal(ladder(tmp_path / "a.zarr")[name], table)
               for name, table in ladder(tmp_path / "b.zarr").items())  # fmt: skip
    for path in (images / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(SettingError, match=r"--ladder-init: .*came none of 12 \(.*\.png: not an"):
        extract(extract_config(images, tmp_path / "c.zarr", **skip))


def test_fisher_takes_the_first_target_of_kind_class(images: Path, tmp_path: Path) -> None:
    """Whatever stands before it; rows without a class are left out."""
    pruned = {"ladder_init": "fisher", "reduction": 4, "fisher_samples": 50}
    table = several(images, tmp_path / "list.csv")
    records: list[object] = []
    extract(extract_config(table, tmp_path / "a.zarr", **pruned), records.append)
    weighed = [record for record in records if isinstance(record, stage.Weighed)]
    assert weighed[-1] == stage.Weighed(done=11, total=11)  # of 12 training rows
    header, *lines = table.read_text().splitlines()
    table.write_text("\n".join([header.replace("label:colour", "labels:colour"), *lines]))
    with pytest.raises(
        SettingError, match=r"kind class.*there is colour \(multilabel\), age \(reg"
    ):
        extract(extract_config(table, tmp_path / "b.zarr", **pruned))
    magnitude = {**pruned, "ladder_init": "magnitude"}
    assert extract(extract_config(table, tmp_path / "b.zarr", **magnitude)).complete


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduction": 7}, "--ladder-init: reduction = 7: expected a divisor of the width"),
        ({"keep_layers": "0,9"}, "--keep-layers: .* the backbone has layers 0 to 5"),
        ({"model": "test_convnext"}, "--ladder-init: .*expected a plain ViT, came ConvNeXt"),
        ({"ladder_init": "fisher", "split": ("test",)}, "expected labelled images in a split"),
    ],
)
def test_impossible_pruning(
    images: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        extract(
            extract_config(images, tmp_path / "c.zarr", **{"ladder_init": "magnitude", **changes})
        )
    assert not (tmp_path / "c.zarr").exists()
