"""Arrange the ranks: which axes the plan gives the dense part, and which each expert layer.

before:  no layout
after:   layout.mesh = 8 ranks: data 4 × tensor 2
         moe_1 (4 experts)  expert-data 2 × expert 4 × slice 1
         moe_3 (8 experts)  expert-data 1 × expert 8 × slice 1

Each expert layer spreads over as many ranks as it can use: the plan's `expert`, its own number of experts if
that is less, and of that what divides both its experts and the world. So the layers of a pyramid each fill
the world (DeepSpeed-MoE, section 4.1.3: multi-expert and multi-data parallelism).

Contract: exact (nothing but the record changes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from moec.errors import PlanError
from moec.ir import Pass, Program, region_of, regions
from moec.ir.mesh import ExpertAxes, Mesh
from moec.ir.placement import Layout
from moec.plan import Parallel, Plan

from .expert_slices import slices_of


@dataclass(frozen=True)
class ArrangeRanks(Pass):
    """See the module. `plan`: says how many ranks an axis has; `world`: the number of ranks in all."""

    plan: Plan
    world: int
    contract: ClassVar[str] = "exact"

    def apply(self, program: Program) -> Program:
        parallel = self.plan.parallel
        data = data_size(parallel, self.world)
        mesh = Mesh(data, parallel.tensor, parallel.node)
        layers: list[tuple[str, ExpertAxes]] = []
        for name, module in regions(program.graph, "moe").items():
            axes, remarks = _axes(name, module, parallel, self.world)
            layers.append((name, axes))
            for remark in remarks:
                program.ledger = program.ledger.note(remark)
        mesh = replace(mesh, layers=tuple(layers))
        for name, axes in layers:
            _record_exchange(program.graph.get_submodule(name), mesh, axes, parallel)  # type: ignore[arg-type]
        program.layout = Layout(mesh)
        return program


def data_size(parallel: Parallel, world: int) -> int:
    """The number of data ranks of `world` ranks; `PlanError` when the axes do not fill the world."""
    where, tensor = "[parallel]", parallel.tensor
    if world % tensor:
        found = f"tensor = {tensor} on {world} ranks"
        raise PlanError(where, found, f"a number that divides {world}: {_divisors(world)}")
    data = world // tensor
    if parallel.data not in ("auto", data):
        found = f"data = {parallel.data} × tensor = {tensor} on {world} ranks"
        needed = f"data × tensor = {world}"
        raise PlanError(where, found, needed, f'data = {data}, or "auto"; or {parallel.data * tensor} ranks')
    if world % parallel.slice:
        found = f"slice = {parallel.slice} on {world} ranks"
        raise PlanError(where, found, f"a number that divides {world}: {_divisors(world)}")
    return data


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


def _axes(name: str, module: fx.GraphModule, parallel: Parallel, world: int) -> tuple[ExpertAxes, list[str]]:
    region, remarks = region_of(module), []
    assert region is not None
    experts, ways = region.settings["experts"], parallel.slice
    if ways > 1:
        _, reason = slices_of(module, ways, f"{name} ({region.path})")
        if reason:
            ways = 1
            remarks.append(f"{name}: slice = {parallel.slice} is not used: {reason}")
    axes, wanted = spread(experts, parallel.expert, ways, world), min(parallel.expert, experts, world // ways)
    if axes.expert < wanted:
        used = f"{axes.expert} {'rank' if axes.expert == 1 else 'ranks'}"
        remarks.append(
            f"{name}: its {experts} experts spread over {used}: {wanted} of {world // ways} would be uneven"
        )
    return axes, remarks


def spread(experts: int, most: int, ways: int, world: int) -> ExpertAxes:
    """How a layer of `experts`, each cut into `ways` slices, spreads over `world` ranks: over as many of at
    most `most` as divide both."""
    wanted = min(most, experts, world // ways)
    degree = max(d for d in range(1, wanted + 1) if math.gcd(experts, world // ways) % d == 0)
    return ExpertAxes(world // (degree * ways), degree, ways)


def _record_exchange(module: fx.GraphModule, mesh: Mesh, axes: ExpertAxes, parallel: Parallel) -> None:
    """Write into the region's settings how its rows travel: `shared` by the tensor group, and in which
    steps."""
    region = region_of(module)
    assert region is not None
    shared, two_steps = way_of_rows(mesh, axes, parallel)
    facts = {"shared": shared, "exchange": "hierarchical" if two_steps else "flat"}
    module.meta["region"] = replace(region, settings={**region.settings, **facts})


def way_of_rows(mesh: Mesh, axes: ExpertAxes, parallel: Parallel) -> tuple[bool, bool]:
    """Whether tensor ranks share the tokens of an expert layer, and whether its rows travel in two steps."""
    kind, inside = parallel.all_to_all, mesh.inside(axes)
    two_steps = 1 < inside < axes.expert and kind in ("auto", "hierarchical")
    return mesh.tensor > 1 and kind in ("auto", "coordinated"), two_steps
