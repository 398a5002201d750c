"""The texts of a run's files: strict JSON, YAML, and lines of JSON that a crash may have cut.

JSON never holds NaN: Python would write it, and no other reader takes it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def json_text(values: Mapping[str, Any]) -> str:
    """A JSON file."""
    return json.dumps(values, indent=1, allow_nan=False) + "\n"


def json_line(record: Mapping[str, Any]) -> str:
    """One line of a .jsonl file."""
    return json.dumps(record, allow_nan=False) + "\n"


def yaml_text(values: Mapping[str, Any]) -> str:
    """A YAML file, in the order of `values`."""
    return yaml.safe_dump(dict(values), sort_keys=False)


def read_document(path: Path) -> dict[str, Any]:
    """What a YAML or JSON file says; {} if it is not there, or is no document of ours."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of lines. What a crash has cut is none; earlier versions wrote NaN,
    which is no JSON: None."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line, parse_constant=lambda _: None))
    return records
