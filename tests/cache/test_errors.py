"""Every refusal, and that its message says what was expected, what came, and what to do."""

import errno
import fcntl
import json
import os
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import zarr

import cache
from cache import (
    CacheDamaged,
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
    Reader,
    TapMissing,
    Target,
    Writer,
    files,
    inspect,
    verify,
)
from cache.errors import CacheError


def test_every_error_is_a_cache_error_and_a_builtin():
    for name in cache.__all__:
        kind = getattr(cache, name)
        if isinstance(kind, type) and issubclass(kind, Exception) and kind is not CacheError:
            assert issubclass(kind, CacheError)
            assert any(base.__module__ == "builtins" for base in kind.__mro__[1:-3]), name


@pytest.mark.parametrize("name", ["plain", "a.zip", "s3://bucket/a.zarr"])
def test_unknown_location(name, sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LocationError, match=r"expected"):
        Writer(name, sample.manifest, sample.labelling, sample.tables)
    with pytest.raises(LocationError, match=r"expected"):
        Reader(name)
    assert list(tmp_path.iterdir()) == []


def test_nothing_there(location):
    with pytest.raises(CacheNotFound, match="there is no cache here"):
        Reader(location)


def test_incomplete_is_refused_and_says_how_to_go_on(location, sample):
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        sample.fill(writer, [range(4, 8)])
    with pytest.raises(CacheIncomplete, match=r"4 of 10 rows.*run the same extract"):
        Reader(location)
    with Reader(location, allow_incomplete=True) as reader:
        assert not reader.complete
        np.testing.assert_array_equal(reader.read([5]), sample.values["tokens"][[5], 0])
        with pytest.raises(CacheIncomplete, match="rows 0 to 3"):
            reader.read([5, 2])
    found = inspect(location)
    assert (found.rows_done, found.complete, found.content) == (4, False, None)
    assert verify(location).ok
    assert not verify(location).complete


def test_an_exception_publishes_nothing_further(location, sample):
    with (
        pytest.raises(RuntimeError, match="stop"),
        Writer(location, sample.manifest, sample.labelling, sample.tables) as writer,
    ):
        sample.fill(writer, [range(4)])
        writer.write(4, sample.rows(4, 7))
        raise RuntimeError("stop")
    assert inspect(location).rows_done == 4
    if location.is_dir():
        assert not list(location.rglob(".partial"))


def test_another_identity_is_refused_naming_each_field(location, sample):
    sample.write(location)
    identity = {"backbone": {"name": "vit_base", "weights": "ab"}, "views": 2}
    other = sample.with_manifest(identity=identity)
    with pytest.raises(IdentityMismatch) as caught:
        Writer(location, other.manifest, other.labelling, other.tables)
    assert caught.value.differences == [
        ("backbone.name", "vit_tiny", "vit_base"),
        ("seed", 0, "(absent)"),
        ("views", "(absent)", 2),
    ]
    assert "backbone.name: 'vit_tiny' in the cache, 'vit_base' now" in str(caught.value)
    assert "--overwrite" in str(caught.value)
    with Writer(location, other.manifest, other.labelling, other.tables, overwrite=True) as writer:
        assert writer.pending
        other.fill(writer)
    assert Reader(location).fingerprint == other.manifest.fingerprint


def test_other_stacks_or_tables_are_refused(location, sample):
    sample.write(location)
    fewer = sample.with_manifest(stacks=sample.manifest.stacks[:1])
    with pytest.raises(IdentityMismatch, match="stacks"):
        Writer(location, fewer.manifest, fewer.labelling, fewer.tables)
    other = sample.with_manifest(blocks=({"kind": "vit", "heads": 6}, {"kind": "conv"}))
    with pytest.raises(IdentityMismatch, match="blocks"):
        Writer(location, other.manifest, other.labelling, other.tables)
    tables = {**sample.tables, "source_sha256": np.zeros((10, 32), np.uint8)}
    with pytest.raises(IdentityMismatch, match="table source_sha256: 'other contents'"):
        Writer(location, sample.manifest, sample.labelling, tables)
    del tables["source_sha256"]
    with pytest.raises(IdentityMismatch, match=r"source_sha256: 'there' .* '\(absent\)' now"):
        Writer(location, sample.manifest, sample.labelling, tables)


