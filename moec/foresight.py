"""What a program will cost: `program.cost()`, read off the graph that one rank would run."""

from __future__ import annotations

from typing import Literal, get_args

import sympy

from moec import ir
from moec.cost.cost import Cost
from moec.cost.rank.weights import Weights
from moec.cost.reading.operators.attention import Attention
from moec.cost.reading.read import read_graph
from moec.cost.reading.routing import Routing
from moec.cost.step.phases import TrainingStep, head_of, inference_operations, training_operations
from moec.decoder import DEFAULT_LENGTH
from moec.errors import PassError, nearest
from moec.passes.place_dense import logits_split
from moec.plan import Train
from moec.program import Program

Phase = Literal["training", "forward", "decode"]


def cost_of(
    program: Program,
    phase: Phase = "training",
    routing: Routing | None = None,
    *,
    train: Train | None = None,
    rank: int = 0,
    attention: Attention | None = None,
) -> Cost:
    """See `Program.cost`."""
    if phase not in get_args(Phase):
        raise PassError(
            "program.cost",
            f"phase {phase!r}",
            ", ".join(get_args(Phase)),
            nearest(str(phase), get_args(Phase)),
        )
    if attention not in (None, *get_args(Attention)):
        raise PassError("program.cost", f"attention {attention!r}", ", ".join(get_args(Attention)))
    if program.layout is None and rank:
        raise PassError("program.cost", f"rank {rank} of a program on 1", "rank 0, or a placed program")
    whole = program
    if program.layout is not None and program.rank is None:
        whole = program.partition(rank)
    rank, read = whole.rank or 0, graph_of(whole, phase)
    training = phase == "training"
    reading = read_graph(
        read.graph, read.layout, training=training, attention=attention, routing=routing, rank=rank
    )
    head, weights = head_of(reading, logits_split(whole)), Weights.of(read, rank)
    mesh, cache = weights.mesh, sympy.Add(*(value.bytes for value in reading.inputs[3:]))
    if not training:
        return Cost(
            inference_operations(reading, head), phase, mesh, weights, cache=cache, dealt=reading.dealt
        )
    step = TrainingStep.of(train or (program.plan.train if program.plan is not None else Train()))
    operations = training_operations(reading, head, weights, step)
    return Cost(operations, phase, mesh, weights, step, dealt=reading.dealt)


def graph_of(whole: Program, phase: Phase) -> ir.Program:
    """What `whole`, the program of one process or one rank, runs in `phase`."""
    if phase == "decode":
        length = whole.source.max_positions or DEFAULT_LENGTH
        return whole._decoder_class()(whole, length, verify="off").fused
    if whole.backend == "fused" and whole.stage != "fused":
        return whole.fused(verify="off")
    return whole
