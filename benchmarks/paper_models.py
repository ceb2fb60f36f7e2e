"""The models that the DeepSpeed-MoE paper serves, as ordinary GPTs and plans, and what a token of them costs.

    served = SERVED["8B+MoE-128"]
    compiled(served)                        # the whole program, on `meta`: its parameter total
    decode_cost(served, Place(world=128))   # one step of the decoder of one rank, as a `Cost`

All layers of a model but the first and the last few are equal, so costs are read off a program with few
layers, and the operations of one pair of them (one dense, one sparse) are repeated (`repeated`). Widths,
layers, ranks of a tensor group: Table 6 of the paper (arXiv 2201.05596), Table 3 of the blog that goes with
it. The paper prints 8B+MoE-128 with 30 layers and 24B+MoE-128 with 40, the blog the other way round; the
totals, 349.0B and 1046.9B, are those of 40 and 30.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

import moec
from examples.gpt import GPT, GPTConfig
from moec.cost import Cost, Operation
from moec.program import Program

VOCABULARY, POSITIONS = 50257, 2048


@dataclass(frozen=True)
class Served:
    """One model. `experts` of a sparse layer, every second one (0: a dense model), `last_two` of the last two
    sparse layers; `residual`: PR-MoE, a dense feed-forward beside the experts; `tensor`: ranks that share a
    dense layer; `total`: billions of parameters that the paper prints."""

    name: str
    layers: int
    width: int
    heads: int
    experts: int = 128
    last_two: int = 128
    residual: bool = False
    tensor: int = 1
    total: str = ""

    @property
    def sparse(self) -> int:
        """Sparse layers: every second one."""
        return self.layers // 2 if self.experts else 0

    def pyramid(self) -> Served:
        """The PR-MoE of the same quality: half the experts, but for the last two layers."""
        name = self.name.replace("MoE", "PR-MoE")
        return replace(self, name=name, experts=self.experts // 2, residual=True, total="")

    def student(self) -> Served:
        """The student of a PR-MoE: 21 layers for every 24."""
        return replace(self, name=f"{self.name}+MoS", layers=self.layers * 21 // 24, total="")


_ALL = (
    Served("350M", 24, 1024, 16, experts=0, total="350M"),
    Served("1.3B", 24, 2048, 16, experts=0, total="1.3B"),
    Served("6.7B", 32, 4096, 32, experts=0, total="6.7B"),
    Served("175B", 96, 12288, 96, experts=0, tensor=16, total="175B"),
    Served("1.3B+MoE-128", 24, 2048, 16, total="52B"),
    Served("2.4B+MoE-128", 16, 3584, 28, total="107.7B"),
    Served("8B+MoE-128", 40, 4096, 32, tensor=4, total="349.0B"),
    Served("24B+MoE-128", 30, 8192, 64, tensor=8, total="1046.9B"),
    Served("47B+MoE-128", 58, 8192, 64, tensor=8, total="2024.0B"),
    # Called 1.5 trillion; with 8192 as its neighbours have, a fifth of 175B are 44 layers.
    Served("35B+MoE-128", 44, 8192, 64, tensor=8, total="1.5T"),
)
SERVED = {model.name: model for model in _ALL}


@dataclass(frozen=True)
class Place:
    """Where a model is served: `world` ranks; experts over `expert` of them, each shared by `slice`;
    `exchange`: `flat`, `hierarchical` or `coordinated`, in nodes of `node` ranks."""

    world: int
    expert: int = 1
    slice: int = 1
    exchange: str = "flat"
    node: int = 8

    @classmethod
    def of(cls, served: Served, world: int, exchange: str = "flat") -> Place:
        """As the paper has it: as many ranks as the largest layer has experts, or all; what is left slices
        experts. A layer with fewer experts has them on as many ranks as it has, several times over."""
        if not served.experts:
            return cls(world)
        expert = min(world, max(served.experts, served.last_two))
        return cls(world, expert, world // expert, exchange)


def dense(served: Served, layers: int) -> GPT:
    """The dense GPT that a model grows from, in half precision, on `meta`."""
    config = GPTConfig(VOCABULARY, POSITIONS, layers, served.width, served.heads, dropout=0.0)
    with torch.device("meta"):
        return GPT(config).half()


def plan_of(served: Served, place: Place | None = None) -> dict[str, Any]:
    """The plan: top-1, every second feed-forward, without drops; the pyramid where there is one."""
    plan: dict[str, Any] = {}
    if served.experts:
        moe: dict[str, Any] = {"layers": "1::2", "experts": served.experts, "top_k": 1, "init": "fresh"}
        moe |= {"residual": "learned" if served.residual else "none", "gate": "probability"}
        if served.last_two != served.experts:
            moe["override"] = [{"layers": "-2:", "experts": served.last_two}]
        plan["moe"] = moe
    if place is not None and place.world > 1:
        plan["parallel"] = _parallel(served, place)
    return plan


def _parallel(served: Served, place: Place) -> dict[str, Any]:
    found: dict[str, Any] = {"data": place.world // served.tensor, "tensor": served.tensor}
    if served.experts:
        found |= {"expert": place.expert, "slice": place.slice, "all_to_all": place.exchange}
        found["node"] = min(place.node, place.world)
    return found


def compiled(served: Served, place: Place | None = None, layers: int | None = None) -> Program:
    """The program, on `meta`; with `layers` it has fewer of them."""
    world = place.world if place else 1
    return moec.compile(dense(served, layers or served.layers), plan_of(served, place), world=world)


def decode_cost(served: Served, place: Place) -> Cost:
    """One step of the decoder of one rank: letters `B` rows, `n` = `m` = 1 new token, `L` positions."""
    few, pairs = shortened(served)
    cost = compiled(served, place, few).cost("decode")
    return repeated(cost, pairs)


def total_parameters(served: Served) -> int:
    """Of the whole model: of compiled programs with 4 and 6 layers, and as many more as it has."""
    few, more = (compiled(served, None, layers).num_parameters() for layers in (4, 6))
    return few + (more - few) * (served.layers - 4) // 2


def shortened(served: Served) -> tuple[int, int]:
    """(layers of a program that has every kind of them, how often its second pair has to stand there)."""
    few = (6 if served.experts == served.last_two else 8) + served.layers % 2
    return few, (served.layers - few) // 2 + 1


@dataclass
class _Copies:
    """Operations as they are written anew: `length` of the window, which begins at `start`."""

    start: int
    length: int
    times: int
    made: list[Operation] = field(default_factory=list)

    def moved(self, index: int, copy: int) -> int:
        """Where the operation `index` is, as seen from a copy of the window (or from behind the last one)."""
        inside = index >= self.start - self.length
        return index + copy * self.length if inside else index


def repeated(cost: Cost, times: int) -> Cost:
    """`cost` with the layers 2 and 3 standing there `times` in all.

    The window begins with the attention of layer 2 and ends before that of layer 4; what it reads of the
    layers before (the residual stream), a copy reads of the copy before.

    Raises `ValueError` where layers 0 and 1 are not what 2 and 3 are, or there are none behind.
    """
    old = cost.operations
    starts = [_first(old, f"attention_{layer}") for layer in (0, 2, 4)]
    length = starts[2] - starts[1]
    window, before = old[starts[1] : starts[2]], old[starts[0] : starts[1]]
    if [one.operator for one in window] != [one.operator for one in before]:
        raise ValueError("layers 0 and 1 have other operations than layers 2 and 3: nothing to repeat")
    copies = _Copies(starts[1], length, times, list(old[: starts[1]]))
    for copy in range(times):
        copies.made += [_moved(one, copies, copy) for one in window]
    copies.made += [_moved(one, copies, times - 1) for one in old[starts[2] :]]
    return replace(cost, operations=tuple(copies.made))


def _first(operations: tuple[Operation, ...], region: str) -> int:
    found = next((i for i, one in enumerate(operations) if one.region == region), None)
    if found is None:
        raise ValueError(f"no operation stands in {region}")
    return found


def _moved(one: Operation, copies: _Copies, copy: int) -> Operation:
    started = None if one.started is None else copies.moved(one.started, copy)
    return replace(one, after=tuple(copies.moved(i, copy) for i in one.after), started=started)
