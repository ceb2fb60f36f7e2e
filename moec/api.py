"""The roof: `compile` and `load`."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from moec import ir
from moec.capture import capture
from moec.errors import PlanError
from moec.ir import regions
from moec.ir.graphs import graph_modules
from moec.passes.pipeline import pipeline, placed
from moec.passes.runner import Runner
from moec.plan import Plan
from moec.program import Program

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64, "auto": None}


def compile(
    model: nn.Module | ExportedProgram,
    plan: str | Path | Plan | Mapping[str, Any] | None = None,
    *,
    example_inputs: Any = None,
    verify: str | bool | None = None,
    disable: Collection[str] = (),
    backend: str | None = None,
    world: int | None = None,
) -> Program:
    """Turn a dense decoder into the program that `plan` describes.

    `model`: tokens i64 [B, S] → logits [B, S, V]; any nn.Module decoder, a Hugging Face causal LM, an
    `fx.GraphModule` or an `ExportedProgram`. It is not changed, and the program owns copies of its weights.
    `plan`: a TOML file, the name of a shipped plan, a `moec.Plan`, a mapping, or None to stay dense.
    `example_inputs`: where they cannot be inferred. `verify`: "auto" (default: prove contracts where that
    takes seconds), "full", "off". `disable`: names of passes to leave out. `backend`: "eager", "fused"
    or "inductor".
    `world`: the number of ranks to place it on; None: as the plan's `[parallel]` and the launcher say (see
    `world_of`). On more than one, `program.partition(rank)` and `program.simulate(tokens)` follow.
    Raises `PlanError`, `CaptureError`, `PassError` or `VerifyError`; each says where, what was found, and
    what was needed.
    """
    chosen = Plan.resolve(plan)
    program = capture(model, example_inputs=example_inputs, dtype=DTYPES[chosen.compile.dtype])
    program.plan = chosen = chosen.fitted(program.source.max_positions)
    runner = Runner(verify=_verify(verify, chosen), disable=disable)
    done = runner.run(program, pipeline(chosen, world_of(chosen, world)))
    made = Program.of(done, backend=backend or chosen.compile.backend)
    if made.backend == "fused":
        made._fused = (made.fused(verify=runner.verify),)
    return made


def world_of(plan: Plan, asked: int | None = None) -> int:
    """The number of ranks a program is placed on.

    What is asked for; else data × tensor, where the plan gives both; else the launcher's WORLD_SIZE; else
    the fewest ranks on which the plan's `tensor`, `expert` and `slice` all have their way. Raises `PlanError`
    when less than one rank is asked for.
    """
    parallel = plan.parallel
    if asked is not None:
        if type(asked) is not int or asked < 1:
            raise PlanError("world", f"{asked!r} ranks", "a whole number of ranks, at least one")
        return asked
    if parallel.data != "auto":
        return parallel.data * parallel.tensor
    launched = os.environ.get("WORLD_SIZE")
    if launched is not None and launched.isdigit():
        return int(launched)
    experts = parallel.expert if plan.moe is not None else 1
    return math.lcm(parallel.tensor, parallel.slice * experts)


def place(program: Program, world: int) -> Program:
    """The same program on `world` ranks, by its plan's `[parallel]`, wherever it was placed before.

    `program` stays as it is. Raises `PlanError` when the plan's axes do not divide the world.
    """
    done = Runner(verify="off").run(unplaced(program), placed(program.plan or Plan(), world))
    return Program.of(done, backend=program.backend).train(program.training)


def unplaced(program: ir.Program) -> ir.Program:
    """A fork that lies nowhere in particular: what a placed program was before."""
    bare = program.fork()
    bare.layout = None
    for _, module in graph_modules(bare.graph):
        for node in module.graph.nodes:
            node.meta.pop("placement", None)
    if bare.stage == "placed":
        bare.stage = "sparse" if regions(bare.graph, "moe") else "structured"
    return bare


def _verify(asked: str | bool | None, plan: Plan) -> str:
    if isinstance(asked, bool):
        return "full" if asked else "off"
    return asked or plan.compile.verify


def load(directory: str | Path, *, rank: int | None = None, trust: bool = False) -> Program:
    """Read a saved program back; nothing in it is executed. `trust=True` accepts one edited by hand.

    `rank`: of a placed program, only the part of this rank, a `LocalProgram`; no other rank's weights are
    read. Raises `ArtifactError` for a missing, truncated, edited or foreign artifact.
    """
    if rank is not None:
        from moec.local_program import load_local

        return _run_as_planned(load_local(directory, rank, trust=trust))
    from moec.runtime.artifact import load_program

    return _run_as_planned(load_program(directory, trust=trust, kind=Program))


def _run_as_planned(program: Program) -> Program:
    """A program that was read back runs as its plan says."""
    if program.plan is not None:
        program.backend = program.plan.compile.backend
    return program
