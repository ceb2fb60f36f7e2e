"""The paper's own system, priced: moec's decoder with the operators that DeepSpeed-MoE runs in its place.

Two things are changed in the cost of moec's decoder (`paper_models.decode_cost`), and nothing is fitted:

* Every operator of moec's graph stands for one kernel, one after the other, and views for nothing: a dense
  layer has twelve, about as many as DeepSpeed-Inference starts (norm, qkv, two for the cache, attention, out,
  sum, norm, up, activation, down, sum).
* An expert layer is the published one (section 5.3 and 5.4, and the public `DeepSpeedMoEInference`): a gate
  in two kernels; all slots of all experts exchanged, used or not, hierarchically, or, where ranks share
  tokens, among those with the same place in their tensor group, and then gathered inside that (coordinated);
  the local experts one after the other, each of them read.

Legend: T tokens of one tensor group, D model, F hidden, E experts, C slots of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.paper_baseline import slots
from benchmarks.paper_models import Served
from moec.cost import Cost, Operation, Sending
from moec.ir.mesh import ExpertAxes, Mesh
from moec.runtime.ops.work import Product, Work

_HALF = 2  # bytes of a number


def deepspeed_cost(served: Served, cost: Cost, rows: int) -> Cost:
    """`cost` (of moec's decoder) as DeepSpeed-MoE runs it, with `rows` sequences to a tensor group."""
    kernels = [one for one in _published(served, cost, rows) if one.forward.calls or one.sends]
    return replace(cost, operations=tuple(_serial(one, index) for index, one in enumerate(kernels)))


def _serial(one: Operation, index: int) -> Operation:
    return replace(one, after=(index - 1,) if index else (), started=None)


def _published(served: Served, cost: Cost, rows: int) -> Iterator[Operation]:
    """The operations, those of expert layers replaced; the dense feed-forward of a residual layer stays."""
    layers = {one.region for one in cost.operations if _in(one, "moe")}
    sparse = sorted(layers, key=lambda name: int(name[4:]))
    before = ""
    for one in cost.operations:
        if _in(one, "moe") and one.region != before:
            experts = served.last_two if one.region in sparse[-2:] else served.experts
            yield from ExpertLayer.of(served, experts, cost.mesh, one.region, rows).operations(one)
        elif not _in(one, "moe") and not _in(one, "dispatch"):
            yield one
        before = one.region


def _in(one: Operation, kind: str) -> bool:
    return one.region.rpartition("_")[0] == kind


@dataclass(frozen=True)
class ExpertLayer:
    """One expert layer of DeepSpeed-MoE on one rank. `tensor`: L; `local`: experts of this rank, each cut in
    `slices`; `tokens`: T, of all slices together; `exchanges`: (axis, ranks) of every step of an exchange."""

    width: int
    experts: int
    local: int
    slices: int
    slice_axis: str
    tokens: int
    tensor: int
    exchanges: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, served: Served, experts: int, mesh: Mesh, layer: str, rows: int) -> ExpertLayer:
        """The sparse layer `layer` (`moe_1`) of a program on `mesh`."""
        axes = mesh.axes_of(layer)
        local, tokens = experts // axes.expert, rows * axes.slice
        exchanges = _exchanges(mesh, axes)
        return cls(
            served.width, experts, local, axes.slice, axes.slice_axis, tokens, served.tensor, exchanges
        )

    @property
    def peers(self) -> int:
        """Ranks whose slots an expert gets."""
        return math.prod(ranks for _, ranks in self.exchanges)

    def operations(self, like: Operation) -> list[Operation]:
        """In the order in which they run; `like`: an operation of the layer, which says where it stands."""
        T, D, E = self.tokens, self.width, self.experts
        held = E * slots(T, E) * D * _HALF  # bytes of all slots
        sliced = Sending(self.slice_axis, "all_gather_into_tensor", self.slices - 1, T * D * _HALF)
        there = [
            step
            for axis, ranks in self.exchanges
            for step in _sent(axis, ranks, "all_to_all_single", held / self.tensor)
        ]
        back = _sent("tensor", self.tensor, "all_gather_into_tensor", held)
        steps = [
            *([_step(like, "slices", Work(), (sliced,))] if self.slices > 1 else []),
            _step(like, "scores", Work((Product(T, E, D),), 4 * E * D + _HALF * T * D, 4 * T * E)),
            _step(like, "table", Work((), 4 * T * E, 8 * T), kind="routing"),
            _step(like, "slots", Work((), _HALF * T * D, held), kind="routing"),
            *there,
            *self._experts(like),
            *there,
            *(back if self.tensor > 1 else []),
            _step(like, "sums", Work((), held, _HALF * T * D), kind="routing"),
        ]
        return [replace(one, region=like.region, layer=like.layer) for one in steps]

    def _experts(self, like: Operation) -> list[Operation]:
        """Every local expert: up, its activation, down, and the copy into the whole."""
        D, F = self.width, 4 * self.width // self.slices
        rows = self.peers * slots(self.tokens, self.experts)
        weights = D * F * _HALF
        up = Work((Product(rows, F, D),), weights + rows * D * _HALF, rows * F * _HALF)
        down = Work((Product(rows, D, F),), weights + rows * F * _HALF, rows * D * _HALF)
        copy = Work((), rows * D * _HALF, rows * D * _HALF)
        gelu = Work((), rows * F * _HALF, rows * F * _HALF)
        one = [
            _step(like, "up", up, kind="experts", weights=weights),
            _step(like, "gelu", gelu, kind="pointwise"),
            _step(like, "down", down, kind="experts", weights=weights),
            _step(like, "copy", copy, kind="routing"),
        ]
        if self.slices > 1:
            whole = rows * D * _HALF
            moved = 2 * (self.slices - 1)
            sending = Sending(self.slice_axis, "all_reduce", moved, moved * whole / self.slices)
            one.append(_bare("all_reduce", Work(), (sending,), "collective"))
        return one * self.local


def _exchanges(mesh: Mesh, axes: ExpertAxes) -> tuple[tuple[str, int], ...]:
    """Coordinated where ranks share tokens: each exchanges with the ranks at its own place of the other
    tensor groups. Else hierarchical, where there are several nodes."""
    if mesh.tensor > 1:
        return (("data", mesh.data),)
    if mesh.world <= mesh.node:
        return ((axes.expert_axis, axes.expert),)
    inside = mesh.inside(axes)
    return (axes.inside_axis, inside), (axes.between_axis, axes.expert // inside)


def _sent(axis: str, ranks: int, operator: str, whole: float) -> list[Operation]:
    """A collective in which each of `ranks` ranks holds a part of `whole` bytes for every other one."""
    if ranks < 2:
        return []
    sending = Sending(axis, operator, ranks - 1, whole * (ranks - 1) / ranks)
    return [_bare(operator, Work(), (sending,), "collective")]


def _step(
    like: Operation,
    name: str,
    work: Work,
    sends: Sequence[Sending] = (),
    kind: str = "product",
    weights: int = 0,
) -> Operation:
    return replace(_bare(f"{like.region}.{name}", work, sends, kind), weights=weights)


def _bare(name: str, work: Work, sends: Sequence[Sending], kind: str) -> Operation:
    return Operation(
        name, "", None, f"deepspeed::{name.rpartition('.')[2]}", kind, "float16", work, sends=tuple(sends)
    )
