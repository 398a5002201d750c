"""The small arrays beside the stacks: what those of the features must look like, and reading one.

| table | dtype | shape | holds |
|---|---|---|---|
| keys | uint8 | any | a JSON list of strings, one key per slot of a part (`encode_keys`) |
| source_sha256 | uint8 | (slots, 32) | digest of each slot's input (optional) |
| lengths/<stack> | int32 | (slots,) | tokens of each slot; those behind are zeros (optional) |
| final_norm/weight, final_norm/bias | float32 | (dim,) | the backbone's last norm |

Tables of other names, such as `ladder/block0/qkv_weight`, are kept as they are. All are written
once: with the cache, or with the part that they speak of. Those of a labelling are in
`labelling.py`.
"""

import math
import re
from collections.abc import Callable, Mapping

import numpy as np
import xxhash

from cache.containers.container import Container
from cache.containers.document import below
from cache.encoding import bytes_of, decode_keys
from cache.errors import CacheDamaged, NameMissing
from cache.manifest import Manifest

_RESERVED = "stacks|scales|ledger|manifest|updates|labellings|labels|groups|split|slots|fold"
_PIECE_BYTES = 16 * 2**20  # read at once; a table of masks may be larger than the memory
_NAME = re.compile(rf"(?!({_RESERVED})(/|$))[a-z][a-z0-9_]*(/[a-z][a-z0-9_]*)*")


