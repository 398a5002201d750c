"""The demo's pictures are what their labels say and repeat exactly; its weights fit test_vit."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.demo import shapes
from pipeline.demo.shapes import TASKS, Picture, mask, pictures, render, write_task

WEIGHTS = Path(shapes.__file__).with_name("backbone.safetensors")
tasks = pytest.mark.parametrize("task", TASKS)


def picture(**changes: object) -> Picture:
    plain = {
        "shape": "arrow",
        "texture": "plain",
        "centre": (84.0, 84.0),
        "radius": 40.0,
        "angle": 0.0,
        "seed": 7,
    }
    return Picture(**{**plain, **changes})


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*.png"))
    }


@tasks
def test_the_same_seed_writes_the_same_bytes(task, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_task(tmp_path / name, task, seed=seed, train=6, val=2, test=2)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a") != files(tmp_path / "c")


def test_a_picture_does_not_depend_on_how_many_are_drawn():
    few = list(pictures("position", seed=0, split="train", count=5))
    many = list(pictures("position", seed=0, split="train", count=50))
    assert many[:5] == few


@tasks
def test_splits_share_no_picture_and_classes_are_balanced(task):
    classes = len(TASKS[task].classes)
    assert len(set(TASKS[task].classes)) == classes
    drawn = {
        split: list(pictures(task, seed=0, split=split, count=2 * classes + 1))
        for split in shapes.SPLITS
    }
    everything = [picture for split in drawn.values() for _, picture in split]
    assert len(set(everything)) == len(everything)
    for split in drawn.values():
        counts = Counter(label for label, _ in split)
        assert sorted(counts) == list(range(classes))
        assert max(counts.values()) - min(counts.values()) <= 1


@tasks
def test_files_lie_in_their_class_folder(task, tmp_path):
    classes = TASKS[task].classes
    counts = write_task(tmp_path, task, seed=0, train=len(classes), val=2, test=3)
    assert counts == {"train": len(classes), "val": 2, "test": 3}
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == sorted(classes)
    for split, count in counts.items():
        assert len(list((tmp_path / split).glob("*/[0-9]*.png"))) == count
    label, first = next(pictures(task, seed=0, split="val", count=1))
    written = Image.open(tmp_path / "val" / classes[label] / "00000.png")
    assert written.mode == "RGB" and written.size == (shapes.SIDE, shapes.SIDE)
    np.testing.assert_array_equal(np.asarray(written), np.asarray(render(first)))


@pytest.mark.parametrize("shape", shapes.SHAPES)
@pytest.mark.parametrize("angle", [30.0, 90.0, 200.0])
def test_the_angle_turns_the_shape_clockwise(shape, angle):
    upright = Image.fromarray((mask(picture(shape=shape)) * 255).astype(np.uint8))
    turned = upright.rotate(-angle, Image.Resampling.BICUBIC, center=(84, 84))
    difference = np.abs(np.asarray(turned) / 255.0 - mask(picture(shape=shape, angle=angle)))
    area = mask(picture(shape=shape)).sum()
    assert difference.sum() < 0.1 * area


def test_an_arrow_at_90_degrees_points_right():
    """Its head, the part that is widest across, lies right of the centre; its tip at the end."""
    across = mask(picture(angle=90.0)).sum(axis=0)
    assert 84 < across.argmax() < 84 + 20
    assert across[84 + 36 : 84 + 40].sum() > 0


def test_the_pointer_differs_at_every_orientation():
    upright = mask(picture(shape=shapes.POINTER))
    for step in range(1, shapes.ORIENTATIONS):
        turned = mask(picture(shape=shapes.POINTER, angle=step * 360 / shapes.ORIENTATIONS))
        assert np.abs(turned - upright).sum() > 0.25 * upright.sum()


def test_orientation_labels_are_the_drawn_angle():
    for label, drawn in pictures("orientation", seed=0, split="train", count=200):
        assert round(drawn.angle * shapes.ORIENTATIONS / 360) % shapes.ORIENTATIONS == label
        assert drawn.shape == shapes.POINTER
        name = TASKS["orientation"].classes[label]
        assert abs((drawn.angle - int(name) + 180) % 360 - 180) < 180 / shapes.ORIENTATIONS


def test_position_labels_are_the_drawn_cell():
    """Sorting the centres of all rows (columns) recovers the grid: cells do not touch."""
    drawn = list(pictures("position", seed=0, split="train", count=400))
    for axis, part in (
        (1, lambda label: label // shapes.GRID),
        (0, lambda label: label % shapes.GRID),
    ):
        bounds = [
            (min(values), max(values))
            for cell in range(shapes.GRID)
            if (values := [p.centre[axis] for label, p in drawn if part(label) == cell])
        ]
        assert len(bounds) == shapes.GRID
        assert all(low[1] < high[0] for low, high in pairwise(bounds))


def test_the_centre_is_where_the_shape_lies():
    pixels = mask(picture(shape="circle", centre=(60.0, 100.0)))
    y, x = np.mgrid[: shapes.SIDE, : shapes.SIDE] + 0.5
    assert (pixels * x).sum() / pixels.sum() == pytest.approx(60, abs=0.5)
    assert (pixels * y).sum() / pixels.sum() == pytest.approx(100, abs=0.5)


def test_only_the_shape_changes_with_the_angle():
    one, two = picture(), picture(angle=90.0)
    outside = (mask(one) == 0) & (mask(two) == 0)
    np.testing.assert_array_equal(
        np.asarray(render(one))[outside], np.asarray(render(two))[outside]
    )


@pytest.mark.parametrize(
    "changes", [{"shape": "blob"}, {"texture": "fur"}, {"radius": 0.0}], ids=lambda c: next(iter(c))
)
def test_a_picture_refuses_what_it_cannot_draw(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must be .*got"):
        replace(picture(), **changes)


def test_unknown_task_and_split_are_named():
    with pytest.raises(ValueError, match="task must be one of shape, orientation, position"):
        list(pictures("colour", seed=0, split="train", count=1))
    with pytest.raises(ValueError, match="split must be one of train, val, test"):
        list(pictures("shape", seed=0, split="dev", count=1))


def test_pictures_need_no_resizing_for_the_demo_backbone():
    config = timm.data.resolve_model_data_config(timm.create_model("test_vit"))
    assert config["input_size"] == (3, 160, 160)
    assert int(config["input_size"][-1] / config["crop_pct"]) == shapes.SIDE


def test_the_demo_backbone_fits_test_vit_and_says_where_it_comes_from():
    assert WEIGHTS.stat().st_size <= 2_000_000
    with safe_open(WEIGHTS, framework="pt") as file:
        facts = file.metadata()
    assert facts["classes"].split(",") == list(TASKS["shape"].classes)
    for key in ("script", "model", "seed", "steps", "date", "torch", "timm", "val_accuracy"):
        assert facts[key], key
    model = timm.create_model(facts["model"], num_classes=len(TASKS["shape"].classes))
    model.load_state_dict(load_file(WEIGHTS), strict=True)
