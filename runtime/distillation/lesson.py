"""What a teacher says of some tokens.

Legend: B batch, S sequence, V words (those of this rank where the vocabulary is dealt out), K likeliest
words, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from moec.errors import TrainError
from moec.plan import Distill


@dataclass(frozen=True)
class TopWords:
    """The teacher's likeliest words, i64 `[B, S, K]`, and the logarithms of their shares, f32 `[B, S, K]`.

    Shares are those of softmax(logits / temperature) over the whole vocabulary; what is missing to one is the
    share of all other words together. On several ranks words are numbered as in the whole vocabulary, and
    every rank of a tensor group holds all of them.
    """

    words: Tensor
    log_shares: Tensor


@dataclass(frozen=True)
class Lesson:
    """What a teacher says of the tokens that this rank's student sees; nothing in it has a gradient.

    `told`: the teacher's logits `[B, S, V]`, which lie on ranks as the student's own do, or its likeliest
    words. `hidden`: the teacher's hidden states `[B, S, D]`, by the student's layer that is to have them.
    `distill` says how much they count, and how they are compared.
    """

    told: Tensor | TopWords
    distill: Distill
    hidden: Mapping[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.distill.hidden and not self.hidden:
            found = f"hidden = {self.distill.hidden}, and a teacher that gives no hidden states"
            raise TrainError("lesson", found, "one that gives them, or hidden = 0")
