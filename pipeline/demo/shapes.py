"""Rendered pictures with a known answer: the demo's images, made here instead of downloaded.

A picture holds one shape, filled with one texture, somewhere on a cluttered background. What is
asked of it is the task: which shape and texture ("shape", the task that the demo's backbone was
pretrained on), which way a drop points ("orientation"), or where it lies ("position").
Whatever a task does not ask is drawn at random, so each task is the others' nuisance.

A picture is fixed by (seed, task, split, index) alone: no picture depends on how many others
are drawn, and no two splits share a random stream. This module knows nothing of models, caches
or torch.

Units: pixels, x to the right and y down, as in PIL; angles are compass bearings in degrees, 0 up
and 90 to the right.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import needed_for

with needed_for("the demo", extra="extract"):
    from PIL import Image, ImageDraw

Array = NDArray[np.float32]
Outline = list[tuple[float, float]]

SIDE = 168  # timm resizes to 168 before it crops test_vit's 160: at this size the resize is free
SPLITS = ("train", "val", "test")
TEXTURES = ("plain", "stripes", "dots")
ORIENTATIONS = 8
GRID = 3  # cells a side of the position task

_OVERSAMPLING = 3  # mask pixels per picture pixel and axis
_BIN_FILL = 0.7  # labels' bins and cells are drawn from their middle 70 %: no ties at the borders


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What is in a picture; `seed` draws what no task asks for: colours, background, clutter."""

    shape: str
    texture: str
    centre: tuple[float, float]
    radius: float  # of the circle around the shape
    angle: float
    seed: int

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}; got {self.shape!r}")
        if self.texture not in TEXTURES:
            raise ValueError(f"texture must be one of {', '.join(TEXTURES)}; got {self.texture!r}")
        if self.radius <= 0:
            raise ValueError(f"radius must be positive; got {self.radius}")


# --- shapes: outlines in the unit circle, x right, y UP, pointing up ------------------


def _arc(start: float, stop: float, *, radius: float = 1.0, y: float = 0.0) -> Outline:
    angles = np.radians(np.linspace(start, stop, 33))
    return [(radius * float(np.sin(a)), y + radius * float(np.cos(a))) for a in angles]


def _star(points: int, inner: float) -> Outline:
    turns = np.arange(2 * points) * np.pi / points
    radii = np.where(np.arange(2 * points) % 2, inner, 1.0)
    return [(float(r * np.sin(a)), float(r * np.cos(a))) for r, a in zip(radii, turns, strict=True)]


def _heart() -> Outline:
    t = np.linspace(0, 2 * np.pi, 49)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [(float(u) / 17, float(-v - 2.5) / 17) for u, v in zip(x, y, strict=True)]


# A shape is its outlines, filled in turn with True (shape) or False (hole).
SHAPES: dict[str, list[tuple[Outline, bool]]] = {
    "circle": [(_arc(0, 360, radius=0.85), True)],
    "ring": [(_arc(0, 360, radius=0.95), True), (_arc(0, 360, radius=0.5), False)],
    "square": [([(-0.7, -0.7), (-0.7, 0.7), (0.7, 0.7), (0.7, -0.7)], True)],
    "star": [(_star(5, 0.42), True)],
    "cross": [
        ([(-0.3, -0.95), (0.3, -0.95), (0.3, 0.95), (-0.3, 0.95)], True),
        ([(-0.95, -0.3), (-0.95, 0.3), (0.95, 0.3), (0.95, -0.3)], True),
    ],
    "arrow": [
        ([(0, 1), (0.8, 0.1), (-0.8, 0.1)], True),
        ([(-0.27, 0.1), (0.27, 0.1), (0.27, -0.95), (-0.27, -0.95)], True),
    ],
    "drop": [
        (_arc(0, 360, radius=0.6, y=-0.4), True),
        ([(0, 1), (0.54, -0.14), (-0.54, -0.14)], True),
    ],
    "heart": [(_heart(), True)],
    "crescent": [(_arc(0, 360, radius=0.95), True), (_arc(0, 360, radius=0.75, y=-0.45), False)],
    "tee": [
        ([(-0.85, 0.9), (0.85, 0.9), (0.85, 0.4), (-0.85, 0.4)], True),
        ([(-0.27, 0.4), (0.27, 0.4), (0.27, -0.95), (-0.27, -0.95)], True),
    ],
}
POINTER = "drop"  # the shape whose tip the orientation task asks for


def mask(picture: Picture) -> Array:
    """Coverage of each pixel by the shape, in [0, 1], (SIDE, SIDE)."""
    size = SIDE * _OVERSAMPLING
    canvas = Image.new("L", (size, size))
    pen = ImageDraw.Draw(canvas)
    a = np.radians(picture.angle)
    # clockwise turn, then y up -> y down
    turn = np.array([[np.cos(a), np.sin(a)], [np.sin(a), -np.cos(a)]])
    for outline, filled in SHAPES[picture.shape]:
        points = np.array(picture.centre) + picture.radius * np.array(outline) @ turn.T
        pen.polygon([*map(float, (points * _OVERSAMPLING).ravel())], fill=255 if filled else 0)
    return np.asarray(canvas.reduce(_OVERSAMPLING), dtype=np.float32) / np.float32(255)


# --- appearance -----------------------------------------------------------------------

_Y, _X = np.mgrid[:SIDE, :SIDE].astype(np.float32)


