"""VTAB-1K task folders."""

from __future__ import annotations

from pathlib import Path

from image_files import fails, put, tree, triples

from pipeline.sources.open import open_source


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
