"""All ranks of a placed program in this process, compared with the program itself.

    program = moec.compile(model, plan, world=64)
    print(program.simulate(tokens))

Each rank is a thread with its own parts of the weights; the graph, the groups and the collectives are those
of a job of processes (`moec.runtime.simulated`). So a laptop can check a plan for 64 ranks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moec.all_ranks import Gradients, all_parts, joined_gradients
from moec.cost.rank.counted_traffic import predict_traffic
from moec.errors import DataError, PassError
from moec.ir.graphs import output
from moec.ir.mesh import DATA, TENSOR, Mesh
from moec.local_program import LocalProgram
from moec.objective import at_least_float
from moec.passes.place_dense import logits_split
from moec.program import Program
from moec.runtime.ops.sent import BACKWARD, FORWARD, Kind, Traffic, all_reduce_cost
from moec.runtime.simulated import run_ranks
from moec.runtime.traffic import count_traffic
from moec.runtime.trainable import in_mode
from moec.simulation import Simulation
from moec.testing.tolerances import error_of


def simulate(
    program: Program,
    tokens: Tensor,
    targets: Tensor | None = None,
    *,
    gradients: bool = True,
    timeout: float = 600.0,
) -> Simulation:
    """Run every rank of `program` on its stretch of `tokens` (i64 [B, S]) and compare with the whole.

    `targets` as in `program.loss`. Both run in evaluation mode, as dropout and routing noise differ between
    ranks. `gradients=False` leaves the backward out. Weights and `.grad` of the program stay as they are.
    Raises `PassError` for a program that is not placed, or whose weights are on `meta`, `DataError` when a
    rank has no sequence and the model's own reshapes cannot do without, and `MeshError` when ranks get stuck
    or take longer than `timeout` seconds.
    """
    _require_weights(program)
    began = time.perf_counter()
    mesh = _mesh_of(program)
    with in_mode(program, False):
        whole = _run_whole(program, tokens, targets, gradients)
        ranks = all_parts(program)
    own = [_stretches(tokens, mesh, rank) for rank in range(mesh.world)]
    answers = [None if targets is None else _stretches(targets, mesh, rank) for rank in range(mesh.world)]

    def run(rank: int) -> _Run:
        try:
            return _run_rank(ranks[rank], own[rank], answers[rank], gradients)
        except RuntimeError as error:
            if own[rank].shape[0]:
                raise
            raise _no_sequences(rank, tokens, mesh) from error  # a size of -1 that 0 elements leave open

    runs = run_ranks(mesh, run, timeout=timeout)
    sizes = [(part.shape[0], part.shape[1]) for part in own]
    counted = [one.traffic for one in runs]
    routed = [one.routed for one in counted]
    predicted = predict_traffic(ranks[0].graph, mesh, sizes, routed, backward=gradients)
    for traffic, size in zip(predicted, sizes, strict=True):
        _add_loss(traffic, ranks[0], size, gradients)
    return _compare(program, whole, runs, predicted, time.perf_counter() - began)


@dataclass(frozen=True)
class _Run:
    """What came of one program: the whole one, or that of a rank."""

    logits: Tensor
    terms: Mapping[str, Tensor]
    counts: Mapping[str, Tensor]
    gradients: Gradients
    traffic: Traffic


def _require_weights(program: Program) -> None:
    if program.layout is None or program.rank is not None:
        found = (
            "a program that is not placed" if program.layout is None else f"the part of rank {program.rank}"
        )
        needed = "a whole program, placed on the ranks of a mesh"
        raise PassError("simulate", found, needed, "moec.compile(model, plan, world=4)")
    if any(value.is_meta for value in program.parameters()):
        raise PassError("simulate", "weights on meta", "weights with numbers in them", "moec.load(dir)")


def _no_sequences(rank: int, tokens: Tensor, mesh: Mesh) -> DataError:
    found = f"{tokens.shape[0]} sequences, none for rank {rank}, and a model that cannot do without"
    return DataError("simulate", found, f"{mesh.data} sequences at least, one for each data rank")


def _mesh_of(program: Program) -> Mesh:
    assert program.layout is not None
    return program.layout.mesh


def _stretches(tokens: Tensor, mesh: Mesh, rank: int) -> Tensor:
    """The sequences that `rank` sees."""
    return tokens.tensor_split(mesh.data)[mesh.coordinate(DATA, rank)]


def _run_whole(program: Program, tokens: Tensor, targets: Tensor | None, gradients: bool) -> _Run:
    with torch.no_grad():
        logits = program(tokens)
    named = dict(program.named_parameters())
    with torch.set_grad_enabled(gradients):
        terms = dict(program.loss_terms(tokens, targets))
    wanted = {name: value for name, value in named.items() if value.requires_grad}
    grads: Gradients = {}
    if gradients and wanted:
        found = torch.autograd.grad(terms["loss"], list(wanted.values()), allow_unused=True)  # type: ignore[call-overload]
        grads = dict(zip(wanted, found, strict=True))
    return _kept(logits, terms, grads, Traffic())


def _run_rank(local: LocalProgram, tokens: Tensor, targets: Tensor | None, gradients: bool) -> _Run:
    with torch.no_grad():
        logits = local(tokens)
    with torch.set_grad_enabled(gradients), count_traffic() as traffic:
        terms = dict(local.loss_terms(tokens, targets))
        if gradients:
            terms["loss"].backward()  # type: ignore[attr-defined]
    grads = {name: value.grad for name, value in local.named_parameters() if value.requires_grad}
    return _kept(logits, terms, grads, traffic)


def _kept(logits: Tensor, terms: dict[str, object], gradients: Gradients, traffic: Traffic) -> _Run:
    counts = terms.pop("counts", {})
    assert isinstance(counts, Mapping)
    scalars = {name: value.detach() for name, value in terms.items() if isinstance(value, Tensor)}
    return _Run(logits, scalars, counts, gradients, traffic)


def _add_loss(traffic: Traffic, local: LocalProgram, size: tuple[int, int], gradients: bool) -> None:
    """What the loss sends, which stands beside the graph: the number of targets, and sums over the words."""
    mesh, words = local.layout.mesh, logits_split(local)
    if mesh.data > 1:
        traffic.add(Kind(FORWARD, DATA, "all_reduce"), all_reduce_cost(mesh.data, torch.int64.itemsize))
    if words is not None:
        one = all_reduce_cost(mesh.tensor, size[0] * size[1] * _loss_itemsize(local))
        traffic.add(Kind(FORWARD, TENSOR, "moec.cross_entropy_part_totals"), one + one + one)
        if gradients:
            traffic.add(Kind(BACKWARD, TENSOR, "moec.cross_entropy_part_back"), one)


def _loss_itemsize(local: LocalProgram) -> int:
    logits = output(local.graph.graph).args[0]
    logits = logits[0] if isinstance(logits, tuple | list) else logits
    value = logits.meta["val"]  # type: ignore[union-attr]
    assert isinstance(value, FakeTensor)
    return at_least_float(value).dtype.itemsize


def _compare(
    program: Program, whole: _Run, runs: list[_Run], predicted: list[Traffic], seconds: float
) -> Simulation:
    mesh = _mesh_of(program)
    firsts = [runs[rank] for rank in mesh.group(DATA, 0)]
    logits = torch.cat([one.logits for one in firsts])
    stretches = whole.logits.tensor_split(mesh.data)
    terms = {name: torch.stack([one.terms[name] for one in runs]).sum(0) for name in whole.terms}
    places = [mesh.coordinate(DATA, rank) for rank in range(mesh.world)]
    found = joined_gradients(program, [one.gradients for one in runs])
    return Simulation(
        mesh=mesh,
        logits=logits,
        terms={name: float(value) for name, value in terms.items()},
        expected={name: float(value) for name, value in whole.terms.items()},
        counts=dict(runs[0].counts),
        expected_counts=dict(whole.counts),
        gradients=found,
        logits_error=max(error_of(one.logits, stretches[d]) for one, d in zip(runs, places, strict=True)),
        term_errors={name: error_of(terms[name], whole.terms[name]) for name in terms},
        gradient_errors=_gradient_errors(found, whole.gradients),
        routed=[one.traffic.routed for one in runs],
        traffic=[one.traffic for one in runs],
        predicted=predicted,
        seconds=seconds,
    )


def _gradient_errors(found: Mapping[str, Tensor], needed: Gradients) -> dict[str, float]:
    """The error of each gradient, relative to its scale, or to a tenth of the largest one where that is
    more: some (a key's bias) are zero but for rounding."""
    known = {name: grad for name, grad in needed.items() if grad is not None}
    floor = 0.1 * max((float(grad.abs().amax()) for grad in known.values() if grad.numel()), default=0.0)
    zeros = {name: torch.zeros_like(grad) for name, grad in known.items()}
    return {name: error_of(found.get(name, zeros[name]), grad, floor) for name, grad in known.items()}
