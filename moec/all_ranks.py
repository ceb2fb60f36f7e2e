"""What all ranks of a program hold, in one process: their programs, and their gradients put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from moec.ir.graphs import attribute, named_weights
from moec.ir.hollow import with_weights
from moec.local_program import LocalProgram
from moec.program import Program

Gradients = Mapping[str, Tensor | None]


def all_parts(program: Program) -> list[LocalProgram]:
    """The program of every rank. They share one graph, and the memory of weights that are not split.

    Partitioning once and dealing out the weights is what makes 64 ranks quick; `program.partition(rank)` of
    each would hold the same numbers.
    """
    first = program.partition(0)
    return [_part(program, first, rank) for rank in range(first.layout.mesh.world)]


def _part(program: Program, first: LocalProgram, rank: int) -> LocalProgram:
    coordinates = first.layout.mesh.coordinates(rank)
    weights: dict[int, Tensor] = {}
    for name, value in named_weights(first.graph):
        placement = first.layout.of(name)
        source = attribute(program.graph, name) if placement.splits else value
        assert isinstance(source, Tensor)
        part = placement.local(source.detach(), coordinates).contiguous()
        is_parameter = isinstance(value, nn.Parameter)
        weights[id(value)] = nn.Parameter(part, requires_grad=value.requires_grad) if is_parameter else part
    made = LocalProgram(with_weights(first.graph, weights), **{**first._records(), "rank": rank})
    made.train(program.training)
    return made


def joined_gradients(program: Program, parts: Sequence[Gradients]) -> dict[str, Tensor]:
    """The whole gradient of each parameter: summed over the ranks that hold a part, and put together."""
    assert program.layout is not None
    mesh, made = program.layout.mesh, {}
    for structural, value in program.graph.named_parameters():
        name, placement = program._public(structural), program.layout.of(structural)
        sums = []
        for ranks in mesh.groups(placement.holders):
            held = [grad for rank in ranks if (grad := parts[rank].get(name)) is not None]
            if held:
                sums.append((mesh.coordinates(ranks[0]), torch.stack(held).sum(0)))
        if sums:
            made[name] = placement.whole(value.shape, sums)
    return made
