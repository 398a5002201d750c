"""Every kind of source, and every message that a faulty one earns."""

from __future__ import annotations

import gc
import hashlib
import io
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache import Target
from pipeline.errors import ImageError, PipelineError, SettingError, SourceError
from pipeline.sources.open import open_source
from pipeline.sources.source import (
    FileSource,
    Row,
    Source,
    decode,
    image_suffixes,
    is_deep_grey,
    open_photo,
    photos,
    source_digests,
)


def encoded(value: int = 0, kind: str = "PNG", mode: str = "RGB", size: int = 8) -> bytes:
    stream = io.BytesIO()
    colour = (value, 255 - value, 7) if mode == "RGB" else value
    Image.new(mode, (size, size), colour).save(stream, kind)
    return stream.getvalue()


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def tree(root: Path, *names: str) -> Path:
    """A small image under every name, each of another colour."""
    for number, name in enumerate(names):
        put(root / name, encoded(number))
    return root


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def fails(images: object, *fragments: str, error: type[Exception] = SourceError, **options) -> None:
    """Opening `images` raises `error`, and its message holds every fragment."""
    with pytest.raises(error) as caught:
        open_source(images, **options)  # type: ignore[arg-type]
    says(caught.value, *fragments)


def says(error: BaseException, *fragments: str) -> None:
    for fragment in fragments:
        assert fragment in str(error), f"{fragment!r} is not in: {error}"


def triples(source: Source) -> list[tuple[str, int, str]]:
    numbers = numbers_of(source)
    return [(row.key, n, row.split) for row, n in zip(source.rows, numbers, strict=True)]


def numbers_of(source: Source) -> list[int]:
    return source.target("label").values.tolist()


# ---- folders


def test_folder_of_class_folders_is_all_train(tmp_path: Path) -> None:
    tree(tmp_path, "dog/b.png", "dog/a.JPG", "cat/deep/er/z.png", "cat/c.png", "dog/.hidden.png")
    put(tmp_path / "dog/notes.txt", "no image")
    put(tmp_path / ".git/x.png", encoded())
    source = open_source(tmp_path)
    assert source.target("label").classes == ("cat", "dog")
    assert source.splits == ("train",)
    assert triples(source) == [
        ("cat/c.png", 0, "train"),
        ("cat/deep/er/z.png", 0, "train"),
        ("dog/a.JPG", 1, "train"),
        ("dog/b.png", 1, "train"),
    ]
    assert source.open(0).getpixel((0, 0)) == (3, 252, 7)
    assert str(tmp_path) in source.description


def test_split_folders_are_named_and_ordered(tmp_path: Path) -> None:
    tree(tmp_path, "Testing/b/1.png", "validation/a/1.png", "train/c/1.png", "train/a/1.png")
    (tmp_path / "documents").mkdir()
    source = open_source(tmp_path)
    assert source.splits == ("train", "val", "test")
    assert source.target("label").classes == ("a", "b", "c")
    assert [row.key for row in source.rows] == [
        "train/a/1.png",
        "train/c/1.png",
        "validation/a/1.png",
        "Testing/b/1.png",
    ]


def test_classes_do_not_depend_on_the_splits_asked_for(tmp_path: Path) -> None:
    tree(tmp_path, "train/a/1.png", "train/b/1.png", "test/b/1.png")
    source = open_source(tmp_path, splits=("test",))
    assert source.target("label").classes == ("a", "b")
    assert triples(source) == [("test/b/1.png", 1, "test")]
    assert open_source(tmp_path, splits=("validation", "train")[1:]).splits == ("train",)


def test_classes_of_another_cache_number_the_folders(tmp_path: Path) -> None:
    tree(tmp_path, "b/1.png", "a/1.png")
    known = ("z", "b", "a")
    source = open_source(tmp_path, classes={"label": known})
    assert source.target("label").classes == known
    assert numbers_of(source) == [2, 1]
    fails(
        tmp_path, str(tmp_path / "b"), "'b'", "2 known classes: a, c", classes={"label": ("a", "c")}
    )


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    tree(tmp_path, "car/1.png", "train/1.png")
    assert open_source(tmp_path).target("label").classes == ("car", "train")


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    tree(tmp_path / "store", "x/1.png")
    (tmp_path / "set/a").mkdir(parents=True)
    (tmp_path / "set/a/linked").symlink_to(tmp_path / "store/x")
    (tmp_path / "set/a/circle").symlink_to(tmp_path / "set")
    assert [row.key for row in open_source(tmp_path / "set").rows] == ["a/linked/1.png"]


def test_folder_errors(tmp_path: Path) -> None:
    empty = tree(tmp_path / "1", "a/1.png", "b/.keep.png")
    fails(empty, str(empty / "b"), "holds no image", "remove it", ".jpg")
    stray = tree(tmp_path / "2", "a/1.png", "s.png")
    fails(stray, "1 images lie outside any class folder: s.png", "CSV")
    flat = tree(tmp_path / "3", "train/1.png", "test/2.png")
    fails(flat, str(flat / "test"), "no class folder")
    mixed = tree(tmp_path / "4", "train/a/1.png", "b/2.png")
    fails(mixed, "train look like splits", "b beside them", "CSV")
    twice = tree(tmp_path / "5", "val/a/1.png", "valid/a/1.png")
    fails(twice, "val and valid", "both mean the split 'val'")
    bare = tmp_path / "6"
    put(bare / "readme.md", "")
    fails(bare, "no images", "folder per class", "there is readme.md")
    split = tree(tmp_path / "7", "train/a/1.png", "val/a/1.png")
    fails(split, "no split test", "there is train, val", splits=("test",))


