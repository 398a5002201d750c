"""The labelling: what is asked of the rows of a cache, beside the features and apart from them.

Features are what the backbone computed, once. Targets, splits, groups and folds are questions, and
questions change: a labelling is replaced as a whole, in one step, and no feature is touched. It
also says which inputs are the cache's rows, in what order: row `r` is the input whose features lie
in slot `slots[r]` (without that table, in slot `r`).

| table | dtype | shape | holds |
|---|---|---|---|
| slots | int64 | (rows,) | where each row's features lie (optional; inputs alike may share one) |
| keys | uint8 | any | one key per row, where they are not those of the slots (optional) |
| split | int16 | (rows,) | index into `splits`, -1 for none |
| labels/<target> | by the target's kind | (rows, …) | see `Target` |
| groups/<group> | uint8 | any | a JSON list of strings, one per row (`encode_keys`) |
| fold | int16 | (rows,) | 0 to `folds` - 1, -1 for none |
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from cache.documents import canonical_json, plain_json
from cache.encoding import decode_keys
from cache.errors import CacheDamaged

LABEL_DTYPES = {
    "class": "int64",
    "multilabel": "int8",
    "regression": "float32",
    "segmentation": "uint8",
}
MOST_SPLITS = 2**15  # an index is an int16
IGNORED = 255  # of a segmentation: the class of a pixel that has none
FIRST = "labellings/0"  # where a cache keeps the labelling that it was made with

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_CHUNK_ROWS = 64  # of an array of labels: looked through so many at a time


@dataclass(frozen=True, kw_only=True)
class Target:
    """Something to predict; the table `labels/<name>` holds it for every row.

    | kind | table | a row without |
    |---|---|---|
    | class | int64 (rows,), a class index | -1 |
    | multilabel | int8 (rows, classes), 1 where the class applies, else 0 | -1 throughout |
    | regression | float32 (rows,), a finite number | NaN |
    | segmentation | uint8 (rows, *shape), a class index a pixel, 255 for none | 255 throughout |

    A regression has no classes, a multilabel target at least one; a class target without any is
    one for which no row has a label. A segmentation has at most 255 classes, and a `shape`: the
    height and width of its masks.
    """

    name: str
    kind: str = "class"
    classes: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "shape", tuple(self.shape))
        _check_name("target", self.name)
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
        masks = self.kind == "segmentation"
        if masks and len(self.classes) > IGNORED:
            raise ValueError(
                f"target {self.name!r}: a mask holds at most {IGNORED} classes, "
                f"received {len(self.classes)}"
            )
        if (len(self.shape) != 2 or min(self.shape) < 1) if masks else self.shape:
            raise ValueError(
                f"target {self.name!r}: expected {'(height, width)' if masks else 'no shape'} for "
                f"kind {self.kind}, received shape {self.shape}"
            )

    def layout(self, rows: int) -> tuple[str, tuple[int, ...]]:
        """(dtype, shape) of the table of so many rows."""
        shape = (len(self.classes),) if self.kind == "multilabel" else self.shape
        return LABEL_DTYPES[self.kind], (rows, *shape)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `shape` only where there is one."""
        values = {"name": self.name, "kind": self.kind, "classes": list(self.classes)}
        return values | ({"shape": list(self.shape)} if self.shape else {})


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """The description of a labelling; its tables lie beside it.

    rows: how many inputs the cache has.
    groups: names of columns that say what belongs together (a patient, a site, …).
    folds: how many folds the table `fold` tells apart; 0 without that table.
    history: the digests of the labellings that the cache has had, this one last: what a source
        says is news only if it is not among them.
    notes: informational JSON (where the labels came from, how the folds were drawn).
    """

    rows: int
    targets: tuple[Target, ...] = ()
    splits: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    folds: int = 0
    history: tuple[str, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("targets", "splits", "groups", "history"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "notes", plain_json("notes", self.notes))
        if self.rows < 1:
            raise ValueError(f"a labelling has at least one row, received rows={self.rows}")
        for what, names in (
            ("targets", [target.name for target in self.targets]),
            ("splits", list(self.splits)),
            ("groups", list(self.groups)),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"two {what} have the same name: {', '.join(names)}")
        for group in self.groups:
            _check_name("group", group)
        if len(self.splits) > MOST_SPLITS:
            raise ValueError(f"expected at most {MOST_SPLITS} splits, received {len(self.splits)}")
        if self.folds < 0 or self.folds == 1:
            raise ValueError(f"expected no folds or two and more, received {self.folds}")

    @property
    def tables(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """(dtype, shape) of each table that it needs, by name; groups are text and not listed, and
        `slots` may be absent."""
        needed = {f"labels/{target.name}": target.layout(self.rows) for target in self.targets}
        if self.splits:
            needed["split"] = "int16", (self.rows,)
        if self.folds:
            needed["fold"] = "int16", (self.rows,)
        return needed

    def check(self, tables: Mapping[str, np.ndarray], slots: int) -> dict[str, np.ndarray]:
        """The tables in the dtypes of this format, after checking them against the description.

        `slots` is how many the cache has. Raises ValueError naming the table, the row, what was
        expected and what came.
        """
        optional = {"slots": ("int64", (self.rows,))}
        text = {f"groups/{group}" for group in self.groups} | ({"keys"} & set(tables))
        if missing := sorted({*self.tables, *text} - set(tables)):
            raise ValueError(f"tables {missing} are missing: the labelling asks for them")
        if unknown := sorted(set(tables) - {*self.tables, *text, *optional}):
            raise ValueError(f"tables {unknown}: the labelling does not speak of them")
        checked = {}
        for name, table in tables.items():
            if name in text:
                if len(decode_keys(table)) != self.rows:
                    raise ValueError(f"table {name!r}: expected a string for each of {self.rows}")
                checked[name] = table
                continue
            dtype, shape = (self.tables | optional)[name]
            narrowed = dtype == "int16" and table.dtype.kind in "iu"
            if table.shape != shape or not (narrowed or table.dtype.name == dtype):
                raise ValueError(
                    f"table {name!r}: expected {dtype} {shape}, "
                    f"received {table.dtype} {table.shape}"
                )
            self._check_values(name, table, slots)
            checked[name] = table.astype(np.dtype(dtype), copy=False)
        if "slots" not in tables and slots < self.rows:
            raise ValueError(f"{self.rows} rows need as many slots, the cache has {slots}")
        return checked

    def _check_values(self, name: str, table: np.ndarray, slots: int) -> None:
        targets = {f"labels/{target.name}": target for target in self.targets}
        ends = {"split": len(self.splits), "fold": self.folds, "slots": slots}
        for first in range(0, len(table), _CHUNK_ROWS if table.ndim > 2 else len(table)):
            part = table[first : first + _CHUNK_ROWS] if table.ndim > 2 else table
            if name in targets:
                wrong, expected = _wrong_labels(targets[name], part)
            else:
                lowest, end = 0 if name == "slots" else -1, ends[name]
                wrong = (part < lowest) | (part >= end)
                expected = f"{lowest} to {end - 1}" + (" (-1: none)" if lowest else "")
            if wrong.any():
                row = int(wrong.argmax())
                value = part[row]
                if value.ndim > 1:  # a mask: one of its wrong pixels says enough
                    value = value[value != IGNORED].max()
                raise ValueError(
                    f"table {name!r}: row {first + row} is {value}, expected {expected}"
                )

    def digest(
        self, keys: Iterable[str], digests: np.ndarray | None, tables: Mapping[str, np.ndarray]
    ) -> str:
        """SHA-256, in hex, of what is asked of which inputs: the keys and input digests of the
        rows, and everything here but `history`, `notes` and the slots."""
        described = {k: v for k, v in self.to_dict().items() if k not in ("history", "notes")}
        total = hashlib.sha256(canonical_json({**described, "keys": list(keys)}).encode())
        if digests is not None:
            total.update(np.ascontiguousarray(digests).data)
        for name in sorted({*self.tables, *(f"groups/{group}" for group in self.groups)}):
            total.update(np.ascontiguousarray(tables[name]).data)
        return total.hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives an equal labelling back."""
        return {
            "rows": self.rows,
            "targets": [target.to_dict() for target in self.targets],
            "splits": list(self.splits),
            "groups": list(self.groups),
            "folds": self.folds,
            "history": list(self.history),
            "notes": dict(self.notes),
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """Rebuild a labelling. Raises CacheDamaged for fields that make no sense."""
        try:
            targets = tuple(Target(**target) for target in document["targets"])
            return cls(**{**document, "targets": targets})
        except (KeyError, TypeError, ValueError) as error:
            raise CacheDamaged(f"the labelling cannot be read: {error}") from error


def _wrong_labels(target: Target, values: np.ndarray) -> tuple[np.ndarray, str]:
    """Which rows hold what they must not, bool (rows,); and what was expected of them."""
    end = len(target.classes)
    match target.kind:
        case "class":
            return (values < -1) | (values >= end), f"a class index below {end}, or -1 (none)"
        case "multilabel":
            fits = ((values == 0) | (values == 1)).all(axis=1) | (values == -1).all(axis=1)
            return ~fits, "0 or 1 for every class, or -1 for every class (none)"
        case "segmentation":
            wrong = ((values >= end) & (values != IGNORED)).reshape(len(values), -1).any(axis=1)
            return wrong, f"class indices below {end}, or {IGNORED} (none)"
        case _:
            return np.isinf(values), "a finite number, or NaN (none)"


def no_label(dtype: np.dtype) -> float | int:
    """How a table of labels, splits or folds says that a row has none: NaN, 255 or -1."""
    return float("nan") if dtype.kind == "f" else IGNORED if dtype.kind == "u" else -1


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{what} name {name!r}: expected lower-case letters, digits and _")
