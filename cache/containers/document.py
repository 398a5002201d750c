"""The document that says what a cache is, as both containers keep it; and what version 1 said.

    manifest …, "labelling": {…}, "labelling_at": …, "labelling_digest": …,
    "record_bytes": [one a part], "tables": {…}, "former": […], "check": …

Everything else in a cache is an array that the document names. It is replaced as a whole: a change
first writes new arrays under new names, then the document that speaks of them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import xxhash

from cache.documents import canonical_json
from cache.errors import CacheDamaged, FormatVersionError
from cache.labelling import FIRST, Labelling
from cache.ledger import record_bytes
from cache.manifest import FORMAT_VERSION, READABLE, Manifest, fingerprint

PART_TABLES = ("keys", "source_sha256", "lengths")  # with a value a slot; lengths/<stack>

_LABELLING = ("labelling", "labelling_at", "labelling_digest")
_BESIDE_MANIFEST = (
    *("format_version", "fingerprint", "record_bytes", "tables", "former", "check"),
    *_LABELLING,
)


def in_part(part: int, name: str) -> str:
    """The name of a part's array: what the cache was made with is called just so."""
    return f"updates/{part}/{name}" if part else name


def below(folder: str, name: str) -> str:
    """The name of an array below a folder, which may be the root, ""."""
    return f"{folder}/{name}" if folder else name


def make_document(
    manifest: Manifest,
    labelling: Labelling,
    digest: str,
    tables: Mapping[str, np.ndarray],
    *,
    at: str = FIRST,
) -> dict[str, Any]:
    """The document of a new cache. `tables` by the names under which they are stored."""
    return checked(
        {
            "format_version": FORMAT_VERSION,
            **manifest.to_dict(),
            "fingerprint": manifest.fingerprint,
            "record_bytes": [record_bytes(manifest, part) for part in range(len(manifest.parts))],
            "tables": _entries(tables),
            "labelling": labelling.to_dict(),
            "labelling_at": at,
            "labelling_digest": digest,
            "former": [],
        }
    )


def with_part(
    document: Mapping[str, Any], slots: int, tables: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The document of the same cache with one more part of so many slots."""
    manifest = manifest_of({**document, "parts": [*document["parts"], slots]})
    part = len(manifest.parts) - 1
    return checked(
        {
            **document,
            "parts": list(manifest.parts),
            "record_bytes": [*document["record_bytes"], record_bytes(manifest, part)],
            "tables": {**document["tables"], **_entries(tables)},
        }
    )


def with_labelling(
    document: Mapping[str, Any],
    labelling: Labelling,
    digest: str,
    tables: Mapping[str, np.ndarray],
    *,
    at: str,
) -> dict[str, Any]:
    """The document of the same cache with another labelling.

    The tables of the one before become `former`: they stay for readers that have the cache open,
    until the next change.
    """
    old = set(labelling_tables(document))
    kept = {name: entry for name, entry in document["tables"].items() if name not in old}
    return checked(
        {
            **document,
            "labelling": labelling.to_dict(),
            "labelling_at": at,
            "labelling_digest": digest,
            "tables": {**kept, **_entries(tables)},
            "former": sorted(old),
        }
    )


def labelling_tables(document: Mapping[str, Any]) -> Iterator[str]:
    """The names of the tables of the labelling that the document has now."""
    at, labelling = document["labelling_at"], Labelling.from_dict(document["labelling"])
    own = (*labelling.tables, *(f"groups/{g}" for g in labelling.groups), "slots", "keys")
    for name in own:
        if below(at, name) in document["tables"] and (at or name != "keys"):  # those of the slots
            yield below(at, name)


def arrays_of(document: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...], np.dtype]]:
    """(name, shape, dtype) of every array, tables first, stacks last."""
    manifest = manifest_of(document)
    for name, table in document["tables"].items():
        yield name, tuple(table["shape"]), np.dtype(table["dtype"])
    for part, length in enumerate(document["record_bytes"]):
        shape = (manifest.part_shards(part), int(length))
        yield in_part(part, "ledger"), shape, np.dtype(np.uint8)
    for part, slots in enumerate(manifest.parts):
        for stack in manifest.stacks:
            stored = (slots, manifest.views, *manifest.stored_shape(stack.name))
            yield in_part(part, f"stacks/{stack.name}"), stored, manifest.dtype


def manifest_of(document: Mapping[str, Any]) -> Manifest:
    """The manifest inside the document. Raises CacheDamaged."""
    return Manifest.from_dict({k: v for k, v in document.items() if k not in _BESIDE_MANIFEST})


def checked(document: dict[str, Any]) -> dict[str, Any]:
    """The document with its checksum of itself."""
    return {**document, "check": _check(document)}


def read_document(where: str, document: Any) -> dict[str, Any]:
    """The document as this version writes it, whichever of READABLE it was written in.

    Raises CacheDamaged naming the place, FormatVersionError.
    """
    if not isinstance(document, dict) or "format_version" not in document:
        raise CacheDamaged(f"{where} holds no sidecache manifest: not a cache, or damaged")
    version = document["format_version"]
    if version not in READABLE:
        raise FormatVersionError(
            f"the cache has format version {version}, this program reads versions "
            f"{', '.join(map(str, READABLE))}: use the sidecache that wrote it, or extract again"
        )
    if document.get("check") != _check(document):
        raise CacheDamaged(f"{where}: the manifest does not match its own checksum")
    return document if version == FORMAT_VERSION else _from_version_1(document)


def _from_version_1(old: dict[str, Any]) -> dict[str, Any]:
    """The same cache in words of today: its identity spoke of the inputs and their labels, too,
    and these were tables at its root."""
    try:
        identity = {k: v for k, v in old["identity"].items() if k != "source"}
        return {
            "format_version": FORMAT_VERSION,
            "identity": identity,
            "fingerprint": fingerprint(FORMAT_VERSION, identity),
            "storage": old["storage"],
            "parts": [old["rows"]],
            "views": old["views"],
            "slots_per_shard": old["rows_per_shard"],
            "stacks": old["stacks"],
            "final_norm": old["final_norm"],
            "blocks": old.get("blocks", []),
            "notes": old["notes"],
            "formerly": old["fingerprint"],
            "record_bytes": [old["record_bytes"]],
            "tables": old["tables"],
            "labelling": {
                **{name: old[name] for name in ("rows", "targets", "splits")},
                "groups": [],
                "folds": 0,
                "history": [],
                "notes": {},
            },
            "labelling_at": "",
            "labelling_digest": "",
            "former": [],
        }
    except KeyError as error:
        raise CacheDamaged(f"the manifest cannot be read: {error} is missing") from error


def _entries(tables: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    return {name: _table_entry(table) for name, table in tables.items()}


def _table_entry(table: np.ndarray) -> dict[str, Any]:
    digest = xxhash.xxh3_128(np.ascontiguousarray(table).data.cast("B"))
    return {
        "dtype": table.dtype.str,
        "shape": list(table.shape),
        "xxh3_128": digest.hexdigest(),
    }


def _check(document: Mapping[str, Any]) -> str:
    text = canonical_json({key: document[key] for key in document if key != "check"})
    return xxhash.xxh3_128_hexdigest(text.encode())
