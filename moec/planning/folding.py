"""A program with one block of every kind: what is lowered in place of all of them.

full:    D M D M D M D M          blocks of two kinds
kept:    D M D M                  a first one, and of each kind one that follows another block
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moec import ir
from moec.errors import PassError
from moec.ir import regions
from moec.ir.results import tapped_layers
from moec.passes.blocks import Block, blocks_of
from moec.passes.keep_layers import KeepLayers
from moec.passes.runner import Runner
from moec.program import Program

from .kinds import kinds_of, shared_weights


@dataclass(frozen=True)
class Folding:
    """`program`: the folded one, at the stage of the one it was made from; `stands_for[i]`: the block of
    `program` that the i-th block of the whole is like; `regions[i]`: the names of the regions of that block
    in the whole. `remark`: why nothing was folded, or empty."""

    program: Program
    stands_for: tuple[int, ...] = ()
    regions: tuple[tuple[str, ...], ...] = ()
    remark: str = ""

    @property
    def folded(self) -> bool:
        """Whether any block stands for more than itself."""
        return not self.remark


def fold(program: Program) -> Folding:
    """The folding of a program before placement, at stage *structured* or *sparse*; it stays as it is.

    Where blocks cannot be told apart, share weights, or are all different, the program stands for itself.
    """
    try:
        blocks = blocks_of(program.graph)
    except PassError as error:
        return Folding(program, remark=f"layers cannot be told apart: {error.where}: {error.found}")
    obstacle = _obstacle(program, blocks)
    if obstacle:
        return Folding(program, remark=obstacle)
    kinds = kinds_of(program.graph, blocks)
    keep = representatives(kinds, [_has_experts(block) for block in blocks])
    if len(keep) == len(blocks):
        return Folding(program, remark="no layer is like another one that could stand for it")
    try:
        made = Runner(verify="off").run(program.fork(), [KeepLayers(keep)])
    except PassError as error:
        return Folding(program, remark=f"layers read each other: {error.where}: {error.found}")
    assert isinstance(made, Program)
    made.backend = program.backend
    named = tuple(block.regions for block in blocks)
    return Folding(made, stands_for(kinds, [_has_experts(block) for block in blocks], keep), named)


def representatives(kinds: Sequence[int], experts: Sequence[bool]) -> tuple[int, ...]:
    """The blocks that stay, ascending: the first, of each kind one that follows another block.

    Loss terms of expert layers are added to those of the layers before, so of each kind with `experts` one
    stays that is not the first with experts, if there is one.
    """
    keep = {0}
    for kind in dict.fromkeys(kinds):
        later = [i for i, other in enumerate(kinds) if other == kind and i > 0]
        keep.update(later[:1])
    if any(experts):
        first = experts.index(True)
        keep.add(first)
        for kind in dict.fromkeys(kinds):
            later = [i for i, other in enumerate(kinds) if other == kind and experts[i] and i > first]
            keep.update(later[:1])
    return tuple(sorted(keep))


def stands_for(kinds: Sequence[int], experts: Sequence[bool], keep: Sequence[int]) -> tuple[int, ...]:
    """For each block of the whole, the place in `keep` of the one that stands for it.

    The first block, and the first with experts, stand for themselves alone.
    """
    alone = {0} | ({experts.index(True)} if any(experts) else set())
    found = []
    for index, kind in enumerate(kinds):
        alike = [place for place, kept in enumerate(keep) if kinds[kept] == kind]
        others = [place for place in alike if keep[place] not in alone]
        found.append(keep.index(index) if index in alone else others[0])
    return tuple(found)


def _obstacle(program: ir.Program, blocks: Sequence[Block]) -> str:
    shared = shared_weights(program.graph, blocks)
    if shared:
        return f"layers share weights: {shared[0]}"
    if tapped_layers(program.graph):
        return "it gives hidden states"
    outside = set(regions(program.graph, "moe")) - {name for block in blocks for name in block.regions}
    return f"{min(outside)} is in no layer" if outside else ""


def _has_experts(block: Block) -> bool:
    return any(name.startswith("moe_") for name in block.regions)
