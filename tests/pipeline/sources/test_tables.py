"""CSV and TSV: rows, splits, targets of each kind, lists without files, and every message."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from image_files import fails, numbers_of, put, says, tree, triples

from cache import Target
from pipeline.errors import SourceError
from pipeline.sources.open import open_source
from pipeline.sources.tables import read_table


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


# ---- lists whose files are not opened


def test_a_table_is_read_without_its_files(tmp_path: Path) -> None:
    table = read_table(put(tmp_path / "list.csv", SEVERAL.replace("0.png", "./x/../0.png")))
    assert table.keys == ("0.png", "1.png", "2.png", "3.png")
    assert table.names[0] == "./x/../0.png"
    assert table.splits == ("train", "train", "val", "test")
    assert table.places[2] == f"{tmp_path / 'list.csv'}, line 4"
    assert dict(table.others) == {"note": ("x", "", "y", "z")}
    source = open_source(several(tmp_path))
    for target, same in zip(table.targets, source.targets, strict=True):
        assert (target.name, target.kind, target.classes) == (same.name, same.kind, same.classes)
        np.testing.assert_array_equal(target.values, same.values)


def test_rows_may_be_named_by_their_keys(tmp_path: Path) -> None:
    text = "key,path,group,group2\nset/a/1.png,x,p1,\nset/a/2.png,x,p2,\n../b.png,x,p1,\n"
    table = read_table(put(tmp_path / "list.csv", text))
    assert table.keys == ("set/a/1.png", "set/a/2.png", "../b.png")
    assert table.splits is None and table.targets == ()
    assert table.column("group") == ("p1", "p2", "p1")
    assert table.column("path") == ("x", "x", "x")
    with pytest.raises(SourceError) as caught:
        table.column("patient")
    says(caught.value, "list.csv", "one column 'patient'", "there is path, group, group2")


def test_paths_of_a_table_are_keys_of_a_cache(tmp_path: Path) -> None:
    text = f"path,value:age\n{tmp_path}/a.png,1\n../b.png,2\nc/./d.png,3\n/e.png,4\n"
    table = read_table(put(tmp_path / "list.csv", text))
    assert table.keys == ("a.png", "../b.png", "c/d.png", "/e.png")


def test_labels_of_a_table_are_numbered_by_the_classes_of_a_cache(tmp_path: Path) -> None:
    path = put(tmp_path / "list.csv", "key,label\na,dog\nb,-1\nc,2\n")
    table = read_table(path, classes={"label": ("cat", "dog", "eel")})
    assert table.targets[0].classes == ("cat", "dog", "eel")
    assert table.targets[0].values.tolist() == [1, -1, 2]
    with pytest.raises(SourceError) as caught:
        read_table(path, classes={"label": ("cat", "dog")})
    says(caught.value, "line 4: the label '2'", "2 known classes: cat, dog")


def test_fields_of_a_tsv_are_separated_by_tabs(tmp_path: Path) -> None:
    tree(tmp_path, "a, b.png", "c.png")
    path = put(tmp_path / "list.TSV", "path\tlabel\tsplit\na, b.png\tx\ttest\nc.png\ty\tval\n")
    assert triples(open_source(path)) == [("a, b.png", 0, "test"), ("c.png", 1, "val")]
    assert read_table(path).splits == ("test", "val")
    put(path, "path,label\n")
    fails(path, "line 1", "separated by tabs", "found path,label")
    put(path, "path\tlabel\na.png\tx\ty\n")
    fails(path, "line 2", "3 fields", "holds a tab")


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("", ("line 1", "one column 'path' or 'key'", "found nothing")),
        ("name,label\na,x\n", ("line 1", "'path' or 'key'", "found name,label")),
        ("path,path\na,x\n", ("line 1", "'path' or 'key'", "found path,path")),
        ("key,key\na,x\n", ("line 1", "one column 'key'", "found key,key")),
        ("key,label,label\na,x,y\n", ("line 1", "one column 'label'")),
        ("key,split,split\na,x,y\n", ("line 1", "one column 'split'")),
        ("key,label\na,x\n,y\n", ("line 3: key is empty",)),
        ("key,split\na,\n", ("line 2: split is empty",)),
        ("key,label\na,x\nb,x\na,y\n", ("line 4: a is listed already", "line 2; keep one")),
        ("path,label\na/b,x\na/./b,y\n", ("line 3: a/./b is listed already", "line 2")),
        ("key,value:age\na,1\nb,old\n", ("line 3, value:age: expected a finite number",)),
        ("key,label:a,value:b\na,x,\n", ("line 2 to the end: value:b is empty",)),
        ('key,label\n"a,x\n', ("line 2: not a CSV line",)),
    ],
)
def test_errors_of_a_table(tmp_path: Path, text: str, fragments: tuple[str, ...]) -> None:
    path = put(tmp_path / "list.csv", text)
    with pytest.raises(SourceError) as caught:
        read_table(path)
    says(caught.value, str(path), *fragments)


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none\.csv: cannot be read: No such file"):
        read_table(tmp_path / "none.csv")


def test_a_table_read_for_its_files_needs_paths(tmp_path: Path) -> None:
    fails(put(tmp_path / "list.csv", "key,label\na,x\n"), "line 1", "one column 'path'")
    fails(put(tmp_path / "list.csv", "path,split\na,x\n"), "line 1", "one column 'label'")
