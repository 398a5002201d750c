"""The manifest: what a cache is, before any of its data exist.

A manifest has two kinds of content. The **identity** says what the numbers were made from (the
caller decides its fields: backbone, weights, preprocessing, source, ...); its hash, with the format
version, is the **fingerprint**. The rest says how the numbers are laid out. Neither knows where
the cache lies, when it was made, or which backend holds it.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from cache.encoding import STORAGE
from cache.errors import CacheDamaged, FormatVersionError, NameMissing

FORMAT_VERSION = 1
SHARD_BYTES = 64 * 2**20  # large enough for full disk speed, small enough to lose in a crash
MOST_ROWS_PER_SHARD = 4096
ABSENT = "(absent)"
LABEL_DTYPES = {"class": "int64", "multilabel": "int8", "regression": "float32"}  # kind → table

_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class Stack:
    """All taps that share a token count and a width: one array `(row, view, tap, token, dim)`.

    `tokens` counts every token kept; the first `prefix_tokens` of them are class or register
    tokens.
    """

    name: str
    taps: tuple[str, ...]
    tokens: int
    prefix_tokens: int
    dim: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "taps", tuple(self.taps))
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"stack name {self.name!r}: expected lower-case letters, digits and _")
        if not self.taps or len(set(self.taps)) != len(self.taps):
            raise ValueError(f"stack {self.name!r}: taps must be one or more, no two alike")
        if self.tokens < 1 or self.dim < 1 or not 0 <= self.prefix_tokens <= self.tokens:
            raise ValueError(
                f"stack {self.name!r}: expected tokens >= prefix_tokens >= 0 and positive sizes, "
                f"received tokens={self.tokens}, prefix_tokens={self.prefix_tokens}, dim={self.dim}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(taps, tokens, dim): the values that one view of one row holds."""
        return len(self.taps), self.tokens, self.dim