def test_a_folder_that_may_not_be_listed_is_no_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path, "a/1.png", "a/locked/2.png")
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refusing)
    fails(tmp_path, str(tmp_path / "a/locked"), "cannot be listed: Permission denied")


# ---- CSV


def test_csv_keeps_file_order(tmp_path: Path) -> None:
    tree(tmp_path, "x/2.png", "x/1.png", "y, z.png")
    lines = "split, label,extra,path\nvalidation,dog,,x/2.png\ntrain,cat,,./x/1.png\n\n"
    lines += 'test,dog,,"y, z.png"\n'
    source = open_source(put(tmp_path / "list.csv", "\ufeff" + lines))
    assert source.target("label").classes == ("cat", "dog")
    assert source.splits == ("train", "val", "test")
    assert triples(source) == [
        ("x/2.png", 1, "val"),
        ("x/1.png", 0, "train"),
        ("y, z.png", 1, "test"),
    ]
    assert source.open(0).getpixel((0, 0)) == (0, 255, 7)


def test_csv_without_split_is_train_and_integers_are_numbers(tmp_path: Path) -> None:
    tree(tmp_path, "a.png", "b.png", "c.png")
    path = put(tmp_path / "list.csv", "path,label\na.png,3\nb.png,0\nc.png,-1\n")
    source = open_source(path)
    assert source.target("label").classes == ("0", "1", "2", "3")
    assert numbers_of(source) == [3, 0, -1]
    assert source.splits == ("train",)
    assert numbers_of(open_source(path, classes={"label": tuple("wxyz")})) == [3, 0, -1]
    named = open_source(
        path, classes={"label": ("3", "0")}
    )  # classes that are numbers: by name alone
    assert numbers_of(named) == [0, 1, -1]


def test_csv_splits_filter_rows_but_not_classes(tmp_path: Path) -> None:
    tree(tmp_path, "b.png")
    path = put(tmp_path / "list.csv", "path,label,split\nnone.png,a,train\nb.png,b,fold2\n")
    source = open_source(path, splits=("fold2",))
    assert source.target("label").classes == ("a", "b")
    assert triples(source) == [("b.png", 1, "fold2")]


def test_csv_keys_outside_the_root(tmp_path: Path) -> None:
    tree(tmp_path, "set/a.png", "other/b.png")
    lines = f"path,label\n{tmp_path}/set/a.png,0\n../other/b.png,0\n"
    source = open_source(put(tmp_path / "set/list.csv", lines))
    assert [row.key for row in source.rows] == ["a.png", "../other/b.png"]
    assert source.open(1).size == (8, 8)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("", ("line 1", "path,label", "found nothing")),
        ("path;label\na.png;x\n", ("line 1", "'path'", "commas", "found path;label")),
        ("path,class\na.png,x\n", ("line 1", "'label'", "found path,class")),
        ("path,label\n", ("no images",)),
        ("path,label\na.png,x\n,y\n", ("line 3", "path is empty")),
        ("path,label\na.png,\n", ("line 2", "label is empty")),
        ("path,label,split\na.png,x,\n", ("line 2", "split is empty")),
        ("path,label\na.png,x,y\n", ("line 2", "3 fields, the header has 2", "quote")),
        ("path,label\na.png,x\nb.png,x\n./a.png,y\n", ("line 4", "./a.png", "line 2")),
        ('path,label\n"a.png,x\n', ("line 2", "not a CSV line")),
        (
            "path,label\na.png,x\n1.png,x\n2.png,x\n3.png,x\n4.png,x\n",
            ("4 of 5 files are missing", "1.png (", "line 3", "and 1 more", "relative to"),
        ),
    ],
)
def test_csv_errors(tmp_path: Path, text: str, fragments: tuple[str, ...]) -> None:
    tree(tmp_path, "a.png", "b.png")
    path = put(tmp_path / "list.csv", text)
    fails(path, str(path), *fragments)


def test_csv_of_another_encoding(tmp_path: Path) -> None:
    path = put(tmp_path / "list.csv", "path,label\nä.png,x\n".encode("latin-1"))
    fails(path, str(path), "UTF-8", "save it")


def test_csv_label_unknown_to_the_classes(tmp_path: Path) -> None:
    tree(tmp_path, "a.png", "b.png")
    path = put(tmp_path / "list.csv", "path,label\na.png,cat\nb.png,cow\n")
    fails(
        path,
        f"{path}, line 3",
        "'cow'",
        "2 known classes: cat, dog",
        classes={"label": ("cat", "dog")},
    )
    path = put(tmp_path / "list.csv", "path,label\na.png,1\nb.png,2\n")
    fails(path, "line 3", "'2'", "cat, dog", classes={"label": ("cat", "dog")})


# ---- CSV with several targets

SEVERAL = """path,label:species,labels:marks,value:age,split,note
0.png,cat,tail; ears,3.5,train,x
1.png,dog,-,-1e3,train,
2.png,,ears,,val,y
3.png,cat,,0,test,z
"""


def several(tmp_path: Path, text: str = SEVERAL) -> Path:
    tree(tmp_path, *(f"{number}.png" for number in range(4)))
    return put(tmp_path / "list.csv", text)


