"""Storage types against references: torch's rounding, and exact round trips."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cache import STORAGE, StorageOverflow, decode, decode_keys, encode, encode_keys

FLOATS = hnp.arrays(
    np.float32,
    hnp.array_shapes(max_dims=4, max_side=4),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)
TOKENS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=4, max_side=5),
    elements=st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100),
)
TINY = np.finfo(np.float32).tiny
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def torch_bits(values: np.ndarray, storage: str) -> np.ndarray:
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(TORCH[storage])
    bits = {4: torch.int32, 2: torch.int16}[rounded.element_size()]
    return rounded.view(bits).numpy()


def torch_int8(values: np.ndarray) -> np.ndarray:
    """The definition: D int8 values, then the bytes of their float32 scale."""
    tokens = torch.from_numpy(np.ascontiguousarray(values))
    scale = tokens.abs().amax(-1, keepdim=True) / 127
    q = (tokens / scale.clamp_min(TINY)).round_().to(torch.int8)
    return torch.cat([q, scale.view(torch.int8)], dim=-1).numpy()


@pytest.mark.parametrize("storage", sorted(TORCH))
@given(values=FLOATS)
@settings(deadline=None)
def test_rounds_like_torch_or_refuses(storage, values):
    fits = np.isfinite(torch.from_numpy(values).to(TORCH[storage]).float().numpy())
    if fits.all():
        stored = encode(values, storage)
        assert stored.dtype == STORAGE[storage].dtype
        np.testing.assert_array_equal(
            stored.view(torch_bits(values, storage).dtype), torch_bits(values, storage)
        )
        np.testing.assert_array_equal(encode(decode(stored, storage), storage), stored)
    else:
        with pytest.raises(StorageOverflow) as caught:
            encode(values, storage)
        assert caught.value.index == tuple(np.argwhere(~fits)[0])


@given(values=TOKENS)
@settings(deadline=None)
def test_int8_is_torchs_and_errs_by_half_a_step(values):
    stored = encode(values, "int8")
    assert stored.dtype == np.int8
    assert stored.shape == (*values.shape[:-1], values.shape[-1] + 4)
    np.testing.assert_array_equal(stored, torch_int8(values))
    decoded = decode(stored, "int8")
    assert (decoded.dtype, decoded.shape) == (np.float32, values.shape)
    scale = np.abs(values.astype(np.float64)).max(-1, keepdims=True) / 127
    error = np.abs(decoded.astype(np.float64) - values)
    # A scale below the smallest normal number cannot be divided by: there the error is the value
    allowed = np.where(scale >= TINY, scale * (0.5 + 1e-4), 127 * scale)
    assert (error <= allowed).all()


@given(values=FLOATS, zeros=st.booleans())
@settings(deadline=None)
def test_int8_holds_any_finite_tokens(values, zeros):
    largest = np.float32(STORAGE["int8"].largest)  # numpy 1 would make float64 of a plain number
    values = np.clip(values * np.float32(not zeros), -largest, largest)
    decoded = decode(encode(values, "int8"), "int8")
    assert np.isfinite(decoded).all()
    assert not decoded[values == 0].any()


def test_int8_rounds_ties_to_even():
    values = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]], np.float32) / 8
    stored = encode(values, "int8")
    np.testing.assert_array_equal(stored[0, :7], [127, 0, 2, 2, 0, -2, -126])
    assert stored[0, 7:].tobytes() == np.array(1 / 8, "<f4").tobytes()


def test_int8_needs_tokens():
    for values in (np.float32(1), np.zeros((3, 0), np.float32)):
        with pytest.raises(ValueError, match=r"expected \(…, dim\), received"):
            encode(values, "int8")
    for stored in (np.int8(1), np.zeros((3, 4), np.int8)):
        with pytest.raises(ValueError, match=r"stored as \(…, dim \+ 4\), received"):
            decode(stored, "int8")


def test_int8_has_room_for_no_tokens():
    assert encode(np.zeros((0, 5), np.float32), "int8").shape == (0, 9)
    assert decode(np.zeros((0, 9), np.int8), "int8").shape == (0, 5)


def test_every_bfloat16_survives():
    bits = np.arange(2**16, dtype="<u2")
    finite = bits[(bits & 0x7F80) != 0x7F80]
    np.testing.assert_array_equal(encode(decode(finite, "bfloat16"), "bfloat16"), finite)


def test_bfloat16_rounds_ties_to_even():
    patterns = np.arange(0, 2**32 - 2**24, 4099, dtype=np.uint64).astype(np.uint32)
    values = patterns.view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 3.38e38)]
    np.testing.assert_array_equal(
        encode(values, "bfloat16").view(np.int16), torch_bits(values, "bfloat16")
    )


@pytest.mark.parametrize("storage", sorted(STORAGE))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_a_number(storage, value):
    values = np.zeros((2, 3), np.float32)
    values[1, 2] = value
    with pytest.raises(StorageOverflow, match=r"\(1, 2\).*finite values only") as caught:
        encode(values, storage)
    assert caught.value.index == (1, 2)


@pytest.mark.parametrize(
    ("storage", "beyond"),
    [("float16", 65520), ("bfloat16", 3.3961776e38), ("int8", 3.4028234663852886e38)],
)
def test_largest_value_fits_and_the_next_does_not(storage, beyond):
    largest = STORAGE[storage].largest
    values = np.array([[largest], [-largest]], np.float32)
    np.testing.assert_allclose(decode(encode(values, storage), storage), values, rtol=1e-7)
    with pytest.raises(StorageOverflow, match=f"does not fit {storage}"):
        encode(np.array([beyond], np.float32), storage)


def test_expects_the_right_dtype():
    with pytest.raises(TypeError, match="expects float32 values, received float64"):
        encode(np.zeros(2), "float16")
    with pytest.raises(TypeError, match="bfloat16 is stored as uint16, received float16"):
        decode(np.zeros(2, np.float16), "bfloat16")


@given(st.lists(st.text()))
def test_keys_round_trip(keys):
    assert decode_keys(encode_keys(keys)) == keys


def test_keys_that_are_not_utf8_round_trip():
    assert decode_keys(encode_keys(["bad\udcff.png"])) == ["bad\udcff.png"]