def test_other_labels_are_refused_and_say_how_to_take_them_over(location, sample):
    sample.write(location)
    tables = {**sample.tables, "labels/label": np.zeros(10, np.int64)}
    with pytest.raises(
        LabellingMismatch, match=r"asked other things now.*`sidecache label"
    ) as caught:
        Writer(location, sample.manifest, sample.labelling, tables)
    ((name, before, now),) = caught.value.differences
    assert name == "labelling" and before == inspect(location).labelling != now
    with Writer(location, sample.manifest, sample.labelling, tables, overwrite=True) as writer:
        assert writer.pending == []  # no feature is touched
    assert inspect(location).labelling == now
    np.testing.assert_array_equal(Reader(location).labels(), np.zeros(10))
    sample.write(location)  # what was said before is no news
    assert inspect(location).labelling == now


def test_overwrite_deletes_only_caches(location, sample):
    if location.suffix == ".zarr":
        location.mkdir()
        (location / "thesis.txt").write_text("precious")
    else:
        location.write_text("precious")
    for overwrite in (False, True):
        with pytest.raises((LocationError, CacheDamaged)):
            Writer(location, sample.manifest, sample.labelling, sample.tables, overwrite=overwrite)
    assert location.exists()
    if location.is_dir():
        assert (location / "thesis.txt").read_text() == "precious"


def test_second_writer_is_refused_while_the_first_lives(location, sample):
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as first:
        for options in ({}, {"overwrite": True}, {"workers": 2}):
            with pytest.raises(CacheLocked, match="another process"):
                Writer(location, sample.manifest, sample.labelling, sample.tables, **options)
        other = sample.with_manifest(identity={"other": 1})
        with pytest.raises(CacheLocked, match="another process"):
            Writer(location, other.manifest, other.labelling, other.tables, overwrite=True)
        sample.fill(first)
    Writer(location, sample.manifest, sample.labelling, sample.tables).close()


def test_of_two_who_create_a_cache_one_writes(location, sample, monkeypatch):
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as first:
        monkeypatch.setattr(
            "cache.location.Location.is_there", lambda self: False
        )  # it looked too early
        with pytest.raises(CacheLocked, match="another process"):
            Writer(location, sample.manifest, sample.labelling, sample.tables)
        sample.fill(first)
    assert list(location.parent.iterdir()) == [location]


def test_where_the_file_system_has_no_locks_it_goes_on(location, sample, monkeypatch):
    def no_locks(fd: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    sample.write(location)
    assert Reader(location).complete


def test_nfs_locks_only_what_is_open_to_write(tmp_path, sample, monkeypatch):
    """It makes a lock on bytes of a `flock`, an exclusive one only where they may be written."""
    real = fcntl.flock

    def flock(fd: int, how: int) -> None:
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        if mode == (os.O_RDONLY if how & fcntl.LOCK_EX else os.O_WRONLY):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(fd, how)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    location = tmp_path / "a.h5"
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as first:
        for options in ({}, {"workers": 2}):
            with pytest.raises(CacheLocked):
                Writer(location, sample.manifest, sample.labelling, sample.tables, **options)
        sample.fill(first)
    sample.write(tmp_path / "a.zarr")  # a folder is never open to write: it goes on without


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EIO])
def test_where_folders_cannot_be_synchronised_it_goes_on(location, sample, monkeypatch, code):
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(code, os.strerror(code))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    if code == errno.EIO:  # that is no refusal but a failure
        with pytest.raises(OSError, match="Input/output"):
            sample.write(location)
    else:
        sample.write(location)
        assert verify(location).ok