def test_csv_with_a_target_of_each_kind(tmp_path: Path) -> None:
    source = open_source(several(tmp_path))
    assert [(t.name, t.kind, t.classes) for t in source.targets] == [
        ("species", "class", ("cat", "dog")),
        ("marks", "multilabel", ("ears", "tail")),
        ("age", "regression", ()),
    ]
    species, marks, age = (target.values for target in source.targets)
    assert (species.dtype, species.tolist()) == (np.int64, [0, 1, -1, 0])
    assert (marks.dtype, marks.tolist()) == (np.int8, [[1, 1], [0, 0], [1, 0], [-1, -1]])
    assert age.dtype == np.float32
    np.testing.assert_array_equal(age, np.array([3.5, -1000, np.nan, 0], np.float32))
    assert source.splits == ("train", "val", "test")
    assert source.target("age") is source.targets[2]
    with pytest.raises(SourceError, match=r"no target 'label'; there is species, marks, age"):
        source.target("label")


def test_csv_targets_of_some_splits_keep_all_classes(tmp_path: Path) -> None:
    source = open_source(several(tmp_path), splits=("val", "test"))
    assert [row.key for row in source.rows] == ["2.png", "3.png"]
    assert source.target("species").classes == ("cat", "dog")
    assert source.target("species").values.tolist() == [-1, 0]
    assert source.target("marks").values.tolist() == [[1, 0], [-1, -1]]
    np.testing.assert_array_equal(source.target("age").values, [np.nan, 0])


def test_csv_targets_are_numbered_by_the_classes_of_another_cache(tmp_path: Path) -> None:
    known = {"species": ("eel", "dog", "cat"), "marks": ("tail", "fins", "ears"), "age": ()}
    source = open_source(several(tmp_path), classes=known)
    assert source.target("species").values.tolist() == [2, 1, -1, 2]
    assert source.target("marks").classes == known["marks"]
    assert source.target("marks").values.tolist()[:3] == [[1, 0, 1], [0, 0, 0], [0, 0, 1]]
    only = open_source(several(tmp_path), classes={"label": ("x",), "marks": known["marks"]})
    assert only.target("species").classes == ("cat", "dog")
    what = {"classes": {"marks": ("tail",)}}
    fails(several(tmp_path), "line 2, labels:marks: the label 'ears'", "1 known class", **what)
    what = {"classes": {"species": ("cat",)}}
    fails(several(tmp_path), "line 3, label:species: the label 'dog'", **what)


def test_csv_numbers_as_labels(tmp_path: Path) -> None:
    lines = "path,labels:marks,label:species\n0.png,2;0,1\n1.png,0,-1\n2.png,-,\n3.png,,0\n"
    source = open_source(several(tmp_path, lines))
    assert source.target("marks").classes == ("0", "1", "2")
    assert source.target("marks").values.tolist() == [[1, 0, 1], [1, 0, 0], [0] * 3, [-1] * 3]
    assert source.target("species").values.tolist() == [1, -1, -1, 0]
    named = open_source(tmp_path / "list.csv", classes={"marks": ("tail", "ears", "fins")})
    assert named.target("marks").values.tolist() == source.target("marks").values.tolist()


def test_a_csv_may_name_its_one_target_label(tmp_path: Path) -> None:
    named = open_source(several(tmp_path, "path,label:label\n0.png,cat\n"))
    plain = open_source(several(tmp_path, "path,label\n0.png,cat\n"))
    assert triples(named) == triples(plain)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("path,label,value:age\n0.png,x,1\n", ("line 1", "'label' beside value:age", "a name too")),
        ("path,value:Age\n0.png,1\n", ("line 1", "'value:Age'", "lower-case", "value:sea_level")),
        ("path,label:\n0.png,1\n", ("line 1", "'label:'", "begins with a letter")),
        ("path,label:a,value:a\n0.png,1,2\n", ("line 1", "two columns for the target 'a'")),
        ("path,values:age\n0.png,1\n", ("line 1", "'values:age'", "value:NAME (a number)")),
        ("path,Label:x\n0.png,1\n", ("line 1", "'Label:x'", "expected label:NAME")),
        ("value:age\n1\n", ("line 1", "'path'", "found value:age")),
        ("path,class\n0.png,1\n", ("line 1", "'label'", "labels:NAME", "found path,class")),
        ("path,value:age\n0.png,1\n1.png,young\n", ("line 3, value:age", "number", "'young'")),
        ("path,value:age\n0.png,nan\n", ("line 2, value:age", "finite", "found 'nan'")),
        ("path,value:age\n0.png,-inf\n", ("line 2, value:age", "finite", "found '-inf'")),
        ("path,value:age\n0.png,1e39\n", ("line 2, value:age", "float32", "found '1e39'")),
        ('path,value:age\n0.png,"1,5"\n', ("line 2, value:age", "such as -1.5", "found '1,5'")),
        ("path,labels:m\n0.png,a;;b\n", ("line 2, labels:m", "separated by `;`", "'a;;b'")),
        ("path,labels:m\n0.png,a;-\n", ("line 2, labels:m", "`-` alone", "'a;-'")),
        ("path,labels:m\n0.png,-1\n", ("line 2, labels:m", "nothing where", "'-1'")),
        ("path,labels:m\n0.png,-\n1.png,\n", ("line 2, labels:m and all after it: no name",)),
        ("path,label:a,value:b\n0.png,x,\n1.png,y,\n", ("line 2 to the end: value:b is empty",)),
        ("path,label:a,split\n0.png,,\n", ("line 2: split is empty",)),
        ("path,label:a,value:b\n", ("no images",)),
    ],
)
def test_csv_target_errors(tmp_path: Path, text: str, fragments: tuple[str, ...]) -> None:
    path = several(tmp_path, text)
    fails(path, str(path), *fragments)


