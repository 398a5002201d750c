"""What is asked of a cache changes without a forward pass; new and changed inputs alone are
computed; damaged rows alone are computed again. Both formats."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import extract_config, paint, train_config
from PIL import Image

from cache import IdentityMismatch, LabellingMismatch, Reader, inspect, verify
from pipeline.backbones.timm_models import TimmBackbone
from pipeline.config import LabelConfig, VerifyConfig
from pipeline.errors import SettingError, SourceError
from pipeline.extract import extract
from pipeline.features.job import Updating
from pipeline.label import label
from pipeline.repair import repair
from pipeline.train import train


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images went through the backbone, call by call."""
    seen: list[int] = []
    real = TimmBackbone.read_taps

    def counting(self: TimmBackbone, images: Any, *arguments: Any, **named: Any) -> Any:
        seen.append(len(images))
        return real(self, images, *arguments, **named)

    monkeypatch.setattr(TimmBackbone, "read_taps", counting)
    return seen


@pytest.fixture(params=["zarr", "h5"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"features.{request.param}"


def photographs(folder: Path, count: int, seed: int = 0) -> list[Path]:
    random = np.random.default_rng(seed)
    paths = []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        paths.append(folder / f"{seed}-{number:03d}.png")
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def write_list(path: Path, rows: Sequence[Sequence[Any]], *header: str) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header or ("path", "label", "split"), *rows])
    return path


def by_key(location: Path) -> dict[str, np.ndarray]:
    with Reader(location) as reader:
        return dict(zip(reader.keys, reader.read(range(reader.rows)), strict=True))


# ---- the same inputs, asked other things ---------------------------------------------------------

