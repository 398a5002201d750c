"""A spool: a temporary folder of copies, for data sets without random access and remote shards.

TMPDIR chooses the disk. A spool is as large as the data, written at every opening and removed with
the source; a process that is killed leaves it behind.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

from pipeline.sources.source import FileSource


class Spool:
    """A temporary folder that is removed with the object that made it, in the process that did."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sidecache-spool-"))
        self.files = 0
        weakref.finalize(self, _remove, self.folder, os.getpid())

    def new_file(self) -> Path:
        """The path of a file that is not there yet."""
        self.files += 1
        return self.folder / f"{self.files - 1:08d}"


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker inherits this finalizer, but not the folder
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class SpooledSource(FileSource):
    """Copies of the encoded images; a pickled or forked source reads them while the first lives."""

    spool: Spool

    def where(self, index: int) -> str:
        """The row: its copy's name says nothing."""
        return f"{self.description}, row {self.rows[index].key}"
