"""Names of taps: taken apart in one file, and put together again the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.side.tap import Tap, grammatical, listed, select, tap_depths, tap_names

PIPELINE = Path(__file__).parent.parent.parent / "pipeline"


@given(
    st.integers(0, 99), st.sampled_from(["z", "y", "encoder.z"]),
    st.sampled_from(["plain", "sum", "normed", "pooled"]), st.integers(0, 99),
)  # fmt: skip
def test_a_name_is_read_as_it_was_written(depth: int, series: str, how: str, first: int) -> None:
    tap = Tap(
        depth, series, first=first if how in ("sum", "normed") else None,
        normed=how == "normed", pooled=how == "pooled",
    )  # fmt: skip
    assert Tap.parse(str(tap)) == tap


def test_names() -> None:
    assert str(Tap(3)) == "z3" and str(Tap(3, "encoder.z")) == "encoder.z3"
    assert str(Tap(12, first=0)) == "z0..z12"
    assert str(Tap(4, first=3, normed=True)) == "ln(z3..z4)"
    assert str(Tap(12, pooled=True)) == "pool(z12)"
    assert Tap(4, "y", first=2).parts == ("y2", "y3", "y4") and Tap(4).parts == ("z4",)


@pytest.mark.parametrize(
    "name", ["", "z", "3", "layer3", "z3.", "Z3", "z0..y3", "ln(z3)", "ln(z0..z3", "pool(z0..z3)"]
)  # fmt: skip
def test_other_names_are_no_taps(name: str) -> None:
    assert Tap.parse(name) is None
    assert tap_depths([name, "z2"]) == [2] and listed([name, "z2"]) == f"{name}, z2"


def test_sums_and_other_series_have_no_depth_of_their_own() -> None:
    names = ["z0", "z3", "y1", "z0..z3", "pool(z3)"]
    assert tap_depths(names) == [0, 3] and tap_depths(names, "y") == [1]
    assert tap_names([0, 3]) == ("z0", "z3")


def test_messages_draw_neighbours_together() -> None:
    assert listed(tap_names([0, 1, 2, 5, 6, 8])) == "z0 … z2, z5, z6, z8"
    assert listed(["z1", "y2", "y3", "y4", "z0..z4"]) == "z1, y2 … y4, z0..z4"


@pytest.mark.parametrize(
    ("selection", "expected"),
    [("all", [0, 1, 2, 3, 4]), ("every:2", [0, 2, 4]), ("every:3", [1, 4]), ("last:2", [3, 4]),
     ("last:6", [-1, 0, 1, 2, 3, 4]), ("3, 1,3", [1, 3]), ("9", [9])],
)  # fmt: skip
def test_select(selection: str, expected: list[int]) -> None:
    assert select(selection, 5) == expected


@pytest.mark.parametrize(
    "text", ["", "some", "every:0", "every:x", "every", "last:", "last:0", "-1", "1:2:3", "1,,2"]
)  # fmt: skip
def test_select_refuses(text: str) -> None:
    assert not grammatical(text)
    with pytest.raises(ValueError, match="expected all, a list such as 0,3,6"):
        select(text, 5)


def test_no_other_file_takes_names_apart() -> None:
    made_or_parsed = re.compile(r"""int\(tap\[|f"z\{|(?<!")"z\d|'z\d|"ln\(|"\.\."|"pool\(""")
    texts = {path.name: path.read_text() for path in PIPELINE.rglob("*.py")}
    assert [name for name, text in texts.items() if made_or_parsed.search(text)] == ["tap.py"]
    for line in ('tap.startswith("ln(")', 'f"z{number}"', "int(tap[1:])", '("z0", *others)'):
        assert made_or_parsed.search(line), "it can fail"
