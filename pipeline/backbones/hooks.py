"""Taps by forward hooks on a model's own run of blocks: no forward pass is copied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from pipeline.backbones.contract import Sink
from pipeline.side.tap import tap_names


class BlockHooks:
    """Hooks on L blocks, for ever; they say something only while a sink listens.

    names: of the L + 1 taps, in order.
    wanted: those that a sink hears of.
    """

    def __init__(self, blocks: Sequence[nn.Module], series: str = "z") -> None:
        self.names = tap_names(range(len(blocks) + 1), series)
        self.wanted = set(self.names)
        self._sink: Sink | None = None
        blocks[0].register_forward_pre_hook(self._enter, with_kwargs=True)
        for name, block in zip(self.names[1:], blocks, strict=True):
            block.register_forward_hook(lambda _m, _i, out, name=name: self._leave(name, out))

    @contextmanager
    def listening(self, sink: Sink) -> Iterator[None]:
        """While it is open, `sink` hears each wanted tap as it is computed, as the blocks have it:
        (B, T, D), or a map."""
        self._sink = sink
        try:
            yield
        finally:
            self._sink = None

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._leave(self.names[0], args[0] if args else kwargs["x"])

    def _leave(self, name: str, out: Any) -> None:
        if self._sink is not None and name in self.wanted:
            self._sink(name, out[0] if isinstance(out, tuple) else out)