def test_a_file_system_without_a_size_is_not_full(location, sample, monkeypatch):
    fields = dict.fromkeys(("f_blocks", "f_bavail", "f_frsize"), 0)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(**fields))
    sample.write(location)
    fields["f_blocks"] = 1
    with pytest.raises(NoSpace, match="0 are free"):
        Writer(location.with_stem("b"), sample.manifest, sample.labelling, sample.tables)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_where_nobody_may_write_it_says_so(location, sample, monkeypatch, code):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), "somewhere")

    asked = r"cannot be written \(.*'somewhere'\).*choose another --out"
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        monkeypatch.setattr(files, "write_all", refuse)
        with pytest.raises(NotWritable, match=asked):
            writer.write(0, sample.rows(0, 4))
    monkeypatch.setattr(files, "make_folders", refuse)
    with pytest.raises(NotWritable, match=asked):
        Writer(location.with_stem("b"), sample.manifest, sample.labelling, sample.tables)


def test_a_complete_cache_may_be_read_only(location, sample, monkeypatch):
    sample.write(location)
    real = os.open

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def only_read(path: object, flags: int, *arguments: int, **named: int) -> int:
        return refuse() or 0 if flags & os.O_ACCMODE else real(path, flags, *arguments, **named)

    monkeypatch.setattr(os, "open", only_read)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    for name in ("mkdir", "rmdir", "unlink", "rename", "replace", "link", "utime", "ftruncate"):
        monkeypatch.setattr(os, name, refuse)
    with Reader(location) as reader:
        np.testing.assert_array_equal(reader.read(range(10)), sample.values["tokens"][:, 0])
    assert verify(location).ok and inspect(location).complete
    with Writer(
        location, sample.manifest, sample.labelling, sample.tables, overwrite=True
    ) as writer:
        assert writer.pending == []


def test_full_disk_is_refused_before_anything_is_made(location, sample, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 100)
    with pytest.raises(NoSpace, match=r"bytes are still to be written and 100 are free"):
        Writer(location, sample.manifest, sample.labelling, sample.tables)
    assert list(location.parent.iterdir()) == []


def test_full_disk_while_writing_keeps_what_is_done(location, sample, monkeypatch):
    write_all = files.write_all

    def full(fd: int, data: memoryview, offset: int) -> None:
        raise OSError(28, "No space left on device")

    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        sample.fill(writer, [range(4)])
        monkeypatch.setattr(files, "write_all", full)
        with pytest.raises(NoSpace, match="Finished shards are kept"):
            writer.write(4, sample.rows(4, 8))
        monkeypatch.setattr(files, "write_all", write_all)
        writer.write(4, sample.rows(4, 8))  # the rows were given back
        assert writer.pending == [range(8, 10)]


def test_wrong_arrays_are_refused(location, sample):
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        with pytest.raises(ValueError, match=r"expected arrays for stacks \['tokens', 'late'\]"):
            writer.write(0, {"tokens": sample.values["tokens"][:4]})
        wrong = {name: values.astype(np.float32) for name, values in sample.rows(0, 4).items()}
        with pytest.raises(ValueError, match=r"expected float16 \(4, 2, 3, 5, 4\).*float32"):
            writer.write(0, wrong)
        with pytest.raises(ValueError, match="reach past their shard"):
            writer.write(2, sample.rows(2, 6))
        with pytest.raises(ValueError, match="not in a pending shard"):
            writer.write(12, sample.rows(0, 1))
        with pytest.raises(ValueError, match="expected slots among those written"):
            writer.write(0, sample.rows(0, 1), {3: "no"})
        with pytest.raises(NameMissing, match=r"no stack 'nope'.*tokens, late"):
            writer.write(0, sample.rows(0, 2), {}, {"nope": (0.0, 1.0, 0.0)})
        with pytest.raises(ValueError, match=r"stack 'late': expected three numbers.*\(0.0, 1.0\)"):
            writer.write(0, sample.rows(0, 2), {}, {"late": (0.0, 1.0)})
        writer.write(0, sample.rows(0, 2))
        with pytest.raises(ValueError, match="slot 1 was already written"):
            writer.write(1, sample.rows(1, 3))
    with pytest.raises(ValueError, match="closed"):
        writer.write(0, sample.rows(0, 2))


