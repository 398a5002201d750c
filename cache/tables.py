"""The small arrays beside the stacks: what each must look like, and reading one.

| table | dtype | shape | holds |
|---|---|---|---|
| keys | uint8 | any | a JSON list of strings, one key per row (`encode_keys`) |
| labels/<target> | int64 | (rows,) | of a class target: class index, -1 for none |
| labels/<target> | int8 | (rows, classes) | multilabel: 1 or 0 per class, -1 throughout for none |
| labels/<target> | float32 | (rows,) | regression: finite, NaN for none |
| split | uint8 | (rows,) | index into the manifest's splits |
| source_sha256 | uint8 | (rows, 32) | digest of the source file |
| final_norm/weight, final_norm/bias | float32 | (dim,) | the backbone's last norm |

Tables of other names, such as `ladder/block0/qkv_weight`, are kept as they are. All are written
once, at creation.
"""

import re
from collections.abc import Mapping

import numpy as np
import xxhash

from cache import files
from cache.backend import Backend
from cache.encoding import decode_keys
from cache.errors import CacheDamaged, NameMissing
from cache.manifest import Manifest, Target

_NAME = re.compile(r"(?!(stacks|scales|ledger|manifest)(/|$))[a-z][a-z0-9_]*(/[a-z][a-z0-9_]*)*")


def check_tables(manifest: Manifest, tables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tables, little endian and contiguous, after checking them against the manifest.

    Raises ValueError naming the table, what was expected and what came.
    """
    layouts = row_tables(manifest)
    needed = {"keys", *layouts} - {"source_sha256"}
    if missing := sorted(needed - set(tables)):
        raise ValueError(f"tables {missing} are missing: the manifest asks for {sorted(needed)}")
    for name, table in tables.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"table name {name!r} is reserved or not of the form 'name/name'")
        if table.size == 0 or table.dtype.kind not in "iuf":
            raise ValueError(
                f"table {name!r}: expected numbers, received {table.dtype} {table.shape}"
            )
        dtype, shape = layouts.get(name, (table.dtype.name, table.shape))
        if (table.dtype.name, table.shape) != (dtype, shape):
            raise ValueError(
                f"table {name!r}: expected {dtype} {shape}, received {table.dtype} {table.shape}"
            )
    _check_values(manifest, tables)
    return {
        name: np.ascontiguousarray(table.astype(table.dtype.newbyteorder("<"), copy=False))
        for name, table in tables.items()
    }


def row_tables(manifest: Manifest) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tables whose first axis is the rows, with dtype and shape; `source_sha256` may be absent.

    `keys` has a value a row too, but as text: `decode_keys`.
    """
    rows = manifest.rows
    layouts = {f"labels/{target.name}": target.layout(rows) for target in manifest.targets}
    if manifest.splits:
        layouts["split"] = "uint8", (rows,)
    return layouts | {"source_sha256": ("uint8", (rows, 32))}


def read_table(backend: Backend, name: str) -> np.ndarray:
    """Read a table and compare it with its checksum.

    Raises: NameMissing listing the tables there are; CacheDamaged naming the file.
    """
    known = backend.document["tables"]
    if name not in known:
        raise NameMissing(f"no table {name!r} in {backend.path}: it holds {', '.join(known)}")
    dtype, shape = np.dtype(known[name]["dtype"]), tuple(known[name]["shape"])
    extent = backend.table(name)
    length = dtype.itemsize * int(np.prod(shape))
    try:
        data = files.read_at(extent.path, extent.offset, length)
    except FileNotFoundError as error:
        raise CacheDamaged(f"{extent.path}, table {name!r}, is missing") from error
    if xxhash.xxh3_128_hexdigest(data) != known[name]["xxh3_128"]:
        raise CacheDamaged(f"{extent.path}: table {name!r} does not match its checksum")
    return np.frombuffer(data, dtype).reshape(shape).copy()


def _check_values(manifest: Manifest, tables: Mapping[str, np.ndarray]) -> None:
    keys = len(decode_keys(tables["keys"]))
    if keys != manifest.rows:
        raise ValueError(f"table 'keys' has {keys} keys, expected one per row: {manifest.rows}")
    checks = {f"labels/{target.name}": _wrong_labels(target, tables) for target in manifest.targets}
    if manifest.splits:
        checks["split"] = (
            tables["split"] >= len(manifest.splits),
            f"0 to {len(manifest.splits) - 1}",
        )
    for name, (wrong, expected) in checks.items():
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"table {name!r}: row {row} is {tables[name][row]}, expected {expected}"
            )


def _wrong_labels(target: Target, tables: Mapping[str, np.ndarray]) -> tuple[np.ndarray, str]:
    """Which rows hold what they must not, bool (rows,); and what was expected of them."""
    values = tables[f"labels/{target.name}"]
    match target.kind:
        case "class":
            end = len(target.classes)
            return (values < -1) | (values >= end), f"a class index below {end}, or -1 (none)"
        case "multilabel":
            fits = ((values == 0) | (values == 1)).all(axis=1) | (values == -1).all(axis=1)
            return ~fits, "0 or 1 for every class, or -1 for every class (none)"
        case _:
            return np.isinf(values), "a finite number, or NaN (none)"
