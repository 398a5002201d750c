"""The manifest: round trips, identity, layout arithmetic, refusals."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache import (
    CacheDamaged,
    FormatVersionError,
    Labelling,
    Manifest,
    NameMissing,
    Stack,
    differences,
)
from cache.containers.document import make_document, manifest_of, read_document
from cache.documents import canonical_json
from cache.ledger import Record, add_errors, record_bytes
from cache.manifest import default_slots_per_shard

NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,6}", fullmatch=True)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(), JSON, max_size=4)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    stacks = tuple(
        Stack(
            name=name,
            taps=tuple(draw(st.lists(st.text(min_size=1), min_size=1, max_size=4, unique=True))),
            tokens=draw(st.integers(2, 300)),
            prefix_tokens=draw(st.integers(0, 2)),
            dim=draw(st.integers(1, 2000)),
        )
        for name in draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    )
    return Manifest(
        identity=draw(OBJECTS),
        storage=draw(st.sampled_from(["float32", "float16", "bfloat16", "int8"])),
        parts=tuple(draw(st.lists(st.integers(1, 10**7), min_size=1, max_size=4))),
        views=draw(st.integers(1, 4)),
        slots_per_shard=draw(st.integers(0, 5000)),
        stacks=stacks,
        final_norm=draw(OBJECTS),
        blocks=tuple(draw(st.lists(OBJECTS, max_size=3))),
        notes=draw(OBJECTS),
        formerly=draw(st.text(alphabet="0123456789abcdef", max_size=64)),
    )


@given(manifests())
def test_round_trips(manifest):
    again = Manifest.from_dict(json.loads(canonical_json(manifest.to_dict())))
    assert again == manifest
    assert again.fingerprint == manifest.fingerprint
    assert canonical_json(again.to_dict()) == canonical_json(manifest.to_dict())


@given(manifests())
def test_a_document_gives_its_manifest_back(manifest):
    document = make_document(manifest, Labelling(rows=1), "", {})
    read = read_document("a.zarr", json.loads(canonical_json(document)))
    assert read == document
    assert manifest_of(read) == manifest
    assert read["fingerprint"] == manifest.fingerprint


@given(manifests())
def test_shards_cover_every_slot_once_and_no_two_parts(manifest):
    parts = tuple(min(slots, 5_000) for slots in manifest.parts)
    manifest = dataclasses.replace(manifest, parts=parts)
    slots = [slot for shard in range(manifest.shards) for slot in manifest.shard_slots(shard)]
    assert slots == list(range(manifest.slots))
    assert manifest.nbytes == manifest.slots * manifest.slot_nbytes
    starts = manifest.part_starts
    seen = []
    for shard in range(manifest.shards):
        here = manifest.shard_slots(shard)
        part, local = manifest.part_of(shard)
        seen.append((part, local))
        assert starts[part] <= here.start < here.stop <= starts[part + 1]
        assert here.start == starts[part] + local * manifest.slots_per_shard
        assert len(here) == manifest.slots_per_shard or here.stop == starts[part + 1]
    assert seen == [(p, i) for p in range(len(parts)) for i in range(manifest.part_shards(p))]
    of = [shard for shard in range(manifest.shards) for _ in manifest.shard_slots(shard)]
    assert manifest.shards_of(np.arange(manifest.slots)).tolist() == of


def test_a_document_without_blocks_has_none(sample):
    document = sample.manifest.to_dict()
    assert document.pop("blocks") == [{"kind": "vit", "heads": 3}, {"kind": "conv"}]
    assert Manifest.from_dict(document) == sample.with_manifest(blocks=()).manifest


def test_int8_has_four_bytes_more_per_token():
    stack = Stack(name="tokens", taps=("z3",), tokens=197, prefix_tokens=1, dim=768)
    manifest = Manifest(identity={}, storage="int8", parts=(10,), views=2, stacks=(stack,))
    assert manifest.stored_shape("tokens") == (1, 197, 772)
    assert manifest.slot_nbytes == 2 * 152_084
    halves = dataclasses.replace(manifest, storage="float16", slots_per_shard=0)
    assert halves.stored_shape("tokens") == halves.stack("tokens").shape == (1, 197, 768)
    assert halves.slot_nbytes == 2 * 197 * 768 * 2
    with pytest.raises(NameMissing, match="it holds tokens"):
        manifest.stored_shape("late")


@given(manifests(), st.text(max_size=300), st.floats(allow_nan=False, allow_infinity=False))
def test_the_fullest_record_fits(manifest, reason, number):
    manifest = dataclasses.replace(manifest, slots_per_shard=min(manifest.slots_per_shard, 50))
    for shard in (0, manifest.shards - 1):
        rows = manifest.shard_slots(shard)
        record = Record(
            shard=shard,
            slots=(rows.start, rows.stop),
            digests={stack.name: ["f" * 32] * len(rows) for stack in manifest.stacks},
            skipped=dict.fromkeys(rows, reason),
            error={stack.name: (number, -1.2345678901234567e-308, 1) for stack in manifest.stacks},
            seconds=1234567890.1239,
        )
        part, _ = manifest.part_of(record.shard)
        data = record.to_bytes(record_bytes(manifest, part))
        assert len(data) == record_bytes(manifest, part)
        again = Record.from_bytes(data)
        assert again.slots == record.slots
        assert again.belongs_to(manifest, record.shard)
        assert again.error == record.error
        assert again.seconds == 1234567890.124
        assert all(reason.startswith(kept) for kept in again.skipped.values())


def test_every_flipped_bit_of_a_record_is_noticed(sample):
    record = Record(shard=0, slots=(0, 1), digests={"tokens": ["0" * 32]}, skipped={0: "why"})
    data = record.to_bytes(300)
    for position in range(len(data.rstrip(b"\0"))):
        torn = bytearray(data)
        torn[position] ^= 4
        assert Record.from_bytes(bytes(torn)) is None
        assert Record.from_bytes(data[:position].ljust(300, b"\0")) is None
    assert Record.from_bytes(bytes(300)) is None
    assert Record.from_bytes(b"") is None


def test_a_record_without_room_leaves_the_error_out():
    """As in a cache that was laid out before there were errors."""
    record = Record(shard=0, slots=(0, 1), digests={"tokens": ["0" * 32]}, skipped={})
    measured = dataclasses.replace(record, error={"tokens": (0.5, 8.0, 0.25)})
    length = len(record.to_bytes(300).rstrip(b"\0"))
    assert measured.to_bytes(length) == record.to_bytes(length)
    assert Record.from_bytes(record.to_bytes(300)) == record
    assert Record.from_bytes(measured.to_bytes(300)) == measured
    timed = dataclasses.replace(measured, seconds=1.5)
    assert Record.from_bytes(timed.to_bytes(300)) == timed
    assert timed.to_bytes(length) == record.to_bytes(length)
    length = len(measured.to_bytes(300).rstrip(b"\0"))
    assert timed.to_bytes(length) == measured.to_bytes(length)  # seconds go first
    timed = dataclasses.replace(record, seconds=1.5)
    length = len(timed.to_bytes(300).rstrip(b"\0"))
    assert dataclasses.replace(measured, seconds=1.5).to_bytes(length) == timed.to_bytes(length)


def test_errors_add_up_to_the_same_in_any_order():
    parts = [(0.1, 1e16, 0.2), (0.2, 1.0, 0.5), (0.3, 1.0, 0.1)]
    assert {add_errors(order) for order in itertools.permutations(parts)} == {(0.6, 1e16 + 2, 0.5)}


def test_fingerprint_is_the_identity_alone(sample):
    changed = sample.with_manifest(slots_per_shard=9, notes={"other": 1}).manifest
    assert changed.fingerprint == sample.manifest.fingerprint
    reordered = dict(reversed(sample.manifest.identity.items()))
    assert sample.with_manifest(identity=reordered).manifest.fingerprint == changed.fingerprint
    other = sample.with_manifest(identity={**reordered, "seed": 1}).manifest
    assert other.fingerprint != changed.fingerprint


def test_differences_name_dotted_fields():
    a = {"backbone": {"name": "x", "sha": "1"}, "taps": ["z0"], "old": 1}
    b = {"backbone": {"name": "y", "sha": "1"}, "taps": ["z0", "z1"], "new": None}
    assert differences(a, b) == [
        ("backbone.name", "x", "y"),
        ("new", "(absent)", None),
        ("old", 1, "(absent)"),
        ("taps", ["z0"], ["z0", "z1"]),
    ]
    assert differences(a, a) == []


def test_default_shard_is_about_64_mib():
    assert default_slots_per_shard(12 * 197 * 768 * 2) == 18
    assert default_slots_per_shard(10**9) == 1
    assert default_slots_per_shard(10) == 4096


def test_tuples_in_the_identity_equal_lists(sample):
    made = sample.with_manifest(identity={"mean": (0.5, 0.5)}).manifest
    assert made.identity == {"mean": [0.5, 0.5]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"storage": "float8"}, "storage 'float8': expected one of float32, float16, bfloat16"),
        ({"parts": ()}, "at least one slot in each part"),
        ({"parts": (3, 0)}, r"at least one slot in each part.*parts=\(3, 0\)"),
        ({"views": 0}, "one view"),
        ({"stacks": ()}, "at least one stack"),
        ({"identity": {"x": float("nan")}}, "identity must be nested JSON"),
        ({"identity": {"x": object()}}, "identity must be nested JSON"),
        ({"blocks": ({"x": object()},)}, r"blocks\[0\] must be nested JSON"),
        ({"blocks": ({}, "vit")}, r"blocks\[1\] must be a JSON object, received str"),
    ],
)
def test_refuses_nonsense(sample, changes, message):
    with pytest.raises(ValueError, match=message):
        sample.with_manifest(**changes)


def test_refuses_a_stack_of_nonsense():
    with pytest.raises(ValueError, match="lower-case"):
        Stack(name="A b", taps=("z0",), tokens=1, prefix_tokens=0, dim=1)
    with pytest.raises(ValueError, match="prefix_tokens=2"):
        Stack(name="a", taps=("z0",), tokens=1, prefix_tokens=2, dim=1)
    with pytest.raises(ValueError, match="no two alike"):
        Stack(name="a", taps=("z0", "z0"), tokens=1, prefix_tokens=0, dim=1)


def test_from_dict_refuses_other_versions_and_damage(sample):
    document = sample.manifest.to_dict()
    whole = make_document(sample.manifest, sample.labelling, "", {})
    with pytest.raises(FormatVersionError, match="version 3, this program reads versions 1, 2"):
        read_document("a.zarr", {**whole, "format_version": 3})
    for changes in ({"parts": [3]}, {"check": "0" * 32}, {"notes": {}}):
        with pytest.raises(CacheDamaged, match=r"a\.zarr: the manifest does not match its own"):
            read_document("a.zarr", {**whole, **changes})
    for nothing in ({}, [], None):
        with pytest.raises(CacheDamaged, match=r"a\.zarr holds no sidecache manifest"):
            read_document("a.zarr", nothing)
    with pytest.raises(CacheDamaged, match="cannot be read"):
        Manifest.from_dict({**document, "colour": "red"})
    with pytest.raises(CacheDamaged, match="cannot be read"):
        Manifest.from_dict({**document, "blocks": 12})
    del document["stacks"]
    with pytest.raises(CacheDamaged, match="cannot be read"):
        Manifest.from_dict(document)
    with pytest.raises(NameMissing, match="it holds tokens, late"):
        sample.manifest.stack("other")


def test_canonical_json_is_one_text_per_value():
    assert canonical_json({"b": [1, 2.5], "a": "é"}) == '{"a":"\\u00e9","b":[1,2.5]}'