@pytest.mark.parametrize("name", ["a", "sea_level2", "A", "2nd", "", "a-b", "_a", "a b"])
def test_a_column_may_have_the_names_that_a_cache_takes(tmp_path: Path, name: str) -> None:
    try:
        Target(name=name, kind="regression")
    except ValueError:
        fails(several(tmp_path, f"path,value:{name}\n0.png,1\n"), "lower-case letters")
    else:
        assert open_source(several(tmp_path, f"path,value:{name}\n0.png,1\n")).target(name)


# ---- VTAB-1K


def vtab(root: Path, **lists: str) -> Path:
    for name, text in lists.items():
        put(root / f"{name}.txt", text)
        tree(root, *(line.rsplit(" ", 1)[0] for line in text.splitlines() if line))
    return root


def test_vtab_task(tmp_path: Path) -> None:
    root = vtab(
        tmp_path,
        test="images/test/0.png 0\nimages/test/1 b.png 2\n",
        train800="images/1.png 1\nimages/0.png 0\n",
        val200="images/2.png 2\n",
        train800val200="images/0.png 0\nimages/1.png 1\nimages/2.png 2\n",
    )
    source = open_source(root)
    assert source.target("label").classes == ("0", "1", "2")
    assert source.splits == ("train", "val", "test")
    assert triples(source) == [
        ("images/1.png", 1, "train"),
        ("images/0.png", 0, "train"),
        ("images/2.png", 2, "val"),
        ("images/test/0.png", 0, "test"),
        ("images/test/1 b.png", 2, "test"),
    ]
    assert len(open_source(root, splits=("test",)).rows) == 2
    put(root / "classes.txt", "ant\nbee\ncow\n")
    assert open_source(root).target("label").classes == ("ant", "bee", "cow")
    assert triples(open_source(root)) == triples(source)
    put(root / "classes.txt", "ant\nbee\n")
    fails(root, "val200.txt, line 1", "label 2", "classes.txt has 2 names")


def test_vtab_union_may_list_copies(tmp_path: Path) -> None:
    """As NOAH's get_vtab1k.py writes it: a folder of images a list, the union's too."""
    lists = {"train800": "images/train800/0.png 0\nimages/train800/1.png 1\n",
             "val200": "images/val200/0.png 1\n"}  # fmt: skip
    union = "images/train800val200/{}.png {}\n"
    together = "".join(union.format(*line) for line in ((0, 0), (1, 1), (2, 1)))
    root = vtab(tmp_path / "1", **lists, train800val200=together)
    assert [row.split for row in open_source(root).rows] == ["train", "train", "val"]
    root = vtab(tmp_path / "2", **lists, train800val200=together.replace("2.png 1", "2.png 0"))
    fails(root, "train800val200.txt", "not the union", "label 0")


def test_vtab_union_alone_is_train(tmp_path: Path) -> None:
    root = vtab(tmp_path, train800val200="a.png 0\nb.png 1\n", test="c.png 1\n")
    assert [row.split for row in open_source(root).rows] == ["train", "train", "test"]


def test_vtab_errors(tmp_path: Path) -> None:
    lists = {"train800": "a.png 0\n", "val200": "b.png 1\n"}
    root = vtab(tmp_path / "1", **lists, train800val200="a.png 0\nb.png 0\n")
    fails(root, "train800val200.txt", "not the union", "1 lines are here alone", "b.png")
    root = vtab(tmp_path / "2", train800="a.png 0\nb.png\n")
    fails(root, "train800.txt, line 2", "path label", "found b.png")
    root = vtab(tmp_path / "3", train800="a.png 0\nb.png cat\n")
    fails(root, "train800.txt, line 2", "integer", "b.png cat")
    root = vtab(tmp_path / "4", train800="a.png 0\n", test="a.png 0\n")
    fails(root, "test.txt, line 1", "listed already", "train800.txt, line 1")
    root = vtab(tmp_path / "5", **lists)
    (root / "b.png").unlink()
    fails(root, "1 of 2 files are missing: b.png", "val200.txt, line 1")


# ---- anything else


def test_what_is_no_source(tmp_path: Path) -> None:
    fails(tmp_path / "none", "none: nothing there", "folder per class", "hfds/…")
    fails(put(tmp_path / "x.zip", "x"), "x.zip: a file of another kind", ".tar")
    tree(tmp_path, "a/1.png")
    for option in ({"data_dir": "/data"}, {"input_key": "img"}, {"download": True}):
        fails(tmp_path, "--data-dir, --input-key", "timm dataset strings", "leave them", **option)


# ---- what every source does


def test_images_need_neither_torch_nor_timm() -> None:
    code = "import sys, pipeline.sources.open; sys.exit(bool({'torch', 'timm'} & set(sys.modules)))"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


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


# ---- decoding


