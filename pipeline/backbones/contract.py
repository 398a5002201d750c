"""What any backbone gives: the tokens of its taps, and what a cache says of them.

A family of models is one file beside this one, the only file that imports the library they come
from (`timm_models`). It builds a model, loads its weights, freezes it, and says how the opened rows
of a source become what the model takes; everybody else knows `Backbone` alone.

Taps of a run of L blocks: z0, the tokens as they enter the first block, and z1 … zL, the raw output
of each block, before any final norm. A decoder beside an encoder has y0 … yL.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.side.contract import TokenShape
from pipeline.sources.batches import ImageBatch, Images

Sink = Callable[[str, Tensor], None]  # hears a tap's name and its tokens (B, T, D)


class Preprocessing(Protocol):
    """How an opened row becomes what the model takes; a frozen dataclass of plain values."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: part of the cache's fingerprint, and enough to do the same again."""


@dataclass(frozen=True, kw_only=True)
class FinalNorm:
    """The backbone's own final norm as constants; weight and bias (D,) float32 or None.

    kind: `layer`, `rms`, or `none`, then of eps 0.
    """

    kind: str
    eps: float
    weight: Tensor | None
    bias: Tensor | None


class Backbone(ABC):
    """A frozen model in evaluation mode on one device.

    name: as `extract --model` takes it, with what tells its weights from others of its kind.
    model: the module itself, which pruning reads.
    blocks: how many there are, L.
    taps: each tap's shape, in order; where rows are of unequal length, that of the longest.
    prefix_tokens: how many tokens of each tap, the first ones, are class or register tokens.
    prepare: one opened row → what the model takes, without the axis of the batch; on the CPU, and
        to be pickled: it works in other processes.
    block_descriptions: what each block is, in plain JSON (`blocks.describe`), for LST.
    weights_sha256: of all weights, the same from whatever file they came.
    """

    name: str
    model: nn.Module
    device: torch.device
    blocks: int
    taps: dict[str, TokenShape]
    prefix_tokens: int
    preprocessing: Preprocessing
    prepare: Callable[[Any], Tensor]
    final_norm: FinalNorm
    block_descriptions: tuple[dict[str, Any], ...]
    weights_sha256: str

    @abstractmethod
    def keep(self, taps: Sequence[str]) -> None:
        """Read only these taps from now on, and compute no deeper than they lie if that can be."""

    @abstractmethod
    def batches(
        self,
        rows: Images,
        *,
        pending: Sequence[range],
        batch_size: int,
        starts: Sequence[int] = (0,),
        workers: int,
        pin_memory: bool = False,
    ) -> Iterator[ImageBatch]:
        """Rows as `read_taps` takes them: every batch that holds a pending row, in order, opened
        and prepared by so many worker processes (0: by this one).

        Batches are a fixed partition of the rows, which begins anew at each of `starts`: the same
        rows always meet in one batch. A row that cannot be opened is blank, and its batch says why.
        """

    @abstractmethod
    def read_taps(self, inputs: Tensor, sink: Sink, *, precision: torch.dtype) -> None:
        """Run B inputs, on any device, through the blocks: `sink(name, tokens (B, T, D))` for each
        tap that is kept, as it is computed.

        `precision` float32 computes as it is; another type means autocast to it.
        """

    def lengths(self, inputs: Tensor) -> Tensor | None:
        """How many tokens of each row count, int64 (B,): the first ones, the rest is zeros in every
        tap. None where all count, as those of images do."""
        return None

    def identity(self) -> dict[str, Any]:
        """What tells these features from another backbone's: part of the cache's fingerprint."""
        return {"name": self.name, "weights_sha256": self.weights_sha256}
