"""`moec.search`: the arrangement of ranks that does a job fastest, within the memory of a rank."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from moec.api import compile as compile_model
from moec.api import place, unplaced
from moec.cost.machine.hardware import Hardware
from moec.cost.timing.predict import predict
from moec.errors import PlanError
from moec.plan import Parallel, Plan
from moec.program import Program

from .arrangements import Space, arrangements, least_bytes, mesh_of
from .folding import Folding, fold
from .found import Found, Proof
from .job import Job, checked
from .lowering import Lowering
from .misfit import nothing_fits
from .outcome import Outcome, times_of
from .space import space_of

AXES = ("data", "tensor", "expert", "slice", "all_to_all")


def search(
    model: nn.Module | ExportedProgram | Program,
    cluster: str | Path | Hardware,
    *,
    objective: str = "latency",
    plan: str | Path | Plan | Mapping[str, Any] | None = None,
    batch: int | None = None,
    sequence: int | None = None,
    past: int | None = None,
    max_memory: float | None = None,
    ranks: int | None = None,
    captured: bool = False,
    check: int = 1,
) -> Found:
    """The fastest plan for `model` on `cluster`, the others in order, and why each of them lost.

    `model`: what `moec.compile` takes (on `meta` will do), or a program; `plan`: the plan whose `[moe]` it
    gets; axes that its `[parallel]` gives stay as they are, all others are searched. `cluster`: a hardware
    file, the name of a shipped one, or a `Hardware`; `ranks` of it. `objective`, `batch` (on all ranks
    together), `sequence`, `past`: see `planning.job.Job`. `max_memory`: bytes a rank may hold, by default as
    many as the device has. `captured`: as of `predict`. `check`: so many of the best are compiled in full
    on the whole mesh, and their times compared with those found.

    Raises `PlanError` for an unknown objective, for fixed axes that the ranks do not allow, and where nothing
    fits, with the nearest change that would; `MeshError` for ranks that the cluster does not have.
    """
    checked(objective)  # before the model is captured, which takes longer
    hardware = cluster if isinstance(cluster, Hardware) else Hardware.named(cluster)
    hardware = hardware if ranks is None else _of_ranks(hardware, ranks)
    program, captured_in = _program(model, plan)
    began = time.perf_counter()
    job = Job.of(program, objective, hardware.world, batch=batch, sequence=sequence, past=past)
    tried = Search(program, job, hardware, max_memory or hardware.device.memory, captured)
    outcomes = tried.outcomes()
    fitting = sorted((one for one in outcomes if one.fits), key=lambda one: (one.score, one.mesh.tensor))
    refused = sorted((one for one in outcomes if not one.fits), key=lambda one: one.memory["total"])
    if not fitting:
        raise nothing_fits(tried, refused)
    took = time.perf_counter() - began
    found = Found(job, hardware, tuple(fitting), tuple(refused), tried.shapes, captured_in, took)
    return replace(found, proofs=tuple(tried.proof(one) for one in fitting[:check]))


class Search:
    """One search. `folding`, `space`, `lowering`: what is tried, and how it is priced."""

    def __init__(
        self, program: Program, job: Job, hardware: Hardware, limit: float, captured: bool = False
    ) -> None:
        self.program, self.job, self.hardware, self.limit = program, job, hardware, limit
        self.captured = captured
        self.plan = program.plan or Plan()
        self.folding: Folding = fold(program)
        self.space: Space = self.space_on(hardware)
        self.lowering = self.lowering_in(self.space)

    def space_on(self, hardware: Hardware) -> Space:
        """What there is to try on other hardware."""
        parallel = self.plan.parallel
        node = min(hardware.per_node, hardware.world)
        given = parallel.model_copy(update={"node": node})
        fixed = {name: getattr(parallel, name) for name in AXES if name in parallel.model_fields_set}
        free = {name for name, value in fixed.items() if value == "auto"}
        return space_of(
            self.folding, hardware.world, given, {k: v for k, v in fixed.items() if k not in free}
        )

    def lowering_in(self, space: Space) -> Lowering:
        """Costs of what is in `space`."""
        return Lowering(self.folding, space, self.job.phase, train=self.plan.train)

    @property
    def shapes(self) -> int:
        """How many programs were lowered."""
        return len(self.lowering.shapes)

    def outcomes(self) -> list[Outcome]:
        """What became of every arrangement that the batch can be dealt out to; of throughput, the best batch.

        Raises `PlanError` where the batch can be dealt out to none.
        """
        found = []
        for parallel in arrangements(self.space):
            found += self._batches(parallel)
        if not found:
            data = sorted({self.space.world // one.tensor for one in arrangements(self.space)})
            needed = f"a multiple of one of {', '.join(map(str, data))}, the data ranks there can be"
            raise PlanError("batch", f"{self.job.batch} sequences", needed)
        return found

    def _batches(self, parallel: Parallel) -> list[Outcome]:
        """One arrangement with every batch up to the first that is too large."""
        found: list[Outcome] = []
        for batch in self.job.batches(self.space.world // parallel.tensor):
            found.append(self.outcome(parallel, batch))
            if not found[-1].fits:
                break
        fitting = [one for one in found if one.fits]
        return [min(fitting, key=lambda one: one.score)] if fitting else found

    def outcome(self, parallel: Parallel, batch: int) -> Outcome:
        """One arrangement with `batch` sequences on a data rank."""
        mesh, least = mesh_of(self.space, parallel), least_bytes(self.space, parallel)
        plan = self.plan.model_copy(update={"parallel": parallel})
        if least > self.limit:
            return Outcome(plan, mesh, batch, {"parameters": least, "total": least}, self.limit, exact=False)
        arranged = self.lowering.cost(parallel)
        letters = {**self.job.letters(batch), **arranged.axes}
        made = Outcome(plan, mesh, batch, arranged.memory(self.job.letters(batch)), self.limit)
        if not made.fits:
            return made
        told = predict(arranged.cost, self.hardware, captured=self.captured, **letters)
        score = self.job.score(told.seconds, batch, mesh.data)
        return replace(made, seconds=told.seconds, score=score, times=times_of(told))

    def proof(self, outcome: Outcome) -> Proof:
        """The plan of `outcome` compiled in full, layer by layer, and its cost read off that."""
        began = time.perf_counter()
        program = unplaced(self.program)
        program.plan = outcome.plan
        assert isinstance(program, Program)
        whole = place(program, self.space.world) if self.space.world > 1 else program
        cost, letters = whole.cost(self.job.phase), self.job.letters(outcome.batch)
        told = predict(cost, self.hardware, captured=self.captured, **letters)
        return Proof(told.seconds, cost.memory.numbers(**letters)["total"], time.perf_counter() - began)


def _of_ranks(hardware: Hardware, ranks: int) -> Hardware:
    hardware.require_world(ranks, "the search")
    return hardware.with_world(ranks)


def _program(model: Any, plan: Any) -> tuple[Program, float]:
    """The program before placement, and the seconds that compiling it took."""
    if isinstance(model, Program):
        if plan is not None:
            raise PlanError("moec.search", "a plan for a program that has one", "a model, or no plan")
        bare = unplaced(model)
        assert isinstance(bare, Program)
        bare.backend = model.backend
        return bare, 0.0
    began = time.perf_counter()
    chosen = Plan.resolve(plan)
    alone = chosen.model_copy(update={"parallel": Parallel()})
    program = compile_model(model, alone, world=1, verify="off")
    program.plan = chosen
    return program, time.perf_counter() - began
