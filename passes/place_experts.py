"""Deal the experts of every layer out to ranks, and say of each value of the layer where it lies.

before:  moe_3.up.weight [8, 384, 96]       whole on every rank
after:   moe_3.up.weight [8, 384, 96]       dim 0 over expert_4, dim 1 over slice_4x2; held alike along expert_data_4x2

Routers, selection biases and whatever all experts share stay whole on every rank.

Contract: exact (the program still runs in one process, as it did).
Source:  DeepSpeed-MoE, sections 4.1.3 and 5.2.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from moec.errors import PassError
from moec.ir import Pass, Program, region_of, regions
from moec.ir.graphs import graph_modules
from moec.ir.mesh import TENSOR, ExpertAxes
from moec.ir.placement import Layout, Placement, Split

from .expert_slices import slices_of


@dataclass(frozen=True)
class PlaceExperts(Pass):
    """See the module."""

    makes: ClassVar[str] = "placed"

    def requires(self, program: Program) -> None:
        if program.layout is None:
            raise PassError(self.name, "a program without a mesh", "arrange_ranks before it")

    def apply(self, program: Program) -> Program:
        layout = program.layout
        assert layout is not None
        placements, shapes = dict(layout.placements), dict(layout.shapes)
        for name, module in regions(program.graph, "moe").items():
            axes = layout.mesh.axes_of(name)
            for leaf, placement in _placements(name, module, axes).items():
                placements[f"{name}.{leaf}"] = placement
                shapes[f"{name}.{leaf}"] = tuple(module.get_parameter(leaf).shape)
            _annotate(module, axes, layout.mesh.tensor)
        program.layout = Layout(layout.mesh, placements, shapes)
        _annotate_weights(program.graph, program.layout)
        return program


def _placements(name: str, module: fx.GraphModule, axes: ExpertAxes) -> dict[str, Placement]:
    """Where each expert weight of a layer lies; nothing when every rank holds all experts whole."""
    region = region_of(module)
    assert region is not None
    cuts = slices_of(module, axes.slice, name)[0] if axes.slice > 1 else {}
    found: dict[str, Placement] = {}
    for leaf in region.settings["expert_parameters"]:
        splits = []
        if axes.expert > 1:
            experts = int(module.get_parameter(leaf).shape[0])
            splits.append(Split(0, axes.expert_axis, axes.expert, (experts,)))
        if leaf in cuts:
            splits.append(Split(cuts[leaf][0], axes.slice_axis, axes.slice, cuts[leaf][1]))
        if splits:
            found[leaf] = Placement(tuple(splits), _holders(axes, sliced=leaf in cuts))
    return found


def _holders(axes: ExpertAxes, sliced: bool) -> str:
    """The ranks that hold the same part: those of other expert-data places, and all slices of what is
    whole."""
    return axes.data_axis if sliced or axes.slice == 1 else axes.alike_axis


def _annotate_weights(root: fx.GraphModule, layout: Layout) -> None:
    """What is printed above a region of the weights it reads, dense ones included."""
    for path, module in graph_modules(root):
        for node in module.graph.nodes:
            if node.op == "get_attr":
                placement = layout.of(f"{path}.{node.target}" if path else str(node.target))
                if placement.splits:
                    node.meta["placement"] = str(placement)


def _annotate(module: fx.GraphModule, axes: ExpertAxes, tensor: int) -> None:
    """What is printed beside the values of an expert layer."""
    region = region_of(module)
    assert region is not None
    tokens = f"dim 0 over {TENSOR}" if region.settings["shared"] else ""
    for node in module.graph.nodes:
        target = str(node.target)
        if target in ("moec.dispatch.default", "moec.combine.default") and tokens:
            node.meta["placement"] = tokens
        if target == "moec.grouped_linear.default" and axes.expert > 1:
            node.meta["placement"] = f"rows over {axes.expert_axis}"