def noise(kind: str) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def huge_png(side: int) -> bytes:
    """The header of an image of side², a few bytes long."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


FAULTS = {
    "empty": (b"", "the file is empty (0 bytes)"),
    "text": (b"<html>404</html>", "not an image of a kind that Pillow reads (16 bytes)"),
    "cut jpeg": (noise("JPEG")[:1500], "truncated or damaged: OSError"),
    "cut png": (noise("PNG")[:5000], "truncated or damaged: "),
    "cut webp": (noise("WEBP")[:700], "truncated or damaged: "),
    "cut gif": (noise("GIF")[:2000], "truncated or damaged: "),
    "header alone": (noise("PNG")[:20], "truncated or damaged: OSError"),
    "bad checksum": (noise("PNG")[:60] + b"\0\0\0" + noise("PNG")[63:], "truncated or damaged: "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_image_is_named_with_reason_and_advice(tmp_path: Path, fault: str) -> None:
    data, reason = FAULTS[fault]
    tree(tmp_path, "a/0.png")
    path = put(tmp_path / "a/bad.jpg", data)
    source = open_source(tmp_path)
    with pytest.raises(ImageError) as caught:
        source.open(1)
    says(caught.value, str(path), reason, "--on-error skip")
    assert len(source.sha256(1)) == 32
    with pytest.raises(ImageError) as caught:
        open_photo(path)
    says(caught.value, str(path), reason, "Repair or remove")
    assert "--on-error" not in str(caught.value)


@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_counts_at_the_lower_limit() -> None:
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(ImageError, match=r"x\.png: decompression bomb\? 100000000 pixels") as caught,
    ):
        decode(huge_png(10_000), "x.png")
    says(caught.value, f"the limit is {Image.MAX_IMAGE_PIXELS}", "--on-error skip")
    with pytest.raises(ImageError, match=r"decompression bomb\? .*400000000 pixels.* limit of \d+"):
        decode(huge_png(20_000), "x.png")


def test_a_decompression_bomb_where_warnings_are_errors() -> None:
    with pytest.raises(ImageError, match=r"decompression bomb\? .*100000000 pixels"):
        decode(huge_png(10_000), "x.png")


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.png: no such file\. Repair"):
        open_photo(tmp_path / "gone.png")
    with pytest.raises(ImageError, match="cannot be read: Is a directory"):
        open_photo(tmp_path)


def test_image_errors_survive_a_process_border() -> None:
    error = pickle.loads(pickle.dumps(ImageError("x.png: broken")))
    assert isinstance(error, OSError)
    assert isinstance(error, PipelineError)
    assert str(error) == "x.png: broken"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb_as_pillow_converts(mode: str) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16))
    else:
        image = Image.fromarray(pixels).convert("RGBA" if mode == "LA" else mode)
        image = image.convert(mode)
    stream = io.BytesIO()
    image.save(stream, "TIFF" if mode == "CMYK" else "PNG")
    got = decode(stream.getvalue(), "x")
    assert (got.mode, got.size) == ("RGB", (16, 16))
    with Image.open(io.BytesIO(stream.getvalue())) as reference:
        assert reference.mode in (mode, mode.removesuffix(";16"))  # older releases widen it to I
        assert got.tobytes() == reference.convert("RGB").tobytes()


def grey(values: list[int], kind: str, mode: str) -> bytes:
    """One row of pixels."""
    image = Image.new(mode, (len(values), 1))
    for place, value in enumerate(values):
        image.putpixel((place, 0), value)
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


DEEP = [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B"), ("TIFF", "I"), ("PPM", "I")]


@pytest.mark.parametrize(("kind", "mode"), DEEP)
def test_grey_of_16_bits_keeps_its_contrast(kind: str, mode: str) -> None:
    """Both byte orders; white is the top of the smallest usual depth that holds the values."""
    data = grey([0, 1, 128, 257, 32768, 65534, 65535], kind, mode)
    if kind == "TIFF":
        assert data[:2] == (b"MM" if mode == "I;16B" else b"II")
    assert levels(data) == [0, 0, 0, 1, 128, 255, 255]
    assert levels(grey([0, 300, 2048, 4095], kind, mode)) == [0, 19, 128, 255]  # 12 bits
    assert levels(grey([0, 256, 1023], kind, mode)) == [0, 64, 255]  # 10
    assert levels(grey([16383, 4096], kind, mode)) == [255, 64]  # 14
    assert levels(grey([7, 100, 255], kind, mode)) == [7, 100, 255]  # as ever


def levels(data: bytes) -> list[int]:
    got = np.asarray(decode(data, "x"))
    assert (got == got[..., :1]).all()
    return got[0, :, 0].tolist()


@pytest.mark.parametrize(
    ("mode", "values", "reason"),
    [
        ("F", [0.0, 0.5, 1.0], "grey of floating point has no white; save it with 8 or 16 bits"),
        ("I", [0, 65536], "grey from 0 to 65536: expected 0 to 65535; save it"),
        ("I", [-1000, 3000], "grey from -1000 to 3000: expected 0 to 65535; save it"),
    ],
)
def test_grey_without_a_white_is_refused(mode: str, values: list[int], reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode(grey(values, "TIFF", mode), "scan.tif")
    says(caught.value, "scan.tif: ", reason, "--on-error skip")


def test_deep_grey_is_known_by_its_header() -> None:
    for kind, mode in DEEP:
        data = grey([0, 65535], kind, mode)
        assert is_deep_grey(data)
    assert not any(is_deep_grey(encoded(kind=kind)) for kind in ("PNG", "JPEG", "TIFF"))
    assert not any(is_deep_grey(encoded(kind="PNG", mode=mode)) for mode in ("L", "RGBA"))
    assert not any(is_deep_grey(data) for data, _ in FAULTS.values())


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def iptc(inside: bytes) -> bytes:
    """An IPTC file of 10 x 10 grey pixels that holds another file."""

    def field(record: int, number: int, data: bytes) -> bytes:
        return bytes([0x1C, record, number]) + struct.pack(">H", len(data)) + data

    size = [(3, 20, struct.pack(">H", 10)), (3, 30, struct.pack(">H", 10))]
    head = [(3, 60, b"\x01\x00"), *size, (3, 120, b"\x00\x05")]
    return b"".join(field(*part) for part in head) + field(8, 10, inside)


@pytest.mark.parametrize("name", ["cat.jpg", "cat.png", "cat.eps"])
@pytest.mark.parametrize("inside", [False, True])
def test_no_image_starts_another_program(
    name: str, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    monkeypatch.setattr("subprocess.check_call", lambda command, **_: started.append(command))
    data = iptc(EPS) if inside else EPS
    with pytest.raises(ImageError) as caught:
        decode(data, name)
    refused = "the kind EPS, which is refused: for it, Pillow starts Ghostscript"
    says(caught.value, f"{name}: ", "not an image of a kind" if inside else refused, "Repair")
    assert not started


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_palette_with_transparency_keeps_its_colours_and_does_not_warn() -> None:
    stream = io.BytesIO()
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("P")
    image.save(stream, "PNG", transparency=bytes(range(256)))
    got = decode(stream.getvalue(), "x")
    with Image.open(io.BytesIO(stream.getvalue())) as reference:
        assert isinstance(reference.info["transparency"], bytes)
        assert got.tobytes() == reference.convert("RGB").tobytes()


def test_first_frame_of_an_animation_and_no_exif_rotation() -> None:
    stream = io.BytesIO()
    frames = [Image.new("RGB", (4, 6), colour) for colour in ("red", "blue")]
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    assert decode(stream.getvalue(), "x").getpixel((0, 0)) == (255, 0, 0)
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to display
    frames[0].save(stream, "JPEG", exif=exif)
    assert decode(stream.getvalue(), "x").size == (4, 6)


def test_suffixes_are_those_that_pillow_reads() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".bmp", ".gif"} <= image_suffixes()
    assert not {".h5", ".pdf", ".eps", ".mpg", ".txt", ""} & image_suffixes()


# ---- photos


def test_photos_of_files_and_folders(tmp_path: Path) -> None:
    tree(tmp_path, "f/b.png", "f/a.png", "f/sub/c.png", "single.dat")
    put(tmp_path / "f/list.txt", "")
    found = photos([tmp_path / "single.dat", str(tmp_path / "f")])
    assert found == [
        tmp_path / name for name in ("single.dat", "f/a.png", "f/b.png", "f/sub/c.png")
    ]
    assert open_photo(found[0]).mode == "RGB"
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"empty: no image in this folder; looked for \.jpg"):
        photos([tmp_path / "empty"])
    with pytest.raises(SourceError, match=r"no such file or folder: .*no1, .*no2"):
        photos([tmp_path / "no1", tmp_path / "f", tmp_path / "no2"])


# ---- tars


def test_tar_of_class_folders(tmp_path: Path) -> None:
    members = {
        "./set/b10/2.png": encoded(2),
        "./set/b9/1.jpg": encoded(1, "JPEG"),
        "./set/b9/._1.jpg": b"mac",
        "./set/readme.txt": b"text",
    }
    path = tar_of(tmp_path / "set.tar", members)
    source = open_source(path)
    assert source.target("label").classes == ("b9", "b10")  # timm's natural order
    assert sorted(triples(source)) == [("set/b10/2.png", 1, "train"), ("set/b9/1.jpg", 0, "train")]
    for index, row in enumerate(source.rows):
        data = members[f"./{row.key}"]
        assert source.sha256(index) == hashlib.sha256(data).digest()
        assert source.open(index).tobytes() == decode(data, "").tobytes()
    assert triples(pickle.loads(pickle.dumps(source))) == triples(source)
    assert not list(tmp_path.glob("*.pickle"))
    assert open_source(path, classes={"label": ("b10", "c", "b9")}).target("label").classes == (
        "b10",
        "c",
        "b9",
    )
    fails(path, "set/b10/2.png", "'b10'", "known classes: b9", classes={"label": ("b9",)})


def test_tar_with_split_folders_does_not_mix_them(tmp_path: Path) -> None:
    names = ("s/train/a/1.png", "s/train/b/2.png", "s/validation/a/3.png", "s/test/b/4.png")
    path = tar_of(tmp_path / "s.tar", {name: encoded(i) for i, name in enumerate(names)})
    source = open_source(path)
    assert source.splits == ("train", "val", "test")
    assert {row.key: row.split for row in source.rows}["s/validation/a/3.png"] == "val"
    assert [row.key for row in open_source(path, splits=("test",)).rows] == [names[3]]
    fails(path, "no split fold", "train, val, test", splits=("fold",))


def test_tar_of_tars(tmp_path: Path) -> None:
    for name, value in (("ant", 3), ("bee", 4)):
        tar_of(tmp_path / f"{name}.tar", {"1.png": encoded(value)})
    inner = {f"{name}.tar": (tmp_path / f"{name}.tar").read_bytes() for name in ("ant", "bee")}
    source = open_source(tar_of(tmp_path / "all.tar", inner))
    assert triples(source) == [("ant.tar/1.png", 0, "train"), ("bee.tar/1.png", 1, "train")]
    assert source.target("label").classes == ("ant", "bee")
    assert [source.open(i).getpixel((0, 0))[0] for i in (0, 1)] == [3, 4]


def test_tar_errors(tmp_path: Path) -> None:
    fails(put(tmp_path / "x.tar", "no tar at all"), "x.tar", "ReadError")
    fails(tar_of(tmp_path / "n.tar", {"a/x.gif": encoded()}), "n.tar", "looking for .jpg")
    two = {"train/a/1.png": encoded(), "b/2.png": encoded()}
    fails(tar_of(tmp_path / "m.tar", two), "m.tar", "1 do not", "b/2.png", "CSV")
    flat = {"train/1.png": encoded(), "test/2.png": encoded()}
    fails(tar_of(tmp_path / "f.tar", flat), "f.tar", "right in test, train", "per class")
    path = tar_of(tmp_path / "ok.tar", {"a/1.png": noise("PNG"), "a/2.png": b"bad"})
    source = open_source(path)
    with pytest.raises(ImageError) as caught:
        source.open(1)
    says(caught.value, str(path), "member a/2.png", "not an image", "--on-error skip")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ImageError) as caught:
        source.open(0)
    says(caught.value, "member a/1.png", "too early", "--on-error skip")
    path.unlink()
    with pytest.raises(ImageError, match=r"member a/1\.png: .*No such file"):
        source.sha256(0)


# ---- torch/…


def test_torch_image_folder(tmp_path: Path) -> None:
    tree(tmp_path, "train/b/1.png", "train/a/1.png", "validation/a/2.png")
    source = open_source("torch/image_folder", data_dir=str(tmp_path), splits=("train", "val"))
    assert source.target("label").classes == ("a", "b")
    assert triples(source) == [
        ("train/a/1.png", 0, "train"),
        ("train/b/1.png", 1, "train"),
        ("validation/a/2.png", 0, "val"),
    ]
    assert source.open(2).getpixel((0, 0)) == (2, 253, 7)
    one = open_source("torch/image_folder", data_dir=str(tmp_path / "train"))
    assert [row.key for row in one.rows] == ["a/1.png", "b/1.png"]


def test_torch_image_folder_names_the_broken_row(tmp_path: Path) -> None:
    """timm's and torchvision's data sets would give the next image, or no name."""
    path = put(tmp_path / "a/1.png", b"broken")
    tree(tmp_path, "a/2.png")
    with pytest.raises(ImageError, match=re.escape(str(path))):
        open_source("torch/image_folder", data_dir=str(tmp_path)).open(0)


def idx(path: Path, array: np.ndarray) -> None:
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    put(path, head + array.tobytes())


def test_torch_data_set_of_pixels(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST/raw"
    pixels = np.random.default_rng(2).integers(0, 256, (5, 28, 28), np.uint8)
    for part, stop in (("train", 3), ("t10k", 2)):
        idx(raw / f"{part}-images-idx3-ubyte", pixels[:stop])
        idx(raw / f"{part}-labels-idx1-ubyte", np.array([7, 2, 1], np.uint8)[:stop])
    source = open_source("torch/mnist", data_dir=str(tmp_path), splits=("train", "test"))
    assert source.target("label").classes[7] == "7 - seven"
    assert numbers_of(source) == [7, 2, 1, 7, 2]
    assert [row.split for row in source.rows] == ["train"] * 3 + ["test"] * 2
    assert len({row.key for row in source.rows}) == 5
    assert (np.asarray(source.open(4))[..., 1] == pixels[1]).all()
    expected = hashlib.sha256(b"L 28 28\n" + pixels[1].tobytes()).digest()
    assert source.sha256(4) == source.sha256(1) == expected
    copy = pickle.loads(pickle.dumps(source))
    assert copy.open(2).tobytes() == source.open(2).tobytes()
    named = open_source(
        "torch/mnist", data_dir=str(tmp_path), splits=("train=test", "holdout=train")
    )
    assert named.splits == ("train", "holdout")
    assert len([row for row in named.rows if row.split == "train"]) == 2


def test_torch_errors(tmp_path: Path) -> None:
    root = str(tree(tmp_path, "a/1.png"))
    fails("torch/cifar10", "needs a folder", "--data-dir")
    fails("torch/cifar10", "split train", f"--data-dir {root}", "--dataset-download", data_dir=root)
    fails("torch/cifar10", "no columns", "leave out", data_dir=root, target_key="fine")
    fails("torch/cifar10", "train and test alone", data_dir=root, splits=("train", "val"))
    fails("torch/image_folder", "no folder", root, data_dir=root, splits=("train", "test"))
    fails("torch/unknown", "Unknown torchvision dataset", data_dir=root)
    fails("torch/mnist", "have one name", data_dir=root, splits=("val", "validation"))


# ---- optional packages


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("hfds/x", "pip install datasets"),
        ("hfids/x", "pip install datasets"),
        ("wds/x", "pip install webdataset"),
        ("tfds/x", "pip install tensorflow tensorflow-datasets"),
    ],
)
def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    fails(name, name, command)


def wds_shard(path: Path, numbers: range, **extra: bytes) -> dict[str, bytes]:
    members = {}
    for number in numbers:
        members[f"{number:03d}.jpg"] = encoded(number, "JPEG")
        members[f"{number:03d}.cls"] = str(number % 3).encode()
    tar_of(path, members | extra)
    return members


@pytest.mark.filterwarnings("ignore")
def test_wds(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    files = wds_shard(tmp_path / "t-0.tar", range(3)) | wds_shard(tmp_path / "t-1.tar", range(3, 5))
    what = {"splits": ("train=t-{0..1}.tar",), "data_dir": str(tmp_path)}
    source = open_source("wds/any", **what)
    keys = [f"t-{number // 3}.tar/{number:03d}" for number in range(5)]
    assert triples(source) == [(key, i % 3, "train") for i, key in enumerate(keys)]
    assert source.target("label").classes == ("0", "1", "2")
    for number in range(5):
        assert source.sha256(number) == hashlib.sha256(files[f"{number:03d}.jpg"]).digest()
    assert triples(open_source(f"wds/{tmp_path}", splits=what["splits"])) == triples(source)
    pickle.loads(pickle.dumps(source)).open(4)


@pytest.mark.filterwarnings("ignore")
def test_wds_keeps_and_names_broken_rows(tmp_path: Path) -> None:
    """timm's reader drops them with a log line."""
    pytest.importorskip("webdataset")
    broken = {"002.jpg": b"bad", "002.cls": b"1"}
    wds_shard(tmp_path / "s.tar", range(2), **broken)
    source = open_source("wds/any", splits=("train=s.tar",), data_dir=str(tmp_path))
    assert len(source.rows) == 3
    with pytest.raises(ImageError, match=r"wds/any, member s\.tar/002: not an image"):
        source.open(2)


