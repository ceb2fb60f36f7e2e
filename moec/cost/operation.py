"""`Operation`: one operator of a program, with what it costs one rank."""

from __future__ import annotations

from dataclasses import dataclass

from moec.runtime.ops.work import NOTHING, Amount, Work


@dataclass(frozen=True)
class Sending:
    """What an operator sends along `axis`, named as `moec.runtime.traffic` names it.

    `bytes`: what this rank sends to others (its own part is not counted); `messages` likewise; in so many
    `calls`.
    """

    axis: str
    operator: str
    messages: Amount
    bytes: Amount
    calls: Amount = 1


@dataclass(frozen=True)
class Operation:
    """One operator of one rank.

    `name`: `attention_0.qkv`; `region`: what it stands in (`attention_0`, empty at the root); `layer`: the
    number of that, None outside of layers; `operator`: `aten::linear`; `kind`: one of `KINDS`;
    `dtype`: what it computes in (`bfloat16`).
    `sends`, `sends_back`: forward and backward. `saved`: bytes kept for backward that no other operator
    keeps; `again`: those kept from a second computation of its region, right before the gradient. `weights`:
    bytes of parameters among what is read. `after`: the operations whose results it reads, by their index in
    `Cost.operations`. `started`: for the end of a collective, the index of its beginning.
    """

    name: str
    region: str
    layer: int | None
    operator: str
    kind: str
    dtype: str
    forward: Work = NOTHING
    backward: Work = NOTHING
    sends: tuple[Sending, ...] = ()
    sends_back: tuple[Sending, ...] = ()
    saved: Amount = 0
    weights: Amount = 0
    after: tuple[int, ...] = ()
    started: int | None = None
    again: Amount = 0


KINDS = (
    "product",  # a matrix product of the dense part
    "attention",
    "experts",  # the products of the experts
    "routing",  # choosing experts, moving rows
    "norm",
    "pointwise",
    "embedding",
    "memory",  # copies: cat, index, a cache written
    "collective",
    "view",  # nothing happens
    "loss",
    "optimizer",
)