Row = list[Any]
CASES: dict[str, tuple[Callable[[list[Row]], list[Row]], tuple[str, ...]]] = {
    "one label corrected": (
        lambda rows: [[rows[0][0], "blue", rows[0][2]], *rows[1:]],
        ("path", "label", "split"),
    ),
    "two images in another split": (
        lambda rows: [[p, c, "val" if n < 2 else s] for n, (p, c, s) in enumerate(rows)],
        ("path", "label", "split"),
    ),
    "a second task": (
        lambda rows: [[p, c, n % 5, s] for n, (p, c, s) in enumerate(rows)],
        ("path", "label:label", "value:age", "split"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_other_labels_need_no_forward(
    case: str, out: Path, tmp_path: Path, forwards: list[int]
) -> None:
    rows = [
        [path.name, ("red", "blue")[n % 2], ("train", "train", "val")[n % 3]]
        for n, path in enumerate(photographs(tmp_path, 6))
    ]
    listed = write_list(tmp_path / "list.csv", rows)
    before = extract(extract_config(listed, out))
    forwards.clear()
    change, header = CASES[case]
    write_list(listed, change(rows), *header)
    with pytest.raises(LabellingMismatch, match=r"sidecache label .*features\..*list.csv"):
        extract(extract_config(listed, out))
    changed = label(LabelConfig(cache=str(out), source=str(listed)))
    again = extract(extract_config(listed, out))
    fresh = tmp_path / "fresh.zarr"
    assert (changed.changed, again.extracted_rows, forwards) == (True, 0, [])
    new = extract(extract_config(listed, fresh))
    assert (again.content, again.fingerprint) == (before.content, before.fingerprint)
    assert again.labelling == new.labelling != before.labelling
    assert verify(out).ok


def test_a_copy_of_an_image_needs_no_forward(
    out: Path, tmp_path: Path, forwards: list[int]
) -> None:
    first, *others = photographs(tmp_path, 4)
    rows = [[path.name, "red", "train"] for path in (first, *others)]
    listed = write_list(tmp_path / "list.csv", rows)
    extract(extract_config(listed, out))
    forwards.clear()
    shutil.copy(first, tmp_path / "twin.png")
    write_list(listed, [*rows, ["twin.png", "blue", "val"]])
    result = extract(extract_config(listed, out, update=True))
    assert (result.rows, result.extracted_rows, forwards) == (5, 0, [])
    features = by_key(out)
    np.testing.assert_array_equal(features["twin.png"], features[first.name])
    with Reader(out) as reader:
        np.testing.assert_array_equal(reader.labels(), [1, 1, 1, 1, 0])
        np.testing.assert_array_equal(reader.split_rows("val"), [4])


def test_the_shown_list_is_read_again(tasks_cache: Path, tmp_path: Path) -> None:
    from pipeline.labelling.questions import columns

    place = tmp_path / "mine.zarr"
    shutil.copytree(tasks_cache, place)
    with Reader(place) as reader:
        titles = columns(reader)
        before = reader.labelling_digest
    listed = write_list(tmp_path / "shown.csv", [], *titles)
    with listed.open("a", newline="") as file:
        csv.writer(file).writerows(zip(*titles.values(), strict=True))
    assert not label(LabelConfig(cache=str(place), source=str(listed))).changed
    with Reader(place) as reader:
        assert reader.labelling_digest == before


def test_added_targets_stand_beside_those_there(
    zarr_cache: Path, tmp_path: Path, forwards: list[int]
) -> None:
    place = tmp_path / "mine.zarr"
    shutil.copytree(zarr_cache, place)
    with Reader(place) as reader:
        keys = reader.keys
    listed = write_list(tmp_path / "ages.csv", [[k, n] for n, k in enumerate(keys[:5])],
                        "key", "value:age")  # fmt: skip
    result = label(LabelConfig(cache=str(place), source=str(listed), add=True))
    assert (result.targets, result.unlisted, forwards) == (["label", "age"], len(keys) - 5, [])
    with Reader(place) as reader:
        ages = reader.labels("age")
        np.testing.assert_array_equal(ages[:5], range(5))
        assert np.isnan(ages[5:]).all()
        assert reader.labelling.splits == ("train", "val", "test")  # the list does not say: stay
    with pytest.raises(SettingError, match=r"target age is there already.*--add"):
        label(LabelConfig(cache=str(place), source=str(listed), add=True))
    strangers = write_list(tmp_path / "other.csv", [["nobody.png", 1]], "key", "value:age")
    with pytest.raises(SourceError, match=r"1 of 1 rows are not in .*nobody.png.*--show"):
        label(LabelConfig(cache=str(place), source=str(strangers)))


# ---- folds ---------------------------------------------------------------------------------------


def test_folds_are_level_and_repeatable(zarr_cache: Path, tmp_path: Path) -> None:
    place = tmp_path / "mine.zarr"
    shutil.copytree(zarr_cache, place)
    result = label(LabelConfig(cache=str(place), folds=3, stratify=True))
    with Reader(place) as reader:
        folds, labels, split = reader.folds, reader.labels(), reader.split
        assert result.folds == [6, 6, 6]
        assert (folds[split == reader.labelling.splits.index("test")] == -1).all()
        for fold in range(3):
            np.testing.assert_array_equal(np.bincount(labels[folds == fold]), [2, 2, 2])
    assert not label(LabelConfig(cache=str(place), folds=3, stratify=True)).changed
    assert label(LabelConfig(cache=str(place), folds=3, stratify=True, seed=1)).changed


def test_folds_keep_groups_together(zarr_cache: Path, tmp_path: Path) -> None:
    place = tmp_path / "mine.zarr"
    shutil.copytree(zarr_cache, place)
    with Reader(place) as reader:
        keys = reader.keys
    rows = [[key, f"patient {number // 5}"] for number, key in enumerate(keys)]
    listed = write_list(tmp_path / "patients.csv", rows, "key", "Patient ID")
    result = label(LabelConfig(cache=str(place), source=str(listed), group="Patient ID", folds=2))
    assert result.groups == ["patient_id"]
    with Reader(place) as reader:
        groups, folds = np.array(reader.groups("patient_id")), reader.folds
        inside = folds >= 0
        for group in set(groups.tolist()):
            assert len(set(folds[inside & (groups == group)].tolist())) <= 1
    with pytest.raises(SettingError, match=r"--folds 40: expected as many groups"):
        label(LabelConfig(cache=str(place), group="Patient ID", folds=40))
    with pytest.raises(SettingError, match=r"--group site: the cache has patient_id"):
        label(LabelConfig(cache=str(place), group="site", folds=2))


# ---- other inputs --------------------------------------------------------------------------------


def test_an_update_computes_what_is_new_or_changed(
    out: Path, tmp_path: Path, forwards: list[int]
) -> None:
    """10 of 200 new, 3 changed, 5 gone: 13 forwards, and the result is that of a fresh one."""
    folder = tmp_path / "images" / "train" / "things"
    old = photographs(folder, 200)
    extract(extract_config(tmp_path / "images", out, batch_size=16))
    forwards.clear()
    for path in old[7:12]:
        path.unlink()
    for path in old[100:103]:
        Image.open(path).rotate(90).save(path)
    photographs(folder, 10, seed=1)
    with pytest.raises(IdentityMismatch, match=r"(?s)10 new.*3 changed.*5 vanished.*--update"):
        extract(extract_config(tmp_path / "images", out, batch_size=16))
    told: list[Any] = []
    config = extract_config(tmp_path / "images", out, batch_size=16, update=True)
    result = extract(config, told.append)
    assert (result.rows, result.extracted_rows, sum(forwards)) == (205, 13, 13)
    assert [r for r in told if isinstance(r, Updating)] == [Updating(new=10, changed=3, vanished=5)]
    fresh = tmp_path / "fresh.zarr"
    new = extract(extract_config(tmp_path / "images", fresh, batch_size=16))
    assert (result.fingerprint, result.labelling) == (new.fingerprint, new.labelling)
    mine, theirs = by_key(out), by_key(fresh)
    assert list(mine) == list(theirs)
    for key, values in theirs.items():  # of another batch: the last bits may differ
        np.testing.assert_allclose(mine[key], values, rtol=1e-4, atol=1e-5)
    assert verify(out).ok
    assert (inspect(out).slots, inspect(out).rows) == (213, 205)
    forwards.clear()
    assert extract(config).extracted_rows == 0
    assert forwards == []


def test_a_repaired_image_does_not_condemn_a_cache(
    out: Path, tmp_path: Path, forwards: list[int]
) -> None:
    paths = photographs(tmp_path / "images", 6)
    good = paths[3].read_bytes()
    paths[3].write_bytes(good[:60])
    rows = [[f"images/{path.name}", "red", "train"] for path in paths]
    listed = write_list(tmp_path / "list.csv", rows)
    result = extract(extract_config(listed, out, on_error="skip"))
    assert list(result.skipped) == [f"images/{paths[3].name}"]
    paths[3].write_bytes(good)
    forwards.clear()
    result = extract(extract_config(listed, out, update=True))
    assert (result.extracted_rows, sum(forwards), result.skipped) == (1, 1, {})
    with Reader(out) as reader:
        assert (reader.rows, len(reader.split_rows("train"))) == (6, 6)


def test_labels_given_by_hand_survive_an_update(out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    paint(folder, train=2, val=1, test=0)
    extract(extract_config(folder, out))
    with Reader(out) as reader:
        mine = write_list(tmp_path / "mine.csv", [[k, "odd"] for k in reader.keys], "key", "label")
    label(LabelConfig(cache=str(out), source=str(mine)))
    photographs(folder / "train" / "red", 1, seed=3)
    extract(extract_config(folder, out, update=True))
    with Reader(out) as reader:
        target = reader.target()
        names = [target.classes[index] for index in reader.labels()]
        told = dict(zip(reader.keys, names, strict=True))
        assert told.pop("train/red/3-000.png") == "red"
        assert set(told.values()) == {"odd"}
    assert extract(extract_config(folder, out)).extracted_rows == 0


def test_killed_at_any_step_an_update_goes_on(tmp_path: Path) -> None:
    """The kill -9 of every third change of the disk; then the same command to its end."""
    script = Path(__file__).with_name("kill_an_update.py")
    root = Path(__file__).parents[2]
    for suffix in ("zarr", "h5"):
        done = subprocess.run(
            [sys.executable, str(script), suffix, str(tmp_path)],
            cwd=root, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert int(done.stdout.split()[-1]) > 10


# ---- repair --------------------------------------------------------------------------------------


@pytest.fixture
def damaged(out: Path, images: Path, forwards: list[int]) -> Iterator[Callable[[int], None]]:
    """A cache of the images, and what flips a byte of a row of it."""
    extract(extract_config(images, out))
    forwards.clear()

    def flip(row: int) -> None:
        with Reader(out) as reader:
            shard = int(reader.manifest.shards_of(reader.slots[[row]])[0])
            there = reader.container.slots("tokens", shard)
            first = reader.manifest.shard_slots(shard).start
            offset = int(there.offsets[int(reader.slots[row]) - first, 0]) + 5
        with Path(reader.container.store.where(there.name)).open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 0x40]))

    return flip


def repair_config(out: Path, images: Path) -> VerifyConfig:
    return VerifyConfig(cache=str(out), repair=str(images), pretrained=False, device="cpu")


def test_a_flipped_byte_costs_one_row(
    damaged: Callable[[int], None], out: Path, images: Path, forwards: list[int]
) -> None:
    before = by_key(out)
    damaged(7)
    assert not verify(out).ok
    result = repair(repair_config(out, images))
    assert (result.rows, result.differing, result.left) == (1, [], [])
    assert len(forwards) == 1
    assert verify(out).ok
    after = by_key(out)
    assert all(np.array_equal(after[key], before[key]) for key in before)
    assert repair(repair_config(out, images)).rows == 0


def test_what_is_missing_for_a_repair_is_named(
    damaged: Callable[[int], None], out: Path, tmp_path: Path
) -> None:
    damaged(0)
    other = paint(tmp_path / "other", train=5)
    for path in other.rglob("*.png"):
        Image.open(path).rotate(90).save(path)
    with pytest.raises(SourceError, match=r"1 of 1 damaged rows' images are not there"):
        repair(repair_config(out, other))


def test_a_lost_shard_is_extracted_again(images: Path, tmp_path: Path, forwards: list[int]) -> None:
    out = tmp_path / "features.zarr"
    extract(extract_config(images, out))
    before = by_key(out)
    shard = next((out / "stacks" / "tokens" / "c").rglob("0/0/0/0/0"))
    shard.write_bytes(shard.read_bytes()[:-9])
    result = repair(repair_config(out, images))
    assert (result.rows, result.left) == (len(before), [])
    after = by_key(out)
    assert verify(out).ok
    assert all(np.array_equal(after[key], before[key]) for key in before)


# ---- runs know what they learned from ------------------------------------------------------------


def test_a_run_notes_both_digests(zarr_cache: Path, tmp_path: Path) -> None:
    from pipeline.runs.run import Run

    train(train_config(zarr_cache, tmp_path / "run"))
    noted = Run(tmp_path / "run").environment()
    with Reader(zarr_cache) as reader:
        assert noted["fingerprint"] == reader.fingerprint
        assert noted["labelling"] == reader.labelling_digest