@pytest.mark.filterwarnings("ignore")
def test_wds_labels_in_json(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    members = {"a.jpg": encoded(kind="JPEG"), "a.json": b'{"kind": 1, "colour": 4}'}
    tar_of(tmp_path / "s.tar", members)
    what = {"splits": ("train=s.tar",), "data_dir": str(tmp_path)}
    assert numbers_of(open_source("wds/x", target_key="colour", **what))[0] == 4
    fails("wds/x", "sample a", "'size'", "only kind, colour", target_key="size", **what)
    fails("wds/x", "sample a", "no .cls", "--target-key", **what)
    fails("wds/x", "sample a has no png", "jpg, json", "--input-key", input_key="png", **what)
    fails("wds/x", "split train", "not found", data_dir=str(tmp_path))
    what["splits"] = ("train=none.tar",)
    fails("wds/x", "shard none.tar", "no local file", **what)


@pytest.mark.filterwarnings("ignore")
def test_wds_copies_remote_shards_to_a_spool_that_goes_with_the_source(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    wds_shard(tmp_path / "s.tar", range(2))
    splits = (f"train=pipe:cat {tmp_path}/s.tar",)
    source = open_source("wds/x", splits=splits, data_dir="")
    folder = Path(source.spans[0].file).parent  # type: ignore[attr-defined]
    assert folder.is_dir()
    assert source.open(1).size == (8, 8)
    del source
    gc.collect()
    assert not folder.exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prefix", ["hfds", "hfids"])
def test_hugging_face_data_sets(tmp_path: Path, prefix: str) -> None:
    pytest.importorskip("datasets")
    root = tree(tmp_path / "set", *(f"{s}/{c}/{s}.png" for s in ("train", "test") for c in "ba"))
    name, data_dir = f"{prefix}/{root}", str(tmp_path / "hub")
    source = open_source(name, splits=("train", "test"), data_dir=data_dir)
    assert source.target("label").classes == ("a", "b")
    assert [(label, split) for _, label, split in triples(source)] == [
        (0, "train"),
        (1, "train"),
        (0, "test"),
        (1, "test"),
    ]
    files = [root / name for name in ("train/a/train.png", "train/b/train.png")]
    for index, file in enumerate(files):
        assert source.sha256(index) == hashlib.sha256(file.read_bytes()).digest()
    assert pickle.loads(pickle.dumps(source)).open(3).tobytes() == source.open(3).tobytes()
    fails(name, "split none", "none", splits=("none",), data_dir=data_dir)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prefix", ["hfds", "hfids"])
def test_hugging_face_rows_that_are_broken(tmp_path: Path, prefix: str) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict(
        {
            "photo": [{"bytes": encoded(), "path": None}, {"bytes": b"bad", "path": None}, None],
            "kind": [5, 0, 1],
        }
    )
    (tmp_path / "set").mkdir()
    table.cast_column("photo", datasets.Image(decode=False)).to_parquet(
        tmp_path / "set/train.parquet"
    )
    name = f"{prefix}/{tmp_path}/set"
    source = open_source(name, input_key="photo", target_key="kind", data_dir=str(tmp_path / "hub"))
    assert source.target("label").classes == ("0", "1", "2", "3", "4", "5")
    assert source.open(0).size == (8, 8)
    for index in (1, 2):
        with pytest.raises(ImageError, match=f"row train/0000000{index}: .*--on-error skip"):
            source.open(index)
    fails(name, "label", "--input-key image, --target-key label", data_dir=str(tmp_path / "hub"))


@pytest.mark.filterwarnings("ignore")
def test_tensorflow_data_sets(tmp_path: Path) -> None:
    import pipeline.sources.timm_sets  # noqa: F401  (triton aborts the process if tensorflow came first)

    pytest.importorskip("tensorflow")
    tfds = pytest.importorskip("tensorflow_datasets")
    images = [noise("JPEG"), encoded(3, "JPEG"), b""]

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=["ant", "bee"]),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number, data in enumerate(images[:2]):
                yield number, {"image": io.BytesIO(data), "label": number}

    Tiny(data_dir=tmp_path).download_and_prepare()
    source = open_source("tfds/tiny", data_dir=str(tmp_path))
    assert source.target("label").classes == ("ant", "bee")
    got = {label: source.sha256(index) for index, label in enumerate(numbers_of(source))}
    assert got == {n: hashlib.sha256(images[n]).digest() for n in (0, 1)}
    assert {source.open(0).size, source.open(1).size} == {(64, 64), (8, 8)}
    again = open_source("tfds/tiny", data_dir=str(tmp_path))
    assert triples(again) == triples(source)
    fails("tfds/none", "tfds/none, split train", data_dir=str(tmp_path))


def test_a_spool_outlives_its_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.sources.timm_sets import Spool, _remove

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spool = Spool()
    path = put(spool.new_file(), "x")
    copy = pickle.loads(pickle.dumps(spool))
    del copy
    gc.collect()
    assert path.is_file()
    _remove(spool.folder, os.getpid() + 1)  # as in a forked worker
    assert path.is_file()
    del spool
    gc.collect()
    assert not list(tmp_path.iterdir())