@dataclass(frozen=True, kw_only=True)
class Target:
    """Something to predict; the table `labels/<name>` holds it for every row.

    | kind | table | a row without |
    |---|---|---|
    | class | int64 (rows,), a class index | -1 |
    | multilabel | int8 (rows, classes), 1 where the class applies, else 0 | -1 throughout |
    | regression | float32 (rows,), a finite number | NaN |

    A regression has no classes, a multilabel target at least one; a class target without any is
    one for which no row has a label.
    """

    name: str
    kind: str = "class"
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"target name {self.name!r}: expected lower-case letters, digits and _"
            )
        if self.kind not in LABEL_DTYPES:
            raise ValueError(
                f"target {self.name!r}: kind {self.kind!r} is unknown, expected one of "
                f"{', '.join(LABEL_DTYPES)}"
            )
        if self.kind == "regression" and self.classes:
            raise ValueError(
                f"target {self.name!r}: a regression has no classes, received {len(self.classes)}"
            )
        if self.kind == "multilabel" and not self.classes:
            raise ValueError(f"target {self.name!r}: expected one class or more, received none")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"target {self.name!r}: two classes have the same name")

    def layout(self, rows: int) -> tuple[str, tuple[int, ...]]:
        """(dtype, shape) of the table of so many rows."""
        shape = (rows, len(self.classes)) if self.kind == "multilabel" else (rows,)
        return LABEL_DTYPES[self.kind], shape


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The plan of a cache.

    identity: nested JSON; everything that decides the numbers, nothing else.
    storage: name of the storage type, a key of `cache.STORAGE`.
    rows, views: lengths of the first two axes of every stack.
    rows_per_shard: layout only; None picks about 64 MiB of row bytes.
    splits: names; the table `split` holds an index into them per row.
    final_norm: the backbone's last norm, e.g. `{"kind": "layer", "eps": 1e-6}`; its weights are
        the tables `final_norm/weight` and `final_norm/bias`.
    blocks: per block of the backbone, nested JSON that says what kind of block it is; the caller
        decides its fields.
    notes: informational JSON (created by, source path, recipe); compared with nothing.
    """

    identity: Mapping[str, Any]
    storage: str
    rows: int
    stacks: tuple[Stack, ...]
    views: int = 1
    rows_per_shard: int = 0
    targets: tuple[Target, ...] = ()
    splits: tuple[str, ...] = ()
    final_norm: Mapping[str, Any] = field(default_factory=dict)
    blocks: tuple[Mapping[str, Any], ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name in ("stacks", "targets", "splits"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("identity", "final_norm", "notes"):
            object.__setattr__(self, name, _plain_json(name, getattr(self, name)))
        blocks = tuple(_plain_json(f"blocks[{i}]", block) for i, block in enumerate(self.blocks))
        object.__setattr__(self, "blocks", blocks)
        self._validate()
        if self.rows_per_shard == 0:
            object.__setattr__(self, "rows_per_shard", default_rows_per_shard(self.row_nbytes))

    def _validate(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise FormatVersionError(
                f"format version {self.format_version} is not readable by this program, "
                f"which reads version {FORMAT_VERSION}: use the sidecache that wrote it, "
                "or extract again"
            )
        if self.storage not in STORAGE:
            raise ValueError(f"storage {self.storage!r}: expected one of {', '.join(STORAGE)}")
        if self.rows < 1 or self.views < 1 or self.rows_per_shard < 0:
            raise ValueError(
                "a cache has at least one row and one view, received "
                f"rows={self.rows}, views={self.views}, rows_per_shard={self.rows_per_shard}"
            )
        if not self.stacks:
            raise ValueError("a cache has at least one stack, received none")
        for what, names in (
            ("stacks", [stack.name for stack in self.stacks]),
            ("targets", [target.name for target in self.targets]),
            ("splits", list(self.splits)),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"two {what} have the same name: {', '.join(names)}")

    @property
    def dtype(self) -> np.dtype:
        """The numpy dtype of every stack (bfloat16 is held as '<u2')."""
        return STORAGE[self.storage].dtype

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the canonical JSON of the format version and the identity."""
        document = {"format_version": self.format_version, "identity": self.identity}
        return hashlib.sha256(canonical_json(document).encode()).hexdigest()

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row: all stacks, all views."""
        return sum(self.stack_row_nbytes(stack.name) for stack in self.stacks)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows of all stacks; tables, ledger and metadata are not counted."""
        return self.rows * self.row_nbytes

    @property
    def shards(self) -> int:
        """Number of shards; the last may have fewer rows."""
        return -(-self.rows // self.rows_per_shard)

    def shard_rows(self, shard: int) -> range:
        """Rows of one shard, 0 <= shard < shards."""
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.rows))

    def stack(self, name: str) -> Stack:
        """The stack of that name. Raises NameMissing listing those there are."""
        for stack in self.stacks:
            if stack.name == name:
                return stack
        names = ", ".join(stack.name for stack in self.stacks)
        raise NameMissing(f"no stack {name!r} in this cache: it holds {names}")

    def stored_shape(self, stack_name: str) -> tuple[int, int, int]:
        """(taps, tokens, stored width) of one view of one row, in elements of `dtype`.

        The width is the stack's dim; of int8 it is dim + 4, for each token's scale.
        """
        taps, tokens, dim = self.stack(stack_name).shape
        return taps, tokens, STORAGE[self.storage].width(dim)

    def stack_row_nbytes(self, name: str) -> int:
        """Bytes of one row of one stack, all views."""
        return self.views * math.prod(self.stored_shape(name)) * self.dtype.itemsize

    def to_dict(self) -> dict[str, Any]:
        """The manifest as plain JSON values; `from_dict` gives an equal manifest back."""
        return {
            "format_version": self.format_version,
            "identity": dict(self.identity),
            "storage": self.storage,
            "rows": self.rows,
            "views": self.views,
            "rows_per_shard": self.rows_per_shard,
            "stacks": [{**vars(stack), "taps": list(stack.taps)} for stack in self.stacks],
            "targets": [
                {**vars(target), "classes": list(target.classes)} for target in self.targets
            ],
            "splits": list(self.splits),
            "final_norm": dict(self.final_norm),
            "blocks": [dict(block) for block in self.blocks],
            "notes": dict(self.notes),
        }

    def to_json(self) -> str:
        """The canonical JSON text of `to_dict`."""
        return canonical_json(self.to_dict())

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """Rebuild a manifest.

        Raises:
            FormatVersionError: it was written by another version of the format.
            CacheDamaged: a field is missing, unknown or has a value that makes no sense.
        """
        version = document.get("format_version", ABSENT)
        if version != FORMAT_VERSION:
            raise FormatVersionError(
                f"the cache has format version {version}, this program reads version "
                f"{FORMAT_VERSION}: use the sidecache that wrote it, or extract again"
            )
        try:
            fields = dict(document)
            fields["stacks"] = tuple(Stack(**stack) for stack in fields["stacks"])
            fields["targets"] = tuple(Target(**target) for target in fields["targets"])
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise CacheDamaged(f"the manifest cannot be read: {error}") from error


def default_rows_per_shard(row_nbytes: int) -> int:
    """Rows that make about 64 MiB, between 1 and 4096."""
    return max(1, min(MOST_ROWS_PER_SHARD, SHARD_BYTES // row_nbytes))


def canonical_json(value: object) -> str:
    """One ASCII text per value: keys sorted, no spaces, NaN refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def differences(a: object, b: object, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """List `(dotted field, value in a, value in b)` where two nested JSON values differ.

    Objects are compared field by field, anything else as a whole. A field that one side lacks
    shows as "(absent)".
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        found = []
        for key in sorted({*a, *b}):
            dotted = f"{prefix}.{key}" if prefix else str(key)
            found += differences(a.get(key, ABSENT), b.get(key, ABSENT), dotted)
        return found
    return [] if a == b else [(prefix, a, b)]


def _plain_json(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """A private copy with tuples turned to lists, so that equality survives a round trip."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a JSON object, received {type(value).__name__}")
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be nested JSON values: {error}") from error
