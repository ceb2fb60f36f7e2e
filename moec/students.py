"""A program with fewer layers, made from one that exists: the student of a teacher.

teacher = moec.load("teacher/")
student = teacher.student(depth=21)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moec import ir
from moec.api import unplaced
from moec.errors import PassError, PlanError
from moec.ir import Ledger, region_of, regions
from moec.ir.graphs import fork
from moec.passes.blocks import blocks_of
from moec.passes.keep_layers import STAGES
from moec.passes.pipeline import sparse, student
from moec.passes.runner import Runner
from moec.plan import Plan, Student
from moec.plan.depth import kept_layers, unmeasured
from moec.program import Program


def student_of(
    teacher: Program,
    plan: str | Path | Plan | Mapping[str, Any] | None = None,
    *,
    tokens: Tensor | None = None,
    depth: int | None = None,
    keep: Sequence[int] | None = None,
    verify: str = "auto",
) -> Program:
    """`Program.student`: see there."""
    asked = _asked(teacher, plan, depth, keep)
    assert asked.student is not None
    teacher = _whole(teacher)
    layers = kept_layers(asked.student, len(blocks_of(teacher.graph)), _importance(teacher, asked, tokens))
    cut = asked.model_copy(
        update={"student": Student(keep=layers, init=asked.student.init, seed=asked.student.seed)}
    )
    runner = Runner(verify=verify)
    made = _own_weights(runner.run(_bare(teacher), student(cut)))
    made.plan = asked
    if asked.moe is not None and not regions(teacher.graph, "moe"):
        made = runner.run(made, sparse(asked))
    elif asked.moe is not None:
        made.ledger = _with_other_counts(made, asked)
    done = Program.of(made, backend=teacher.backend)
    return done.train(teacher.training)


def _asked(teacher: Program, plan: Any, depth: int | None, keep: Any) -> Plan:
    """The plan, with its `[student]` as the arguments say."""
    found = (teacher.plan or Plan()) if plan is None else Plan.resolve(plan)
    found = found.fitted(teacher.source.max_positions)
    if depth is not None or keep is not None:
        given: dict[str, Any] = {"depth": depth} if keep is None else {"keep": tuple(keep)}
        if depth is not None and keep is not None:
            given["depth"] = depth
        kept = {} if found.student is None else found.student.model_dump(include={"init", "seed"})
        if found.student is not None and keep is None:
            kept["by"] = found.student.by
        found = Plan.resolve({**found.model_dump(exclude_none=True), "student": kept | given})
    if found.student is None:
        needed = "a table [student], or depth=…, or keep=[…]"
        raise PlanError("program.student", "a plan without [student]", needed)
    return found


def _whole(teacher: Program) -> Program:
    """The teacher as it was before it was placed: a student is cut first, and placed afterwards."""
    bare = Program.of(unplaced(teacher), teacher.backend) if teacher.stage == "placed" else teacher
    if bare.stage not in STAGES or bare.layout is not None:
        found = f"a program at stage {teacher.stage}"
        needed = "a whole program, structured, sparse or placed: a student is cut first, then placed"
        raise PassError("program.student", found, needed)
    return bare.train(teacher.training)


def _importance(teacher: Program, plan: Plan, tokens: Tensor | None) -> list[float] | None:
    assert plan.student is not None
    if plan.student.by != "importance":
        return None
    if tokens is None:
        raise unmeasured()
    from moec.importance import block_influence

    return block_influence(teacher, tokens)


def _bare(teacher: Program) -> ir.Program:
    """A fork that remembers no earlier stages: their graphs would hold the teacher's weights."""
    records = {**teacher._records(), "snapshots": {}, "texts": {}}
    return ir.Program(fork(teacher.graph), **records)


def _own_weights(cut: ir.Program) -> ir.Program:
    """The same program over copies of its weights, tied ones tied."""
    graph, copies = fork(cut.graph), dict[int, Tensor]()
    for module in graph.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, value in table.items():
                if value is not None:
                    table[name] = copies.setdefault(id(value), _copy(value))
    made = ir.Program(graph, **{**cut._records(), "snapshots": {}})
    return made.with_snapshot(*cut.stages, made.stage)


def _copy(value: Tensor) -> Tensor:
    copied = value.detach().clone()
    return nn.Parameter(copied, value.requires_grad) if isinstance(value, nn.Parameter) else copied


def _with_other_counts(made: ir.Program, plan: Plan) -> Ledger:
    """The ledger of a student with its teacher's experts, and what the plan would have at its depth."""
    found = {index: number for index, (_, number) in sorted(_sites(made).items())}
    paths = [path for _, (path, _) in sorted(_sites(made).items())]
    said = "experts are the teacher's, not as [moe] would make them at this depth"
    try:
        settings = plan.layer_settings(len(paths), paths)
    except PlanError as error:  # nothing is made by it here, so it need not fit
        return made.ledger.note(f"{said}: {error.where}: {error.found}")
    needed = {index: settings[i].experts if i in settings else 0 for i, index in enumerate(found)}
    other = [f"layer {i} has {found[i]}, not {needed[i]}" for i in found if found[i] != needed[i]]
    return made.ledger.note(f"{said}: {', '.join(other)}") if other else made.ledger


def _sites(program: ir.Program) -> dict[int, tuple[str, int]]:
    """Number of each feed-forward → its path, and how many experts it has (none: 0)."""
    found: dict[int, tuple[str, int]] = {}
    for kind in ("ffn", "moe"):
        for name, module in regions(program.graph, kind).items():
            region = region_of(module)
            assert region is not None
            found[region.index] = (region.path or name, region.settings.get("experts", 0))
    return found
