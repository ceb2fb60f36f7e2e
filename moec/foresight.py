"""What a program will cost: `program.cost()`, read off the graph that one rank would run."""

from __future__ import annotations

from typing import Literal

from moec import ir
from moec.cost.cost import Cost
from moec.cost.read import read_operations
from moec.errors import PassError
from moec.program import Program

Phase = Literal["training", "forward", "decode"]


def cost_of(program: Program, phase: Phase = "training") -> Cost:
    """See `Program.cost`."""
    whole: ir.Program = program
    if program.layout is not None and program.stage != "partitioned":
        whole = program.partition(0)
    if phase == "decode":
        assert isinstance(whole, Program)
        whole = whole.decoder().fused
    elif program.backend == "fused" and whole.stage != "fused":
        assert isinstance(whole, Program)
        whole = whole.fused(verify="off")
    elif phase not in ("training", "forward"):
        raise PassError("program.cost", f"phase {phase!r}", "training, forward or decode")
    operations = read_operations(whole.graph, whole.layout, training=phase == "training")
    return Cost(operations, phase, whole.layout.mesh if whole.layout else Cost.mesh)
