"""The labelling: round trips, what its tables must hold, what its digest covers, refusals."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache import IGNORED, CacheDamaged, Labelling, Target, encode_keys
from cache.documents import canonical_json

NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,6}", fullmatch=True)
NOTES = st.dictionaries(st.text(), st.none() | st.text() | st.lists(st.integers()), max_size=3)
CLASSES = {"class": (0, 4), "multilabel": (1, 4), "regression": (0, 0), "segmentation": (0, 4)}
ROWS = 6


def lists(elements: st.SearchStrategy[Any], least: int = 0, most: int = 3) -> Any:
    return st.lists(elements, min_size=least, max_size=most, unique=True).map(tuple)


@st.composite
def targets(draw: st.DrawFn, name: str) -> Target:
    kind = draw(st.sampled_from(sorted(CLASSES)))
    classes = draw(lists(st.text(), *CLASSES[kind]))
    shape = draw(st.tuples(*[st.integers(1, 4)] * 2)) if kind == "segmentation" else ()
    return Target(name=name, kind=kind, classes=classes, shape=shape)


@st.composite
def labellings(draw: st.DrawFn, rows: int | None = None) -> Labelling:
    return Labelling(
        rows=rows or draw(st.integers(1, 10**7)),
        targets=tuple(draw(targets(name)) for name in draw(lists(NAMES))),
        splits=draw(lists(st.text())),
        groups=draw(lists(NAMES)),
        folds=draw(st.sampled_from([0, 2, 3, 10])),
        history=draw(lists(st.text(alphabet="0123456789abcdef", max_size=64))),
        notes=draw(NOTES),
    )


def labels_of(target: Target, random: np.random.Generator, rows: int = ROWS) -> np.ndarray:
    """Some of everything that the target may hold; the first row has no label."""
    dtype, shape = target.layout(rows)
    end = len(target.classes)
    match target.kind:
        case "class":
            labels = random.integers(-1, end, shape)
            nothing: float = -1
        case "multilabel":
            labels, nothing = random.integers(0, 2, shape), -1
        case "segmentation":
            labels, nothing = random.integers(0, end + 1, shape), IGNORED
            labels[labels == end] = IGNORED
        case _:
            labels, nothing = random.normal(size=shape), np.nan
    labels = labels.astype(dtype)
    labels[0] = nothing
    return labels


def tables_of(labelling: Labelling, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    rows = labelling.rows
    tables = {f"labels/{t.name}": labels_of(t, random, rows) for t in labelling.targets}
    tables |= {
        f"groups/{group}": encode_keys([f"g{row % 3}" for row in range(rows)])
        for group in labelling.groups
    }
    for name, end in (("split", len(labelling.splits)), ("fold", labelling.folds)):
        if end:
            tables[name] = random.integers(-1, end, rows).astype(np.int16)
    return tables


@given(labellings())
def test_round_trips(labelling):
    again = Labelling.from_dict(json.loads(canonical_json(labelling.to_dict())))
    assert again == labelling
    assert canonical_json(again.to_dict()) == canonical_json(labelling.to_dict())


@given(labellings(rows=ROWS), st.integers(0, 10))
def test_its_own_tables_fit(labelling, seed):
    tables = tables_of(labelling, seed)
    checked = labelling.check(tables, ROWS)
    assert checked.keys() == tables.keys()
    for name, table in checked.items():
        np.testing.assert_array_equal(table, tables[name])
        dtype, shape = labelling.tables.get(name, (table.dtype.name, table.shape))
        assert (table.dtype.name, table.shape) == (dtype, shape)
    assert labelling.check({**tables, "slots": np.arange(ROWS)[::-1] + 2}, ROWS + 2)


@given(labellings(rows=ROWS), labellings(rows=ROWS), st.integers(0, 10), st.integers(0, 10))
def test_the_digest_covers_what_is_asked_of_which_inputs(one, other, seed, other_seed):
    def digest(labelling: Labelling, seed: int, keys: Iterable[str] = "abcdef") -> str:
        return labelling.digest(keys, None, tables_of(labelling, seed))

    described = [{**each.to_dict(), "history": [], "notes": {}} for each in (one, other)]
    tables = [tables_of(one, seed), tables_of(other, other_seed)]
    same = described[0] == described[1] and all(
        tables[0][name].tobytes() == tables[1][name].tobytes() for name in tables[0]
    )
    assert (digest(one, seed) == digest(other, other_seed)) == same
    aside = dataclasses.replace(one, history=("ab",), notes={"why": "not"})
    assert digest(aside, seed) == digest(one, seed)
    assert digest(one, seed, "abcdeg") != digest(one, seed)
    inputs = np.zeros((ROWS, 32), np.uint8)
    assert one.digest("abcdef", inputs, tables[0]) != digest(one, seed)
    assert one.digest("abcdef", inputs + 1, tables[0]) != one.digest("abcdef", inputs, tables[0])


MASKS = Target(name="mask", kind="segmentation", classes=("sky", "sea"), shape=(2, 3))


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("labels/kind", 3, 2, r"'labels/kind': row 3 is 2, expected a class index below 2, or -1"),
        ("labels/kind", 0, -2, "row 0 is -2"),
        ("labels/marks", (2, 1), -1, r"row 2 is \[ 0 -1\], expected 0 or 1 for every class, or -1"),
        ("labels/age", 4, np.inf, "row 4 is inf, expected a finite number, or NaN"),
        (
            "labels/mask",
            (69, 1, 2),
            2,
            r"'labels/mask': row 69 is 2, expected class indices below 2, or 255",
        ),
        ("split", 1, 2, r"'split': row 1 is 2, expected -1 to 1 \(-1: none\)"),
        ("fold", 2, 3, r"'fold': row 2 is 3, expected -1 to 2 \(-1: none\)"),
        ("fold", 2, -2, "'fold': row 2 is -2"),
        ("slots", 5, 70, r"'slots': row 5 is 70, expected 0 to 69$"),
        ("slots", 5, -1, r"'slots': row 5 is -1, expected 0 to 69$"),
    ],
)
def test_a_wrong_value_is_named(name, place, value, message):
    rows = 70  # more than one chunk of masks
    labelling = Labelling(
        rows=rows,
        targets=(
            Target(name="kind", classes=("a", "b")),
            Target(name="marks", kind="multilabel", classes=("x", "y")),
            Target(name="age", kind="regression"),
            MASKS,
        ),
        splits=("train", "val"),
        folds=3,
    )
    tables = {
        **{n: np.zeros(shape, dtype) for n, (dtype, shape) in labelling.tables.items()},
        "slots": np.arange(rows),
    }
    labelling.check(tables, rows)
    tables[name][place] = value
    if name == "labels/mask":
        tables[name][69, 0] = IGNORED
    with pytest.raises(ValueError, match=message):
        labelling.check(tables, rows)


def test_tables_must_be_those_that_it_asks_for():
    labelling = Labelling(rows=3, targets=(Target(name="kind"),), groups=("site",), folds=2)
    none = np.full(3, -1)
    tables = {"labels/kind": none, "groups/site": encode_keys("abc"), "fold": none}
    labelling.check(tables, 3)
    for missing in tables:
        with pytest.raises(ValueError, match=rf"'{missing}'\] are missing"):
            labelling.check({n: t for n, t in tables.items() if n != missing}, 3)
    with pytest.raises(ValueError, match=r"\['split'\]: the labelling does not speak of them"):
        labelling.check({**tables, "split": none}, 3)
    with pytest.raises(ValueError, match="'groups/site': expected a string for each of 3"):
        labelling.check({**tables, "groups/site": encode_keys("ab")}, 3)
    with pytest.raises(ValueError, match=r"'fold': expected int16 \(3,\), received float64 \(3,\)"):
        labelling.check({**tables, "fold": np.zeros(3)}, 3)
    with pytest.raises(ValueError, match="3 rows need as many slots, the cache has 2"):
        labelling.check(tables, 2)
    labelling.check({**tables, "slots": np.array([1, 0, 1])}, 2)  # inputs alike share one


def test_refuses_a_target_of_nonsense():
    known = "class, multilabel, regression, segmentation"
    with pytest.raises(ValueError, match=rf"kind 'box' is unknown, .*{known}"):
        Target(name="label", kind="box", classes=())
    with pytest.raises(ValueError, match=r"'age': a regression has no classes, received 2"):
        Target(name="age", kind="regression", classes=("old", "young"))
    with pytest.raises(ValueError, match=r"'marks': expected one class or more, received none"):
        Target(name="marks", kind="multilabel")
    with pytest.raises(ValueError, match="two classes have the same name"):
        Target(name="marks", kind="multilabel", classes=("tail", "tail"))
    with pytest.raises(ValueError, match=r"target name 'Age': expected lower-case"):
        Target(name="Age", kind="regression")
    for shape in ((), (3,), (0, 3)):
        with pytest.raises(ValueError, match=r"'mask': expected \(height, width\)"):
            Target(name="mask", kind="segmentation", shape=shape)
    with pytest.raises(ValueError, match="'mask': a mask holds at most 255 classes, received 256"):
        Target(name="mask", kind="segmentation", classes=tuple(map(str, range(256))), shape=(1, 1))
    with pytest.raises(ValueError, match=r"'label': expected no shape for kind class"):
        Target(name="label", shape=(2, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "at least one row, received rows=0"),
        ({"splits": ("a", "a")}, "two splits have the same name"),
        ({"splits": tuple(map(str, range(2**15 + 1)))}, "at most 32768 splits, received 32769"),
        ({"targets": (Target(name="a"), Target(name="a"))}, "two targets have the same name: a, a"),
        ({"groups": ("a", "a")}, "two groups have the same name"),
        ({"groups": ("A b",)}, "group name 'A b': expected lower-case"),
        ({"folds": 1}, "no folds or two and more, received 1"),
        ({"folds": -1}, "received -1"),
        ({"notes": {"x": float("nan")}}, "notes must be nested JSON"),
    ],
)
def test_refuses_nonsense(changes, message):
    with pytest.raises(ValueError, match=message):
        Labelling(**{"rows": 3, **changes})


def test_from_dict_refuses_damage():
    document = Labelling(rows=3, targets=(MASKS,)).to_dict()
    for changes in ({"colour": "red"}, {"rows": "many"}, {"targets": [{"kind": "class"}]}):
        with pytest.raises(CacheDamaged, match="the labelling cannot be read"):
            Labelling.from_dict({**document, **changes})
    del document["targets"]
    with pytest.raises(CacheDamaged, match="the labelling cannot be read"):
        Labelling.from_dict(document)
