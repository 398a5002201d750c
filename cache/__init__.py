"""The cache: every layer's tokens of a frozen backbone, written once, checked, read many times.

    with Writer(location, manifest, tables) as writer:
        for rows in writer.pending:
            writer.write(rows.start, {"tokens": encode(values, manifest.storage)})

    with Reader(location) as reader:
        reader.read_into(rows, out)

numpy in, numpy out; no torch. The format is written down in docs/format.md. The one idea: nothing
is compressed, so every row is a fixed run of bytes at a computable place in some file, and zarr
and h5py only lay files out. They are loaded when a cache is created or (h5py) opened, not before.
"""

from cache.describing import Inspection, inspect
from cache.encoding import STORAGE, Storage, decode, decode_keys, encode, encode_keys
from cache.errors import (
    CacheDamaged,
    CacheError,
    CacheIncomplete,
    CacheLocked,
    CacheNotFound,
    FormatVersionError,
    IdentityMismatch,
    LocationError,
    NameMissing,
    NoSpace,
    NotWritable,
    StorageOverflow,
    TapMissing,
)
from cache.manifest import Manifest, Stack, Target, differences
from cache.reader import Reader
from cache.tables import row_tables
from cache.verifying import Damage, Progress, Verification, verify
from cache.writer import Writer

__all__ = [
    "STORAGE",
    "CacheDamaged",
    "CacheError",
    "CacheIncomplete",
    "CacheLocked",
    "CacheNotFound",
    "Damage",
    "FormatVersionError",
    "IdentityMismatch",
    "Inspection",
    "LocationError",
    "Manifest",
    "NameMissing",
    "NoSpace",
    "NotWritable",
    "Progress",
    "Reader",
    "Stack",
    "Storage",
    "StorageOverflow",
    "TapMissing",
    "Target",
    "Verification",
    "Writer",
    "decode",
    "decode_keys",
    "differences",
    "encode",
    "encode_keys",
    "inspect",
    "row_tables",
    "verify",
]
