"""Damaged rows written again, in their places or with their shards."""

import numpy as np
import pytest
from cache_inputs import (
    Inputs,
    Where,
    assert_alike,
    beside,
    extract,
    flip,
    is_zarr,
    put,
    update,
)

from cache import (
    CacheDamaged,
    Reader,
    Writer,
    inspect,
    verify,
)
from cache.location import open_container

OLD = Inputs.of("a", "b", "c", "d", "e", "broken1")
NEW = Inputs.of("f", "e", "b", "a=A", "broken2", "g", "d")  # c and broken1 are gone, a has changed


# ---- repaired ------------------------------------------------------------------------------------


def damage(location: Where, stack: str, slot: int) -> None:
    """Change a bit of a slot."""
    container = open_container(location)
    shard = int(container.manifest.shards_of(np.array(slot)))
    extents = container.slots(stack, shard)
    place = slot - container.manifest.shard_slots(shard).start
    flip(location, extents.name, int(extents.offsets[place, 0]) + 2)


def test_a_damaged_row_is_replaced_in_its_place(anywhere):
    extract(anywhere, OLD)
    update(anywhere, NEW)
    before, content = records(anywhere), inspect(anywhere).content
    damage(anywhere, "late", 7)  # of a part that came later; row 3
    (found,) = verify(anywhere).damaged
    assert (found.row, found.key, found.stack) == (3, "a", "late")
    with Writer.resume(anywhere) as writer:
        assert writer.replace(7, NEW.at([3]).features) is True
        assert writer.pending == []
    assert verify(anywhere).ok
    assert (inspect(anywhere).content, records(anywhere)) == (content, before)
    assert_alike(anywhere, extract(beside(anywhere, "fresh"), NEW))


def records(location: Where) -> list[bytes | None]:
    container = open_container(location)
    return [container.record(shard) for shard in range(container.manifest.shards)]


def test_other_bits_replace_the_record(anywhere):
    """Another machine's last bits: the checksum follows, of that slot alone."""
    extract(anywhere, OLD)
    before, content = records(anywhere), inspect(anywhere).content
    damage(anywhere, "tokens", 2)
    other = {name: values + np.float16(1) for name, values in OLD.at([2]).features.items()}
    with Writer.resume(anywhere) as writer:
        assert writer.replace(2, other) is False
    assert verify(anywhere).ok
    assert inspect(anywhere).content != content
    assert [a == b for a, b in zip(before, records(anywhere), strict=True)] == [True, False, True]
    with Reader(anywhere) as reader:
        np.testing.assert_array_equal(reader.read([2]), other["tokens"][:, 0])
        np.testing.assert_array_equal(reader.read([3]), OLD.features["tokens"][[3], 0])


def test_a_skipped_row_that_can_be_read_again(anywhere):
    extract(anywhere, OLD)
    mended = Inputs.of("mended")
    with Writer.resume(anywhere) as writer:
        assert writer.replace(5, mended.features) is False
    with Reader(anywhere) as reader:
        assert reader.skipped == {}
        np.testing.assert_array_equal(reader.read([5]), mended.features["tokens"][:, 0])
    assert verify(anywhere).ok


def test_what_cannot_be_replaced(anywhere):
    extract(anywhere, OLD)
    one = OLD.at([0]).features
    with Writer.resume(anywhere) as writer:
        writer.extend(NEW.slot_tables)
        with pytest.raises(ValueError, match="slot 6 is not in a finished shard"):
            writer.replace(6, one)
        for slot in (-1, 13):
            with pytest.raises(ValueError, match=f"slot {slot} is not in a finished shard"):
                writer.replace(slot, one)
        with pytest.raises(ValueError, match=r"stack 'late'|stacks"):
            writer.replace(0, {"tokens": one["tokens"]})
        with pytest.raises(ValueError, match="expected arrays of one slot, received 2"):
            writer.replace(0, OLD.at([0, 1]).features)
    assert_alike(anywhere, extract(beside(anywhere, "fresh"), OLD))


def test_lost_shards_are_told(anywhere):
    """A record that is torn, and in Zarr a file that is gone: nothing can be written in place."""
    extract(anywhere, OLD)
    update(anywhere, NEW)
    place = open_container(anywhere).record_place(1)
    flip(anywhere, place.name, place.offset + 30)
    damage(anywhere, "tokens", 1)
    found = verify(anywhere)
    assert found.lost_shards == [1]
    assert {d.row for d in found.damaged} == {2, 6}  # slots 1 and 3; row c has gone
    if is_zarr(anywhere):
        put(anywhere, open_container(anywhere).slots("late", 4).name, None)
        found = verify(anywhere)
        assert found.lost_shards == [1, 4]
        assert {d.row for d in found.damaged} == {2, 6, 4, 5}
        with Writer.resume(anywhere) as writer, pytest.raises(CacheDamaged, match="is missing"):
            writer.replace(8, NEW.at([4]).features)
    with Writer.resume(anywhere) as writer:
        writer.forget(found.lost_shards)
        writer.replace(1, NEW.at([2]).features)
        for slots in writer.pending:
            for slot in slots:
                inputs, n = (OLD, slot) if slot < 6 else (NEW, [0, 3, 4, 5][slot - 6])
                skipped = {slot: "no"} if n in inputs.skipped else {}
                writer.write(slot, inputs.at([n]).features, skipped)
    assert_alike(anywhere, extract(beside(anywhere, "fresh"), NEW))