def test_int8_without_its_scales_is_refused(location, samples):
    sample = samples("int8")
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        bare = {name: values[..., :-4] for name, values in sample.rows(0, 4).items()}
        with pytest.raises(ValueError, match=r"expected int8 \(4, 2, 3, 5, 8\).*\(4, 2, 3, 5, 4\)"):
            writer.write(0, bare)
        sample.fill(writer)
    with (
        Reader(location) as reader,
        pytest.raises(ValueError, match=r"expected int8 \(1, 3, 5, 8\), received int8"),
    ):
        reader.read_into([0], np.empty((1, 3, 5, 4), np.int8))


def test_wrong_tables_are_refused(location, sample):
    def refused(match: str, **changes: np.ndarray | None) -> None:
        tables = {**sample.tables, **{k.replace("__", "/"): v for k, v in changes.items()}}
        tables = {name: table for name, table in tables.items() if table is not None}
        with pytest.raises(ValueError, match=match):
            Writer(location, sample.manifest, sample.labelling, tables)
        assert not location.exists()

    refused("'split'.*missing", split=None)
    refused(r"expected int64 \(10,\)", labels__label=np.zeros(9, np.int64))
    refused(r"row 0 is 3, expected a class index below 3, or -1", labels__label=np.full(10, 3))
    refused(r"'split': row 0 is 2, expected -1 to 1 \(-1: none\)", split=np.full(10, 2, np.uint8))
    refused("9 keys, expected one per slot: 10", keys=cache.encode_keys(list("abcdefghi")))
    refused("reserved", stacks__x=np.zeros(3))


@pytest.mark.parametrize(
    ("target", "table", "match"),
    [
        (
            Target(name="age", kind="regression"),
            np.zeros(10),
            r"'labels/age': expected float32 \(10,\), received float64 \(10,\)",
        ),
        (
            Target(name="age", kind="regression"),
            np.array([0, 1, np.nan, -np.inf, *range(6)], np.float32),
            r"'labels/age': row 3 is -inf, expected a finite number, or NaN \(none\)",
        ),
        (
            Target(name="marks", kind="multilabel", classes=("tail", "ears")),
            np.zeros(10, np.int8),
            r"'labels/marks': expected int8 \(10, 2\), received int8 \(10,\)",
        ),
        (
            Target(name="marks", kind="multilabel", classes=("tail", "ears")),
            np.array([[0, 1], [-1, -1], [-1, 1], *[[0, 0]] * 7], np.int8),
            r"'labels/marks': row 2 is \[-1  1\], expected 0 or 1 for every class, or -1 for every",
        ),
        (
            Target(name="marks", kind="multilabel", classes=("tail", "ears")),
            np.array([[0, 1], *[[2, 0]] * 9], np.int8),
            r"row 1 is \[2 0\]",
        ),
        (
            Target(name="marks", kind="multilabel", classes=("tail", "ears")),
            None,
            r"tables \['labels/marks'\] are missing",
        ),
    ],
)
def test_wrong_labels_are_refused(location, sample, target, table, match):
    sample = sample.with_labelling(targets=(*sample.labelling.targets, target))
    tables = sample.tables | ({} if table is None else {f"labels/{target.name}": table})
    with pytest.raises(ValueError, match=match):
        Writer(location, sample.manifest, sample.labelling, tables)
    assert not location.exists()


