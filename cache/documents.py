"""JSON documents: one text per value, private copies, and where two differ."""

import json
from collections.abc import Mapping
from typing import Any

ABSENT = "(absent)"


def canonical_json(value: object) -> str:
    """One ASCII text per value: keys sorted, no spaces, NaN refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def plain_json(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """A private copy with tuples turned to lists, so that equality survives a round trip.

    Raises ValueError, calling the value `name`.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a JSON object, received {type(value).__name__}")
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be nested JSON values: {error}") from error


def differences(a: object, b: object, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """List `(dotted field, value in a, value in b)` where two nested JSON values differ.

    Objects are compared field by field, anything else as a whole. A field that one side lacks
    shows as "(absent)".
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        found = []
        for key in sorted({*a, *b}):
            dotted = f"{prefix}.{key}" if prefix else str(key)
            found += differences(a.get(key, ABSENT), b.get(key, ABSENT), dotted)
        return found
    return [] if a == b else [(prefix, a, b)]
