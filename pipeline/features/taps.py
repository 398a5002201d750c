"""Which taps are asked for: to keep, to read, or to sum up. Errors name what there is."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence

from pipeline.config import CopyConfig, ExtractConfig
from pipeline.errors import SettingError
from pipeline.side.gather import Gather, found_among
from pipeline.side.tap import select, tap_depths, tap_names


def parse_taps(text: str, blocks: int) -> tuple[str, ...]:
    """`all`, `0,3,6`, `every:2` (counted back from the last) or `last:4` → names in order.

    Raises SettingError naming the grammar and the taps that a backbone with `blocks` has.
    """
    try:
        found = select(re.sub(r"\bz(?=\d)", "", text), blocks + 1)
    except ValueError:
        raise SettingError(
            f"--taps {text!r}: expected all, a list such as 0,3,6, every:N or last:N"
        ) from None
    unknown = tap_names(depth for depth in found if depth > blocks)
    if unknown:
        raise SettingError(
            f"--taps {text!r}: no tap {', '.join(unknown)}; this backbone has z0 … z{blocks}"
        )
    return tap_names(depth for depth in found if depth >= 0)


def choose_taps(text: str, available: Sequence[str]) -> tuple[str, ...]:
    """The same grammar over the taps of a cache: `all` is all of them, sums included.

    Raises SettingError naming those there are.
    """
    if text == "all":
        return tuple(available)
    own = tap_depths(available)
    chosen = parse_taps(text, max(own, default=0))
    lacking = [tap for tap in chosen if tap not in available]
    if lacking:
        raise SettingError(
            f"--taps {text!r}: the cache has no {', '.join(lacking)}; it has {', '.join(available)}"
        )
    return chosen


def choose_gather(
    config: ExtractConfig | CopyConfig, shapes: Mapping[str, Hashable], whose: str
) -> Gather | None:
    """The sums that `config` asks of taps with these shapes; None if it asks for none.

    Raises SettingError naming what `whose` (a backbone or a cache) lacks.
    """
    if config.gather == "none":
        return None
    if found_among(tuple(shapes)):
        raise SettingError(f"--gather: {whose} holds sums already ({', '.join(shapes)})")
    deepest = max(tap_depths(shapes)) if config.gather_k is None else config.gather_k
    try:
        gather = Gather(
            k=deepest,
            groups=config.gather_groups,
            normed=config.gather == "normsum",
            pooled=config.gather_pooled,
        )
    except ValueError as error:
        raise SettingError(f"--gather: {error}") from None
    lacking = [tap for taps in gather.sums.values() for tap in taps if tap not in shapes]
    if lacking:
        raise SettingError(
            f"--gather: the sum of z0 … z{deepest} needs {', '.join(lacking)}, which {whose} "
            f"lacks; it has {', '.join(shapes)}"
        )
    different = len(set(shapes.values()))
    if different > 1:
        raise SettingError(
            f"--gather {config.gather}: a sum over taps is defined where all have one shape; "
            f"those of {whose} have {different}"
        )
    return gather
