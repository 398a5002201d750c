"""The cache: every layer's tokens of a frozen backbone, written once, checked, read many times.

    with Writer(location, manifest, labelling, tables) as writer:
        for slots in writer.pending:
            writer.write(slots.start, {"tokens": encode(values, manifest.storage)})

    with Reader(location) as reader:
        reader.read_into(rows, out)

numpy in, numpy out; no torch. The format is written down in docs/format.md. Two ideas.
Features are computed once; what is asked of them (the labelling) is replaced as often as need be.
And nothing is compressed, so every row is a fixed run of bytes at a computable place in some file,
and zarr and h5py only lay files out. They are loaded when a cache is created or (h5py) opened, not
before.
"""

from cache.describing import Inspection, inspect
from cache.documents import differences
from cache.encoding import STORAGE, Storage, decode, decode_keys, encode, encode_keys
from cache.errors import (
    CacheDamaged,
    CacheError,
    CacheIncomplete,
    CacheLocked,
    CacheNotFound,
    FormatVersionError,
    IdentityMismatch,
    LabellingMismatch,
    LocationError,
    NameMissing,
    NoSpace,
    NotWritable,
    StorageOverflow,
    TapMissing,
)
from cache.labelling import IGNORED, Labelling, Target, no_label
from cache.manifest import Manifest, Stack
from cache.matching import Matching, match
from cache.reader import Reader
from cache.tables import slot_tables
from cache.verifying import Damage, Verification, Verified, verify
from cache.writer import Writer

__all__ = [
    "IGNORED",
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
    "Labelling",
    "LabellingMismatch",
    "LocationError",
    "Manifest",
    "Matching",
    "NameMissing",
    "NoSpace",
    "NotWritable",
    "Reader",
    "Stack",
    "Storage",
    "StorageOverflow",
    "TapMissing",
    "Target",
    "Verification",
    "Verified",
    "Writer",
    "decode",
    "decode_keys",
    "differences",
    "encode",
    "encode_keys",
    "inspect",
    "match",
    "no_label",
    "slot_tables",
    "verify",
]