def _colours(rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Background (dark) and the two colours of a texture (light), all of them visibly apart."""
    while True:
        background = rng.uniform(10, 110, 3).astype(np.float32)
        first = rng.uniform(130, 245, 3).astype(np.float32)
        second = rng.uniform(70, 200, 3).astype(np.float32)
        pairs = ((background, first), (background, second), (first, second))
        if min(float(np.abs(a - b).mean()) for a, b in pairs) > 45:
            return background, first, second


def _background(rng: np.random.Generator, colour: Array) -> Image.Image:
    """A gradient with smooth noise, and small lines and spots strewn over it."""
    coarse = (
        rng.normal(0, 14, (8, 8, 3)) + rng.normal(0, 1, 3) * np.linspace(-24, 24, 8)[:, None, None]
    )
    if rng.random() < 0.5:
        coarse = coarse.transpose(1, 0, 2)
    tiny = Image.fromarray(np.clip(colour + coarse, 0, 255).astype(np.uint8))
    image = tiny.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(4, 12)):
        x, y = rng.uniform(0, SIDE, 2)
        dx, dy = rng.uniform(-14, 14, 2)
        ink = tuple(int(v) for v in rng.integers(10, 200, 3))
        if rng.random() < 0.5:
            pen.line((x, y, x + dx, y + dy), fill=ink, width=int(rng.integers(2, 5)))
        else:
            r = float(rng.uniform(2, 6))
            pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)
    return image


def _texture(name: str, rng: np.random.Generator) -> Array:
    """Share of the second colour at each pixel, in [0, 1]; turned independently of the shape."""
    period, angle, phase = rng.uniform(8, 13), rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi, 2)
    k = 2 * np.pi / period
    u = np.sin(k * (np.cos(angle) * _X + np.sin(angle) * _Y) + phase[0], dtype=np.float32)
    v = np.sin(k * (np.cos(angle) * _Y - np.sin(angle) * _X) + phase[1], dtype=np.float32)
    pattern = {"plain": -np.ones_like(u), "stripes": u, "dots": u + v - 0.7}
    return np.clip(0.5 + 2 * pattern[name], 0, 1)


def render(picture: Picture) -> Image.Image:
    """The picture as an RGB image of SIDE x SIDE; the same picture gives the same bytes."""
    rng = np.random.default_rng(picture.seed)
    background, first, second = _colours(rng)
    ground = np.asarray(_background(rng, background), dtype=np.float32)
    share = _texture(picture.texture, rng)[..., None]
    cover = mask(picture)[..., None]
    filled = first + share * (second - first)
    return Image.fromarray((ground + cover * (filled - ground) + 0.5).astype(np.uint8))


# --- tasks ----------------------------------------------------------------------------


def _draw_shape(rng: np.random.Generator, label: int) -> Picture:
    shape, texture = divmod(label, len(TEXTURES))
    return _anywhere(rng, shape=tuple(SHAPES)[shape], texture=TEXTURES[texture])


def _draw_orientation(rng: np.random.Generator, label: int) -> Picture:
    offset = rng.uniform(-0.5, 0.5) * _BIN_FILL
    return _anywhere(rng, shape=POINTER, angle=(label + offset) * 360 / ORIENTATIONS)


def _draw_position(rng: np.random.Generator, label: int) -> Picture:
    row, column = divmod(label, GRID)
    x, y = (np.array([column, row]) + 0.5 + rng.uniform(-0.5, 0.5, 2) * _BIN_FILL) / GRID
    return _anywhere(rng, centre=(_place(x, margin=30), _place(y, margin=30)))


def _place(fraction: float, *, margin: int = 40) -> float:
    """Centres keep a margin from the picture's edge, so that most of every shape is inside."""
    return float(margin + fraction * (SIDE - 2 * margin))


def _anywhere(rng: np.random.Generator, **asked: object) -> Picture:
    """A picture with what the task asks for, and the rest drawn at random."""
    drawn: dict[str, object] = {
        "shape": str(rng.choice(tuple(SHAPES))),
        "texture": str(rng.choice(TEXTURES)),
        "centre": (_place(rng.random()), _place(rng.random())),
        "radius": float(rng.uniform(30, 48)),
        "angle": float(rng.uniform(0, 360)),
        "seed": int(rng.integers(2**32)),
    }
    return Picture(**{**drawn, **asked})  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Class names in label order, and how a picture of one label is drawn."""

    classes: tuple[str, ...]
    draw: Callable[[np.random.Generator, int], Picture]


TASKS = {
    "shape": Task(
        classes=tuple(f"{shape}-{texture}" for shape in SHAPES for texture in TEXTURES),
        draw=_draw_shape,
    ),
    "orientation": Task(
        classes=tuple(f"{k * 360 // ORIENTATIONS:03d}" for k in range(ORIENTATIONS)),
        draw=_draw_orientation,
    ),
    "position": Task(
        classes=tuple(f"row{r}-column{c}" for r in range(GRID) for c in range(GRID)),
        draw=_draw_position,
    ),
}


def pictures(task: str, *, seed: int, split: str, count: int) -> Iterator[tuple[int, Picture]]:
    """Label and picture, `count` of them; labels go round, so classes differ by one at most."""
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {task!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    classes, stream = len(TASKS[task].classes), (tuple(TASKS).index(task), SPLITS.index(split))
    for index in range(count):
        label = index % classes
        yield label, TASKS[task].draw(np.random.default_rng([seed, *stream, index]), label)


def write_task(
    folder: Path, task: str, *, seed: int, train: int, val: int, test: int
) -> dict[str, int]:
    """Write `{train,val,test}/CLASS/NNNNN.png` below `folder`; the pictures written per split.

    Files of the same name are overwritten, others are left alone.
    """
    counts = {"train": train, "val": val, "test": test}
    for split, count in counts.items():
        for index, (label, picture) in enumerate(
            pictures(task, seed=seed, split=split, count=count)
        ):
            place = Path(folder) / split / TASKS[task].classes[label]
            place.mkdir(parents=True, exist_ok=True)
            render(picture).save(place / f"{index:05d}.png", compress_level=1)
    return counts