def test_wrong_reads_are_refused(location, sample):
    sample.write(location)
    with Reader(location) as reader:
        with pytest.raises(IndexError, match=r"row 10 is outside.*0 to 9"):
            reader.read([0, 10])
        with pytest.raises(IndexError, match="row -1 is outside"):
            reader.read([-1])
        with pytest.raises(IndexError, match="view 2"):
            reader.read([0], view=2)
        with pytest.raises(TapMissing, match="z0, z1, z2"):
            reader.read([0], taps=slice(1, 4))
        with pytest.raises(KeyError, match=r"no stack 'nope'.*tokens, late"):
            reader.read([0], stack="nope")
        with pytest.raises(ValueError, match=r"expected float16 \(2, 3, 5, 4\), received float32"):
            reader.read_into([0, 1], np.empty((2, 3, 5, 4), np.float32))
        with pytest.raises(ValueError, match="contiguous"):
            reader.read_into([0, 1], np.empty((4, 3, 5, 4), np.float16)[::2])


def test_another_format_version_is_refused(location, sample):
    sample.write(location)
    edit_document(location, lambda document: {**document, "format_version": 99})
    for act in (Reader, inspect, verify):
        with pytest.raises(FormatVersionError, match=r"99.*reads versions 1, 2:"):
            act(location)
    with pytest.raises(FormatVersionError):
        Writer(location, sample.manifest, sample.labelling, sample.tables)


def test_an_edited_manifest_is_damage(location, sample):
    sample.write(location)

    def swap(document):
        return {**document, "labelling": {**document["labelling"], "splits": ["val", "train"]}}

    edit_document(location, swap)
    with pytest.raises(CacheDamaged, match="checksum"):
        Reader(location)
    assert not verify(location).ok


def edit_document(location, change):
    if location.suffix == ".zarr":
        attributes = zarr.open_group(location, mode="r+").attrs
        attributes["sidecache"] = change(attributes["sidecache"])
        return
    with h5py.File(location, "r+", libver=("earliest", "v110")) as file:
        document = change(json.loads(file["manifest"][()]))
        file["manifest"][()] = json.dumps(document)


# damage: files changed behind the library's back


