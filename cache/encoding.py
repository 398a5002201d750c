"""Storage types: how a float32 value becomes the bytes of a stack, and back.

Every storage type is a plain little-endian numpy array. numpy has no bfloat16, so that one is held
as its 16 bits in an unsigned integer. int8 has one scale per token, a float32 whose bytes follow
the token's values: a row stays one run of bytes, whatever the type. The encoder rounds to the
nearest, ties to even, as the hardware does, and refuses what cannot be held: a feature that
silently became infinite would surface hours later as a NaN loss.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cache.errors import CacheDamaged, StorageOverflow


@dataclass(frozen=True, kw_only=True)
class Storage:
    """One storage type: the numpy dtype of its arrays and the largest magnitude it holds.

    extra: elements behind the values of each token; of int8, the 4 bytes of its scale.
    """

    name: str
    dtype: np.dtype
    largest: float
    extra: int = 0

    def width(self, dim: int) -> int:
        """Elements that a token of `dim` values takes: the last axis of the stored array."""
        return dim + self.extra


STORAGE = {
    "float32": Storage(name="float32", dtype=np.dtype("<f4"), largest=3.4028234663852886e38),
    "float16": Storage(name="float16", dtype=np.dtype("<f2"), largest=65504.0),
    "bfloat16": Storage(name="bfloat16", dtype=np.dtype("<u2"), largest=3.3895313892515355e38),
    # float32's largest but one: 127 times the scale of the largest itself rounds to infinity
    "int8": Storage(name="int8", dtype=np.dtype("i1"), largest=3.4028232635611926e38, extra=4),
}

_TINY = np.finfo(np.float32).tiny  # a token of zeros is divided by it, not by its scale


def encode(values: np.ndarray, storage: str) -> np.ndarray:
    """Round float32 `values` (any shape) to a storage type: same shape, the type's dtype.

    int8 has a scale per token, so the last axis must be a token: (…, D) becomes (…, D + 4).

    Raises:
        StorageOverflow: a value is NaN or infinite, or rounds beyond the largest of the type;
            `.index` is the position of the first one.
    """
    kind = STORAGE[storage]
    values = np.asarray(values)
    if values.dtype != np.float32:
        raise TypeError(f"encode expects float32 values, received {values.dtype}")
    if storage == "float32":
        encoded = values.astype(kind.dtype)
        fits = np.isfinite(values)
    elif storage == "float16":
        with np.errstate(over="ignore", under="ignore"):
            encoded = values.astype(kind.dtype)
        fits = np.isfinite(encoded)
    elif storage == "int8":
        fits = np.abs(values) <= kind.largest  # false of a NaN too
        with np.errstate(invalid="ignore", under="ignore"):
            encoded = _int8_with_scale(values)
    else:
        encoded = _bfloat16_bits(values)
        fits = (encoded & 0x7F80) != 0x7F80  # an exponent of all ones is infinity or NaN
        fits &= np.isfinite(values)  # the rounding of a NaN's bits may carry into the sign
    if not fits.all():
        raise _overflow(values, fits, kind)
    return encoded


def decode(stored: np.ndarray, storage: str) -> np.ndarray:
    """Give the float32 values of an array in a storage type.

    Same shape and exact; of int8, (…, D + 4) becomes (…, D), each product rounded to float32.
    """
    kind = STORAGE[storage]
    stored = np.asarray(stored)
    if stored.dtype != kind.dtype:
        raise TypeError(f"{storage} is stored as {kind.dtype}, received {stored.dtype}")
    if storage == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if storage == "int8":
        if stored.ndim < 1 or stored.shape[-1] <= kind.extra:
            raise ValueError(f"int8 is stored as (…, dim + {kind.extra}), received {stored.shape}")
        scale = np.ascontiguousarray(stored[..., -kind.extra :]).view("<f4")  # (…, 1)
        return stored[..., : -kind.extra].astype(np.float32) * scale
    return stored.astype(np.float32)


def bytes_of(array: np.ndarray) -> memoryview:
    """The bytes of an array in C order, without a copy where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def encode_keys(keys: Sequence[str]) -> np.ndarray:
    """Pack row keys into the uint8 table `keys`: the bytes of a JSON list of strings.

    Non-ASCII characters are escaped, so file names that are not valid UTF-8 survive too.
    """
    text = json.dumps(list(keys), separators=(",", ":"), allow_nan=False)
    return np.frombuffer(text.encode("ascii"), dtype=np.uint8)


def decode_keys(table: np.ndarray) -> list[str]:
    """Unpack the table `keys`. Raises CacheDamaged when it is not a JSON list of strings."""
    try:
        keys = json.loads(table.tobytes())
    except ValueError as error:
        raise CacheDamaged(f"table 'keys' is not a JSON list of strings: {error}") from error
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CacheDamaged("table 'keys' is not a JSON list of strings")
    return keys


def _bfloat16_bits(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    # Adding half a unit in the last place, less one when the kept part is even, rounds ties to even
    rounded = bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))
    return (rounded >> 16).astype("<u2")


def _int8_with_scale(values: np.ndarray) -> np.ndarray:
    """(…, D) float32 → (…, D + 4): the rounded multiples of the scale, then the scale's bytes."""
    if values.ndim < 1 or values.shape[-1] < 1:
        raise ValueError(f"int8 has a scale per token: expected (…, dim), received {values.shape}")
    kind, dim = STORAGE["int8"], values.shape[-1]
    scale = np.abs(values).max(axis=-1, keepdims=True) / np.float32(127)  # (…, 1)
    encoded = np.empty((*values.shape[:-1], kind.width(dim)), kind.dtype)
    encoded[..., :dim] = np.rint(values / np.maximum(scale, _TINY))
    encoded[..., dim:] = scale.astype("<f4", copy=False).view(kind.dtype)
    return encoded


def _overflow(values: np.ndarray, fits: np.ndarray, kind: Storage) -> StorageOverflow:
    index = tuple(int(i) for i in np.unravel_index(np.argmin(fits), fits.shape))
    value = float(values[index])
    message = f"value {value:g} at {index} does not fit {kind.name}"
    if np.isfinite(value):
        message += f", which holds up to {kind.largest:g}: store as bfloat16 or float32"
    else:
        message += ", which holds finite values only: the backbone's output is not a number here"
    return StorageOverflow(message, index, value)
