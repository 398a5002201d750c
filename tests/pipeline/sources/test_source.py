"""What every source does: rows, digests, pickling."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from image_files import encoded, put, says, tar_of, tree, triples

from pipeline.errors import ImageError, SettingError, SourceError
from pipeline.sources.open import open_source
from pipeline.sources.source import FileSource, Row, Source, source_digests


def test_folders_lists_and_tars_are_opened_without_timm(tmp_path: Path) -> None:
    """As where nothing but training goes on, and timm is not installed."""
    tree(tmp_path / "set", "a/1.png")
    put(tmp_path / "list.csv", "path,label\nset/a/1.png,a\n")
    tar_of(tmp_path / "set.tar", {"a/1.png": encoded()})
    code = """
import sys
sys.modules.update(timm=None, torchvision=None)
from pipeline.sources.open import open_source
for name in sys.argv[1:]:
    assert open_source(name).open(0).size == (8, 8)
"""
    names = [str(tmp_path / name) for name in ("set", "list.csv", "set.tar")]
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code, *names], cwd=root).returncode == 0


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return open_source(tree(tmp_path / "set", *(f"c{i % 3}/{i:02d}.png" for i in range(10))))


def test_sources_pickle_and_work_in_forks(source: Source) -> None:
    copy = pickle.loads(pickle.dumps(source))
    assert triples(copy) == triples(source)
    assert copy.open(4).tobytes() == source.open(4).tobytes()
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
        assert pool.submit(source.sha256, 3).result() == source.sha256(3)


def test_opening_twice_gives_the_same_rows(source: Source) -> None:
    again = open_source(source.description.removeprefix("folder "))
    assert triples(again) == triples(source)


def test_digests_are_those_of_the_files(source: Source) -> None:
    assert isinstance(source, FileSource)
    calls: list[tuple[int, int]] = []
    digests = source_digests(
        source, threads=3, report=lambda done, total: calls.append((done, total))
    )
    assert digests.shape == (10, 32)
    assert digests.dtype == np.uint8
    for path, digest in zip(source.paths, digests, strict=True):
        assert bytes(digest) == hashlib.sha256(Path(path).read_bytes()).digest()
    assert calls == [(10, 10)]


def test_digests_of_many_rows_keep_their_order(source: Source) -> None:
    assert isinstance(source, FileSource)
    rows = [Row(key=str(i), split="train") for i in range(300)]
    paths = [source.paths[i % 10] for i in range(300)]
    many = FileSource(rows=rows, description="many", paths=paths)
    assert (source_digests(many) == np.tile(source_digests(source), (30, 1))).all()


def test_digests_of_unreadable_files(source: Source) -> None:
    assert isinstance(source, FileSource)
    Path(source.paths[6]).unlink()
    with pytest.raises(ImageError) as caught:
        source_digests(source)
    says(caught.value, source.paths[6], "no such file", "--on-error skip")
    digests = source_digests(source, on_error="skip")
    assert [row for row in range(10) if not digests[row].any()] == [6]
    with pytest.raises(SettingError, match="'ignore'"):
        source_digests(source, on_error="ignore")


def test_running_out_of_files_is_not_the_images_fault(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(path: Path) -> bytes:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Path, "read_bytes", exhausted)
    with pytest.raises(OSError, match="Too many open files") as caught:
        source.open(0)
    assert not isinstance(caught.value, ImageError)


def test_keys_are_unique_and_utf8() -> None:
    rows = [Row(key="a", split="train")] * 2
    with pytest.raises(SourceError, match="a occurs twice"):
        FileSource(rows=rows, description="x", paths=["a", "a"])
    rows = [Row(key="\udcff.png", split="train")]
    with pytest.raises(SourceError, match="not UTF-8"):
        FileSource(rows=rows, description="x", paths=["a"])


def test_more_splits_than_a_byte_tells_apart_are_refused() -> None:
    """A column of file names that was called `split`, say."""
    rows = [Row(key=str(i), split=f"s{i}") for i in range(257)]
    with pytest.raises(SourceError, match=r"257 splits \(s0, s1, s2 and 254 more\).*at most 256"):
        FileSource(rows=rows, description="x", paths=[row.key for row in rows])
    FileSource(rows=rows[:256], description="x", paths=[row.key for row in rows[:256]])
