"""What experts, routers and ranks did in a step that is logged.

An `Observer` is made for one step. It listens (`ops/overhear.py`, `axis_traffic.py`) and changes nothing: an
observed step is the same to the bit. What it costs is a softmax over the scores of each layer, and, on
several ranks, one sum of a few numbers when the step is over. Steps that are not logged cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from moec.runtime.axis_traffic import counted_axes
from moec.runtime.ops.overhear import overheard
from moec.runtime.ops.sent import Sent
from moec.runtime.ranks import Ranks
from moec.runtime.trainable import Trainable


@dataclass(frozen=True)
class Sending:
    """What all ranks of a job together sent to each other along an axis."""

    messages: int
    bytes: int


@dataclass(frozen=True)
class Observed:
    """One step of the whole job, all ranks and all parts of the batch together.

    `counts`: the rows that each expert of a layer computed. `router_entropy`: how undecided the router of a
    layer was, in nats: the mean over tokens of the entropy of the distribution that its gate makes of the
    scores (0: sure of one expert, log E: no opinion); empty for a program whose layers do not choose by the
    operators of moec, once a layer. `traffic`: by mesh axis, the optimizer's and the trainer's among it; axes
    along which nothing went are left out.
    """

    step: int
    counts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    router_entropy: Mapping[str, float] = field(default_factory=dict)
    traffic: Mapping[str, Sending] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether there was nothing to see: a dense program in one process."""
        return not (self.counts or self.router_entropy or self.traffic)


class Observer:
    """Observes one step of `program`; every rank of its job has one, or none has."""

    def __init__(self, program: Trainable, ranks: Ranks) -> None:
        self._ranks, self._layers = ranks, tuple(program.moe_settings())
        self._entropy: dict[str, Tensor] = {}  # summed over this rank's tokens
        self._tokens: dict[str, int] = {}
        self._sent: dict[str, Sent] = {}

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count what is sent inside."""
        axes = [axis for axis, size in self._ranks.mesh.axes().items() if size > 1]
        with counted_axes(axes) as sent:
            yield
        self._sent = sent

    @contextmanager
    def part(self) -> Iterator[None]:
        """Hear the routers inside, where the program runs once."""
        heard: list[tuple[Tensor, int]] = []
        with overheard(lambda scores, gate: heard.append((entropy_sum(scores, gate), len(scores)))):
            yield
        if len(heard) == len(self._layers):
            for layer, (entropy, tokens) in zip(self._layers, heard, strict=True):
                self._entropy[layer] = self._entropy[layer] + entropy if layer in self._entropy else entropy
                self._tokens[layer] = self._tokens.get(layer, 0) + tokens

    def observed(self, step: int, counts: Mapping[str, Tensor]) -> Observed:
        """What was seen, once the step is over; every rank calls it. `counts`: those of the job."""
        sums = self._sums()
        entropy = {name: sums[f"{name} entropy"] / sums[f"{name} tokens"] for name in self._entropy}
        traffic = {
            axis: Sending(round(sums[f"{axis} messages"]), round(sums[f"{axis} bytes"]))
            for axis in self._sent
            if sums[f"{axis} messages"]
        }
        rows = {layer: tuple(row.tolist()) for layer, row in counts.items()}
        return Observed(step, rows, entropy, traffic)

    def _sums(self) -> dict[str, float]:
        """Every number, summed over the ranks and brought to the host at once."""
        numbers: dict[str, Tensor] = {}
        for layer, entropy in self._entropy.items():
            tokens = torch.tensor(self._tokens[layer], device=entropy.device)
            numbers |= {f"{layer} entropy": entropy, f"{layer} tokens": tokens}
        for axis, sent in self._sent.items():
            told = torch.tensor([sent.messages, sent.bytes], dtype=torch.float64, device=self._ranks.device)
            numbers |= {f"{axis} messages": told[0], f"{axis} bytes": told[1]}
        if not numbers:
            return {}
        summed = self._ranks.sums(numbers)
        together = torch.stack([value.double() for value in summed.values()])
        return dict(zip(summed, together.tolist(), strict=True))


@torch.no_grad()
def entropy_sum(scores: Tensor, gate: str) -> Tensor:
    """The entropies, in nats, of what `gate` makes of each row of `scores` [T, E], summed over tokens: f64
    `[]`.

    That is softmax(scores), or for the gate `sigmoid` each sigmoid over the sum of them.
    """
    share_TE = (F.logsigmoid(scores) if gate == "sigmoid" else scores).softmax(-1)
    return torch.special.entr(share_TE).sum(dtype=torch.float64)