def flip_byte(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def place(location, stack, row, view=0):
    container = Reader(location, allow_incomplete=True).container
    shard, position = divmod(row, container.manifest.slots_per_shard)
    extents = container.slots(stack, shard)
    return location.parent / extents.name, int(extents.offsets[position, view])


def test_a_damaged_byte_is_named(location, sample):
    sample.write(location)
    path, offset = place(location, "late", 6, view=1)
    flip_byte(path, offset + 3)
    found = verify(location)
    assert not found.ok
    assert found.lost_shards == []  # the row alone can be written again
    (damage,) = found.damaged
    assert (damage.stack, damage.row, damage.key, damage.file) == (
        "late",
        6,
        "images/é6.png",
        str(path),
    )
    assert "row 6 (images/é6.png) of stack late" in str(damage)

    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        writer.forget([1])
        assert writer.pending == [range(4, 8)]
        sample.fill(writer)
    assert verify(location).ok


@pytest.mark.parametrize("deletions", [0, 1, 2])
def test_killed_while_forgetting(tmp_path, sample, monkeypatch, deletions):
    """A file without a record would be vouched for: it goes first."""
    location = sample.write(tmp_path / "a.zarr")
    path, offset = place(location, "late", 6)
    flip_byte(path, offset)
    writer, unlink = (
        Writer(location, sample.manifest, sample.labelling, sample.tables),
        type(path).unlink,
    )
    left = [unlink] * deletions

    def killed(path: Path) -> None:
        left.pop()(path)

    monkeypatch.setattr(type(path), "unlink", killed)
    with pytest.raises(IndexError):
        writer.forget([1])
    monkeypatch.undo()
    writer.close()
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        assert writer.pending == []
        assert not verify(location).ok
        writer.forget([1])
        sample.fill(writer)
    with Reader(location) as reader:
        np.testing.assert_array_equal(reader.read([6], stack="late"), sample.values["late"][[6], 0])


def test_a_torn_ledger_record_counts_as_not_done(location, sample):
    sample.write(location)
    place = Reader(location).container.record_place(1)
    flip_byte(location.parent / place.name, place.offset + 40)
    with pytest.raises(CacheIncomplete, match="6 of 10"):
        Reader(location)
    assert {damage.row for damage in verify(location).damaged} == {4, 5, 6, 7}
    sample.write(location)
    assert verify(location).ok


def test_a_record_of_another_shard_counts_as_not_done(location, sample):
    sample.write(location)
    container = Reader(location).container
    container.write_record(0, container.record(1))
    assert inspect(location).rows_done == 6


def test_damaged_table_is_named(location, sample):
    sample.write(location)
    extent = Reader(location).container.table("labellings/0/labels/label")
    flip_byte(location.parent / extent.name, extent.offset)
    with pytest.raises(CacheDamaged, match="labels/label' does not match its checksum"):
        Reader(location).labels()
    assert "labels/label" in str(verify(location).damaged[0])


def test_truncated_hdf5_is_named(tmp_path, sample):
    location = sample.write(tmp_path / "a.h5")
    os.truncate(location, location.stat().st_size - 10)
    with pytest.raises(CacheDamaged, match=r"a\.h5.*truncated"):
        Reader(location)
    (damage,) = verify(location).damaged
    assert damage.file == str(location)


@pytest.mark.parametrize("harm", ["cut", "gone", "index"])
def test_damaged_zarr_shard_is_named_and_repaired(tmp_path, sample, harm):
    location = sample.write(tmp_path / "a.zarr")
    path, _ = place(location, "tokens", 5)
    reader = Reader(location)
    reader.read([4])  # the index is known before the damage
    if harm == "cut":
        os.truncate(path, 300)
    elif harm == "gone":
        path.unlink()
    else:
        flip_byte(path, path.stat().st_size - 40)
    if harm != "index":
        reader.close()
        with pytest.raises(CacheDamaged, match="c/1/0/0/0/0"):
            reader.read([6])
    with pytest.raises(CacheDamaged, match="c/1/0/0/0/0"):
        Reader(location).read([6])
    found = verify(location)
    assert {damage.row for damage in found.damaged} == {4, 5, 6, 7}
    assert {damage.file for damage in found.damaged} == {str(path)}
    with Writer(location, sample.manifest, sample.labelling, sample.tables) as writer:
        writer.forget(found.lost_shards)
        sample.fill(writer)
    assert verify(location).ok


def test_zarr_without_its_metadata(tmp_path, sample):
    location = sample.write(tmp_path / "a.zarr")
    (location / "stacks/late/zarr.json").unlink()
    with pytest.raises(CacheDamaged, match=r"late/zarr\.json is missing"):
        Reader(location)
    shutil.rmtree(location / "stacks")
    assert not verify(location).ok


def test_int8_in_zarr_may_name_the_order_of_its_single_bytes(tmp_path, samples):
    """Some tools write an endianness for one-byte numbers too."""
    sample = samples("int8")
    location = sample.write(tmp_path / "a.zarr")
    path = location / "stacks/late/zarr.json"
    metadata = json.loads(path.read_text())
    sharding = metadata["codecs"][0]["configuration"]
    assert sharding["codecs"] == [{"name": "bytes"}]
    sharding["codecs"] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    path.write_text(json.dumps(metadata))
    with Reader(location) as reader:
        read = reader.read([3], stack="late")
    np.testing.assert_array_equal(read, sample.values["late"][[3], 0])


def test_zarr_with_other_codecs_is_refused(tmp_path, sample):
    location = sample.write(tmp_path / "a.zarr")
    path = location / "stacks/late/zarr.json"
    path.write_text(path.read_text().replace('"little"', '"big"'))
    with pytest.raises(CacheDamaged, match=r"codecs.*rewritten by another tool"):
        Reader(location)