def slot_tables(manifest: Manifest, slots: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of the optional tables with a value for each of a part's slots.

    `keys` has a value a slot too, but as text: `decode_keys`.
    """
    lengths = {f"lengths/{stack.name}": ("int32", (slots,)) for stack in manifest.stacks}
    return {"source_sha256": ("uint8", (slots, 32)), **lengths}


def check_tables(
    manifest: Manifest, tables: Mapping[str, np.ndarray], part: int = 0
) -> dict[str, np.ndarray]:
    """The tables, little endian and contiguous, after checking them against the manifest.

    Raises ValueError naming the table, what was expected and what came.
    """
    slots = manifest.parts[part]
    layouts = slot_tables(manifest, slots)
    if "keys" not in tables:
        raise ValueError("tables ['keys'] are missing: expected one key per slot")
    for name, table in tables.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"table name {name!r} is reserved or not of the form 'name/name'")
        if part and name != "keys" and name not in layouts:
            raise ValueError(f"table {name!r} is the whole cache's: an update cannot change it")
        if table.size == 0 or table.dtype.kind not in "iuf":
            raise ValueError(
                f"table {name!r}: expected numbers, received {table.dtype} {table.shape}"
            )
        dtype, shape = layouts.get(name, (table.dtype.name, table.shape))
        if (table.dtype.name, table.shape) != (dtype, shape):
            raise ValueError(
                f"table {name!r}: expected {dtype} {shape}, received {table.dtype} {table.shape}"
            )
    _check_values(manifest, tables, slots)
    return {name: plain(table) for name, table in tables.items()}


def plain(table: np.ndarray) -> np.ndarray:
    """The same numbers, little endian and in C order."""
    return np.ascontiguousarray(table.astype(table.dtype.newbyteorder("<"), copy=False))


def read_table(container: Container, name: str) -> np.ndarray:
    """Read a table and compare it with its checksum.

    Raises: NameMissing listing the tables there are; CacheDamaged naming the file.
    """
    table = np.empty(*_shape_and_dtype(container, name))
    memory = bytes_of(table)
    _read_checked(container, name, lambda start, end: memory[start:end])
    return table


def check_table(container: Container, name: str) -> None:
    """Compare a table with its checksum, piece by piece. Raises what `read_table` raises."""
    piece = memoryview(bytearray(_PIECE_BYTES))
    _read_checked(container, name, lambda start, end: piece[: end - start])


def _read_checked(
    container: Container, name: str, memory: Callable[[int, int], memoryview]
) -> None:
    """Read all bytes of a table, those from `start` to `end` into `memory(start, end)`."""
    shape, dtype = _shape_and_dtype(container, name)
    extent, length = container.table(name), dtype.itemsize * math.prod(shape)
    where, digest = container.store.where(extent.name), xxhash.xxh3_128()
    try:
        for start in range(0, length, _PIECE_BYTES):
            piece = memory(start, min(length, start + _PIECE_BYTES))
            (got,) = container.store.read_runs(extent.name, [(extent.offset + start, [piece])])
            digest.update(piece[:got])
    except FileNotFoundError as error:
        raise CacheDamaged(f"{where}, table {name!r}, is missing", where) from error
    if digest.hexdigest() != container.document["tables"][name]["xxh3_128"]:
        raise CacheDamaged(f"{where}: table {name!r} does not match its checksum", where)


def _shape_and_dtype(container: Container, name: str) -> tuple[tuple[int, ...], np.dtype]:
    known = container.document["tables"]
    if name not in known:
        raise NameMissing(f"no table {name!r} in {container.where}: it holds {', '.join(known)}")
    return tuple(known[name]["shape"]), np.dtype(known[name]["dtype"])


def read_table_rows(container: Container, name: str, rows: np.ndarray) -> np.ndarray:
    """Some rows of a table, in the order given, without reading the others (nor its checksum).

    Raises: NameMissing, CacheDamaged; IndexError for a row that it has not.
    """
    shape, dtype = _shape_and_dtype(container, name)
    if len(rows) and not (rows.min() >= 0 and rows.max() < shape[0]):
        raise IndexError(f"table {name!r} has rows 0 to {shape[0] - 1}, asked for {rows}")
    out = np.empty((len(rows), *shape[1:]), dtype)
    extent, length = container.table(name), dtype.itemsize * math.prod(shape[1:])
    memory = out.reshape(-1).view(np.uint8).data
    runs = [
        (extent.offset + row * length, [memory[i * length : (i + 1) * length]])
        for i, row in enumerate(rows.tolist())
    ]
    where = container.store.where(extent.name)
    try:
        received = container.store.read_runs(extent.name, runs)
    except FileNotFoundError as error:
        raise CacheDamaged(f"{where}, table {name!r}, is missing", where) from error
    if any(got < length for got in received):
        raise CacheDamaged(f"{where} ends too early: it was cut short", where)
    return out


def read_labelling_table(container: Container, name: str) -> np.ndarray:
    """One of the labelling's tables by its own name, in the dtype of this format version.

    Raises: NameMissing, CacheDamaged.
    """
    table = read_table(container, below(container.labelling_at, name))
    dtype, _ = container.labelling.tables.get(name, (table.dtype.name, ()))
    return table.astype(dtype, copy=False)


def labelling_digest(container: Container) -> str:
    """The digest of the labelling that a cache has, noted down or (version 1) computed."""
    if noted := container.document["labelling_digest"]:
        return str(noted)
    keys = decode_keys(read_table(container, "keys"))  # it has one part, and no slots
    known = "source_sha256" in container.document["tables"]
    digests = read_table(container, "source_sha256") if known else None
    tables = {n: read_labelling_table(container, n) for n in container.labelling.tables}
    return container.labelling.digest(keys, digests, tables)


def _check_values(manifest: Manifest, tables: Mapping[str, np.ndarray], slots: int) -> None:
    keys = len(decode_keys(tables["keys"]))
    if keys != slots:
        raise ValueError(f"table 'keys' has {keys} keys, expected one per slot: {slots}")
    for stack in manifest.stacks:
        lengths = tables.get(f"lengths/{stack.name}")
        if lengths is None:
            continue
        wrong = (lengths < 0) | (lengths > stack.tokens)
        if wrong.any():
            slot = int(wrong.argmax())
            raise ValueError(
                f"table 'lengths/{stack.name}': slot {slot} is {lengths[slot]}, expected 0 to "
                f"{stack.tokens} tokens"
            )
