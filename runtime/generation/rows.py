"""One text on its way: what it was asked for, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from moec.runtime.generation.sampling import Draws, Sampling
from moec.runtime.generation.stops import Stop

Ended: TypeAlias = Literal["stop", "length", "cancelled"]


class Event(NamedTuple):
    """A token that was written. `id`: of the row; `ended`: why this was its last, None when it was not."""

    id: int
    token: int
    ended: Ended | None = None


@dataclass(slots=True)
class Row:
    """`context`: the tokens to be read before the next one is written; `past`: how many of them, from the
    left, are in the cache. `new`: all tokens written. `seen`: bool `[V]`, the tokens that have stood in the
    row, for a repetition penalty; None without one."""

    id: int
    context: list[int]
    most: int
    sampling: Sampling
    stop: Stop
    draws: Draws
    seen: Tensor | None = None
    past: int = 0
    new: list[int] = field(default_factory=list)

    def mark_seen(self, vocabulary: int, device: torch.device) -> None:
        """Begin to keep what was seen, when the row has a repetition penalty."""
        if self.sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            self.seen[torch.tensor(self.context, device=device)] = True

    def write(self, token: int) -> Event:
        """Append the token that was chosen; the event says whether the row has ended."""
        self.context.append(token)
        self.new.append(token)
        if self.seen is not None:
            self.seen[token] = True
        if self.stop.reached(self.new):
            return Event(self.id, token, "stop")
        return Event(self.id, token, "length" if len(self.new) == self.most else None)

    def cut(self, keep: int) -> None:
        """Forget all but the last `keep` tokens, and read those again from position 0."""
        self.context, self.past = self.context[-keep:], 0
