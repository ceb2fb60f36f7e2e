"""What the trainer asks of the thing it trains.

The runtime stands below the roof, where `moec.Program` lives, so it knows programs by this protocol alone.
Any `nn.Module` that has these methods can be trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NotRequired, Protocol, TypedDict, runtime_checkable

import torch
from torch import Tensor, nn

from moec.ir.placement import Layout, Placement, Split
from moec.plan import LayerSettings
from moec.runtime.distillation.lesson import Lesson


class LossTerms(TypedDict):
    """One loss, taken apart. Scalars are fp32 `[]`; `balance` and `z` are weighted already.

    `loss` is the total and the only term with a gradient that matters. `counts` holds, for each expert layer,
    the rows each expert computed, i64 `[E]`. A dense program leaves `balance`, `z` and `counts` out. With a
    teacher there are `kl` and, where hidden states are compared, `hidden`: not weighted yet.
    """

    loss: Tensor
    task: Tensor
    balance: NotRequired[Tensor]
    z: NotRequired[Tensor]
    counts: NotRequired[Mapping[str, Tensor]]
    kl: NotRequired[Tensor]
    hidden: NotRequired[Tensor]


class Trainable(Protocol):
    """A decoder with a loss. All names of layers are those of `LossTerms.counts`."""

    @property
    def training(self) -> bool:
        """Whether dropout and routing noise are on."""
        ...

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits `[B, S, V]` for tokens i64 `[B, S]`."""
        ...

    def run(self, tokens: Tensor) -> tuple[Tensor, Mapping[str, Any]]:
        """Logits, those of this rank's words where the vocabulary is dealt out, and the layers' terms."""
        ...

    def loss_terms(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        lesson: Lesson | None = None,
    ) -> LossTerms:
        """The loss of predicting `targets` (i64 `[B, S]`, one further than `tokens`), and of what the teacher
        says of `tokens`."""
        ...

    def expert_parameter_names(self) -> set[str]:
        """The parameters, by the names of `named_parameters`, whose first dim is the expert."""
        ...

    def moe_settings(self) -> Mapping[str, LayerSettings]:
        """The settings of each expert layer; empty for a dense program."""
        ...

    def moe_biases(self) -> Mapping[str, Tensor]:
        """The selection biases `[E]` that the trainer nudges in place, of the layers balanced that way."""
        ...

    def fingerprint(self) -> str:
        """A digest of the structure, weights excluded: equal digests can load each other's weights."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter once, by name."""
        ...

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Every buffer once, by name."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Switch dropout and routing noise on or off."""
        ...


@runtime_checkable
class LocalTrainable(Protocol):
    """What a `Trainable` has besides when it is the part of a program that one rank of a job holds.

    Its `loss_terms` are the rank's share: summed over all ranks, a scalar is that of the whole program on the
    whole batch. Its `counts` are totals, equal on every rank. Its fingerprint is the same on every rank.
    """

    rank: int
    layout: Layout

    @property
    def words(self) -> Split | None:
        """How the words of the logits that `run` gives are dealt out to ranks; None: whole on each."""
        ...

    def placements(self) -> Mapping[str, Placement]:
        """Where each parameter lies, by the names of `named_parameters`; one that is missing is whole."""
        ...

    def whole_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The whole shape of each parameter, by the same names."""
        ...


@runtime_checkable
class Tappable(Protocol):
    """What a `Trainable` has besides when its hidden states can be heard."""

    def tapped(self, layers: Iterable[int]) -> Trainable:
        """The same over the same weights, in the same mode; the terms of its `run` hold `"hidden"` too: by
        layer, what leaves it, `[B, S, D]`."""
        ...


def device_of(program: Trainable) -> torch.device:
    """Where the weights of `program` lie; one process trains on one device."""
    return next(parameter for _, parameter in program.named_parameters()).device


@contextmanager
def in_mode(program: Trainable, training: bool) -> Iterator[None]:
    """`program` in train or eval mode inside, and in the mode it was in afterwards."""
    before = program.training
    program.train(training)
    try:
        yield
    finally:
        program.train(before)
