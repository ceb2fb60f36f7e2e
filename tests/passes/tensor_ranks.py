"""Run a placed program on the ranks of one tensor group, as threads, and put together what they did."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

import moec
from moec.ir import Program
from moec.ir.compare import error_of, worst_gradient
from moec.ir.local import own_weights
from moec.ir.mesh import TENSOR, WORLD, Mesh
from moec.ir.placement import Layout
from moec.ir.retarget import in_dtype
from moec.passes.lower_dense import LowerDense
from moec.passes.place_dense import PlaceDense, logits_split
from moec.passes.runner import Runner
from moec.runtime.simulated import run_ranks
from moec.testing import DecoderRecipe
from moec.testing.recipe import LogitsOnly

RUNNER = Runner(verify="off")


@cache
def program_of(recipe: DecoderRecipe) -> Program:
    """The dense program of a recipe's model, made once; nobody changes it."""
    return structured(LogitsOnly(recipe, recipe.build(dtype=torch.float64)))


def structured(model: nn.Module) -> Program:
    """The dense program of a model, in fp64."""
    program: Program = moec.compile(model, verify="off")
    program.graph = in_dtype(program.graph, torch.float64).eval()
    return program


def placed(program: Program, ranks: int) -> Program:
    """`program` on `ranks` tensor ranks, still whole."""
    program = program.fork()
    program.layout = Layout(Mesh(data=1, tensor=ranks))
    return RUNNER.run(program, [PlaceDense()])


def lowered(program: Program, rank: int) -> Program:
    """The program of one rank, with weights of its own."""
    local = RUNNER.run(program, [LowerDense(rank)])
    own_weights(local.graph, program.graph)
    return local


@dataclass(frozen=True)
class Outcome:
    """Logits and gradients, by structural name."""

    logits: Tensor
    gradients: dict[str, Tensor]


def whole_outcome(program: Program, tokens: Tensor, cotangent: Tensor) -> Outcome:
    """What the program does in one process."""
    return _run(program, tokens, cotangent)


def joined_outcome(program: Program, tokens: Tensor, cotangents: list[Tensor]) -> Outcome:
    """What the ranks of a placed program do together: the logits of the last one, and the gradients summed
    by the rule of gradients. `cotangents`: one for each rank."""
    layout, ranks = program.layout, len(cotangents)
    assert layout is not None
    locals_ = [lowered(program, rank) for rank in range(ranks)]
    found = run_ranks(layout.mesh, lambda rank: _run(locals_[rank], tokens, cotangents[rank]))
    gradients = {}
    for name, value in program.graph.named_parameters():
        placement = layout.of(name)
        parts = [outcome.gradients[name] for outcome in found]
        if placement.holders == WORLD:
            gradients[name] = torch.stack(parts).sum(0)
        else:
            places = [({TENSOR: rank}, part) for rank, part in enumerate(parts)]
            gradients[name] = placement.whole(value.shape, places)
    return Outcome(found[-1].logits, gradients)


def _run(program: Program, tokens: Tensor, cotangent: Tensor) -> Outcome:
    parameters = dict(program.graph.named_parameters())
    for value in parameters.values():
        value.requires_grad_(True)
    logits, split = program.graph(tokens), logits_split(program)
    if split is not None and program.layout is not None and logits.shape[-1] != split.blocks[0]:
        logits = torch.ops.moec.gather_vocabulary(logits, split.blocks[0], TENSOR)
    grads = torch.autograd.grad(logits, list(parameters.values()), cotangent, allow_unused=True)
    pairs = zip(parameters.items(), grads, strict=True)
    return Outcome(logits.detach(), {n: torch.zeros_like(v) if g is None else g for (n, v), g in pairs})


def assert_same_on_ranks(program: Program, ranks: int, tokens: Tensor) -> Program:
    """`program` on `ranks` ranks has the logits and the gradients it has in one process; returns it placed.

    Every rank's cotangent is another, and their sum is that of the single process.
    """
    shape = (ranks, *tokens.shape, program.source.vocabulary)
    cotangents = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made = placed(program, ranks)
    needed = whole_outcome(program, tokens, cotangents.sum(0))
    found = joined_outcome(made, tokens, list(cotangents))
    assert error_of(found.logits, needed.logits) <= 1e-10
    error, worst = worst_gradient(needed.gradients, found.gradients)
    assert error <= 1e-10, f"gradient of {worst}: {error:.1e} of its scale"
    return made
