"""What a program allows: its expert layers, how they are cut, how many tensor ranks its heads suffice for."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from moec import ir
from moec.errors import PlanError
from moec.ir import region_of, regions
from moec.passes.blocks import blocks_of
from moec.passes.dense_sites import dense_sites
from moec.passes.expert_slices import slices_of
from moec.passes.place_dense import num_heads
from moec.plan import Parallel

from .arrangements import ExpertLayer, Space, divisors
from .folding import Folding

MATRICES = 3  # dims of the weights of experts that slices cut; biases are not always cut


def space_of(folding: Folding, world: int, given: Parallel, fixed: Mapping[str, Any]) -> Space:
    """The space of the whole program, on `world` ranks; see `Space` for `given` and `fixed`."""
    root = folding.program.graph
    found = {name: _layer(name, module, world) for name, module in regions(root, "moe").items()}
    layers = tuple(replace(found[like], name=name) for name, like in _layers(folding))
    return Space(world, layers, num_heads(root), given, fixed)


def _layers(folding: Folding) -> list[tuple[str, str]]:
    """Expert layers of the whole, each with the one of the folded program that it is like."""
    root = folding.program.graph
    if not folding.folded:
        return [(name, name) for name in regions(root, "moe")]
    blocks = blocks_of(root)
    pairs = [
        pair
        for names, block in zip(folding.regions, folding.stands_for, strict=True)
        for pair in zip(names, blocks[block].regions, strict=True)
    ]
    return [(name, like) for name, like in pairs if like in regions(root, "moe")]


def dealt_out(program: ir.Program, tensor: int) -> Hashable:
    """What of the dense part is dealt out to `tensor` ranks: a shape has it in common."""
    if tensor == 1:
        return ()
    sites, _ = dense_sites(program.graph, tensor)
    splits = [(name, split) for site in sites for name, split in site.splits.items()]
    dealt = tuple((name, split.dim, split.axis, len(split.blocks)) for name, split in splits)
    return _leaves_one(program, tensor), dealt


def _leaves_one(program: ir.Program, tensor: int) -> bool:
    """Whether a part may have a single head: what is a copy with more of them is a view then."""
    nodes = (node for region in regions(program.graph, "attention").values() for node in region.graph.nodes)
    values = (node.meta.get("val") for node in nodes)
    sizes = (size for value in values if isinstance(value, Tensor) for size in value.shape)
    return any(type(size) is int and size == tensor for size in sizes)


def _layer(name: str, module: fx.GraphModule, world: int) -> ExpertLayer:
    region = region_of(module)
    assert region is not None
    ways: dict[int, int] = {}
    for asked in divisors(world):
        try:
            ways[asked] = 1 if asked == 1 or slices_of(module, asked, name)[1] else asked
        except PlanError:  # it does not divide the hidden units
            continue
    held = [module.get_parameter(leaf) for leaf in region.settings["expert_parameters"]]
    num_bytes = sum(weight.numel() * weight.dtype.itemsize for weight in held if weight.dim() == MATRICES)
    return ExpertLayer(name, region.settings["experts"], ways, num_bytes)
