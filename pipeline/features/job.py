"""Which slots of a cache are to be filled with which inputs: all, the rest, or an update's.

An update goes in three steps, each of which a kill leaves whole: a part of slots for the inputs
that are new or changed is added; they are filled; the labelling that has them as rows replaces the
one before. Until then the cache is what it was, and the same command goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cache import (
    CacheError,
    IdentityMismatch,
    LabellingMismatch,
    Manifest,
    Matching,
    Reader,
    Writer,
    encode_keys,
    match,
)
from pipeline.config import ExtractConfig
from pipeline.errors import some
from pipeline.features.filling import Slots
from pipeline.labelling.questions import Questions, numbers_of, of_reader
from pipeline.sources.source import Source


@dataclass(frozen=True, kw_only=True)
class Updating:
    """Reported if an update finds other inputs than the cache's rows: how many are new, changed
    (the same key, other bytes) and vanished."""

    new: int
    changed: int
    vanished: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """What there is to extract: a source, the digests of its inputs, what is asked of them."""

    source: Source
    digests: np.ndarray  # uint8 (N, 32)
    deep: bool  # whether some are grey of more than 8 bits
    asked: Questions

    @property
    def keys(self) -> Sequence[str]:
        """One key per input."""
        return self.asked.keys


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """A writer, what belongs into its slots, and the labelling that the cache is to have when they
    are filled (None: the one that it has). A context manager."""

    writer: Writer
    slots: Slots
    asked: Questions | None = None
    digests: np.ndarray | None = None
    rows: np.ndarray | None = None  # the slot of each input
    heard: str | None = None  # the digest of what the source says

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()

    def settle(self) -> None:
        """The last step of an update, in one: its rows are now the cache's."""
        if self.asked is None:
            return
        assert self.rows is not None
        places = {"slots": self.rows}
        if [self.slots.keys[slot] for slot in self.rows.tolist()] != list(self.asked.keys):
            places["keys"] = encode_keys(self.asked.keys)
        digest = self.asked.digest(self.digests)
        tables = {**self.asked.tables, **places}
        self.writer.label(self.asked.labelling, tables, digest, heard=self.heard)


def begin_job(
    config: ExtractConfig,
    manifest: Manifest,
    tables: dict[str, np.ndarray],
    inputs: Inputs,
    report: Callable[[Any], None],
) -> Job:
    """Open the cache for writing: a new one, or one that holds features of the same kind."""
    found = _there(config.out, manifest, inputs)
    if found is None or (config.overwrite and not found[1].same):
        writer = Writer(
            config.out,
            manifest,
            inputs.asked.labelling,
            {**tables, **inputs.asked.tables},
            overwrite=config.overwrite,
        )
        numbers = np.arange(len(inputs.keys))
        return Job(
            writer=writer, slots=Slots(source=inputs.source, keys=inputs.keys, numbers=numbers)
        )
    old, matching = found
    if matching.same:
        asked = _settled(config, old, inputs)
    elif config.update:
        asked = _updated(old, inputs)
        counts = {name: len(getattr(matching, name)) for name in ("new", "changed", "vanished")}
        report(Updating(**counts))
    else:
        raise _other_inputs(config, old, matching, inputs)
    return _resume(config, old, matching, inputs, asked)


def _there(out: str, manifest: Manifest, inputs: Inputs) -> tuple[Reader, Matching] | None:
    """The cache at `out` and how its slots match, if it holds features of this kind."""
    try:
        reader = Reader(out, allow_incomplete=True)
    except CacheError:  # none yet, or one that the writer will refuse or replace
        return None
    if reader.fingerprint != manifest.fingerprint or not reader.has("source_sha256"):
        return None
    return reader, match(reader, inputs.keys, inputs.digests)


def _settled(config: ExtractConfig, old: Reader, inputs: Inputs) -> Questions | None:
    """The inputs are the cache's rows: what is to be asked of them, None for what is asked now."""
    digest = inputs.asked.digest(inputs.digests)
    if digest in (old.labelling_digest, *old.labelling.history):
        return None
    if config.update or config.overwrite:
        return _updated(old, inputs)
    raise LabellingMismatch(
        f"{config.out} has these images, and {config.images} says other things of them now (labels "
        f"or splits): `sidecache label {config.out} {config.images}` takes that over, and computes "
        "nothing",
        [("labelling", old.labelling_digest, digest)],
    )


def _updated(old: Reader, inputs: Inputs) -> Questions:
    """What is asked of the inputs from now on: what the source says; but where `label` has said
    something else since, that stays, and the source speaks of new inputs alone."""
    if old.labelling.notes.get("by") != "label":
        return inputs.asked
    before, keys = of_reader(old), inputs.keys
    return before.rows(numbers_of(keys, before.keys), keys).filled_from(inputs.asked)


def _resume(
    config: ExtractConfig,
    old: Reader,
    matching: Matching,
    inputs: Inputs,
    asked: Questions | None,
) -> Job:
    writer = Writer.resume(config.out)
    try:
        rows, keys, missing = matching.slots.copy(), list(old.slot_keys), matching.missing
        if missing:
            added = [inputs.keys[number] for number in missing]
            digests = inputs.digests[missing]
            part = writer.extend({"keys": encode_keys(added), "source_sha256": digests})
            rows[missing] = np.array(part)
            keys += added
        numbers = np.full(len(keys), -1)
        numbers[rows] = np.arange(len(rows))
    except BaseException:
        writer.close()
        raise
    slots = Slots(source=inputs.source, keys=keys, numbers=numbers)
    return Job(
        writer=writer,
        slots=slots,
        asked=asked,
        digests=inputs.digests,
        rows=rows,
        heard=inputs.asked.digest(inputs.digests),
    )


def _other_inputs(
    config: ExtractConfig, old: Reader, matching: Matching, inputs: Inputs
) -> IdentityMismatch:
    told = {
        "new": [inputs.keys[number] for number in matching.new],
        "changed": [inputs.keys[number] for number in matching.changed],
        "vanished": [old.keys[row] for row in matching.vanished],
    }
    lines = "".join(f"\n  {len(k)} {what}: {some(k)}" for what, k in told.items() if k)
    return IdentityMismatch(
        f"{config.out} has these features of other images than {config.images}:"
        f"{lines or chr(10) + '  the same images in another order, or under other names'}\n"
        f"--update computes what is new or changed and lets go of what vanished; or choose another "
        f"--out, or replace the cache with --overwrite",
        [(f"inputs.{what}", len(k), 0) for what, k in told.items() if k] or [("inputs", 1, 0)],
    )
