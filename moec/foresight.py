"""What a program will cost: `program.cost()`, read off the graph that one rank would run."""

from __future__ import annotations

from typing import Literal, get_args

from moec import ir
from moec.cost.cost import Cost
from moec.cost.read import read_operations
from moec.decoder import DEFAULT_LENGTH
from moec.errors import PassError
from moec.program import Program

Phase = Literal["training", "forward", "decode"]


def cost_of(program: Program, phase: Phase = "training") -> Cost:
    """See `Program.cost`."""
    if phase not in get_args(Phase):
        raise PassError("program.cost", f"phase {phase!r}", ", ".join(get_args(Phase)))
    read = graph_of(program, phase)
    operations = read_operations(read.graph, read.layout, training=phase == "training")
    return Cost(operations, phase, read.layout.mesh if read.layout else Cost.mesh)


def graph_of(program: Program, phase: Phase) -> ir.Program:
    """The program of one rank that is read for `phase`: what its backend runs, or its derived decoder."""
    whole = program
    if program.layout is not None and program.rank is None:
        whole = program.partition(0)
    if phase == "decode":
        length = program.source.max_positions or DEFAULT_LENGTH
        return whole._decoder_class()(whole, length, verify="off").fused
    if program.backend == "fused" and whole.stage != "fused":
        return whole.fused(verify="off")
    return whole
