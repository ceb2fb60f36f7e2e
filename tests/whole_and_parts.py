"""Run a placed program on threads as its ranks, and compare every number with the program in one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moec.ir.placement import Layout, Placement
from moec.program import Program
from moec.runtime.simulated import run_ranks
from moec.testing.tolerances import error_of, scale_of


@dataclass(frozen=True)
class Seen:
    """What one rank computed: its logits, its shares of the loss terms, the counts, its gradients."""

    logits: Tensor
    terms: Mapping[str, Tensor]
    counts: Mapping[str, list[int]]
    gradients: Mapping[str, Tensor | None]
    placements: Mapping[str, Placement]


def assert_parts_are_the_whole(
    program: Program, tokens: Tensor, targets: Tensor, *, tolerance: float = 1e-9
) -> None:
    """Logits, loss terms, counts and every gradient of all ranks against `program` in one process.

    `tokens`, `targets` i64 [B, S]: data rank d sees the d-th stretch of them; there may be fewer sequences
    than ranks. Errors are relative to scale, of gradients with a tenth of the largest as the floor.
    """
    layout = program.layout
    assert layout is not None
    needed, gradients = _whole(program, tokens, targets)
    seen = run_ranks(layout.mesh, lambda rank: _one_rank(program, layout, rank, tokens, targets))
    for name, value in needed["terms"].items():
        found = torch.stack([one.terms[name] for one in seen]).sum()
        _close(name, found, value, tolerance, 1e-3)
    for one in seen:
        assert one.counts == needed["counts"], f"counts {one.counts}, needed {needed['counts']}"
    for rank, one in enumerate(seen):
        place = layout.mesh.coordinate("data", rank)
        wanted = torch.tensor_split(needed["logits"], layout.mesh.data)[place]
        if wanted.numel():
            _close(f"logits of rank {rank}", one.logits, wanted, tolerance, scale_of(needed["logits"]))
    _compare_gradients(layout, seen, gradients, tolerance)


def _whole(program: Program, tokens: Tensor, targets: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    terms = program.loss_terms(tokens, targets)
    names = [name for name, _ in program.named_parameters()]
    found = torch.autograd.grad(terms["loss"], list(program.parameters()), allow_unused=True)
    zeros = [torch.zeros_like(p) for p in program.parameters()]
    gradients = [g if g is not None else zero for g, zero in zip(found, zeros, strict=True)]
    counts = {name: row.tolist() for name, row in terms.get("counts", {}).items()}
    scalars = {name: v.detach() for name, v in terms.items() if isinstance(v, Tensor)}
    needed = {"terms": scalars, "counts": counts, "logits": program(tokens).detach()}
    return needed, dict(zip(names, gradients, strict=True))


def _one_rank(program: Program, layout: Layout, rank: int, tokens: Tensor, targets: Tensor) -> Seen:
    local = program.partition(rank)
    place = layout.mesh.coordinate("data", rank)
    mine, wanted = (torch.tensor_split(side, layout.mesh.data)[place] for side in (tokens, targets))
    terms = local.loss_terms(mine, wanted)
    terms["loss"].backward()
    counts = {name: row.tolist() for name, row in terms.get("counts", {}).items()}
    gradients = {name: value.grad for name, value in local.named_parameters()}
    scalars = {name: value.detach() for name, value in terms.items() if isinstance(value, Tensor)}
    return Seen(local(mine).detach(), scalars, counts, gradients, local.placements())


def _compare_gradients(
    layout: Layout, seen: list[Seen], needed: Mapping[str, Tensor], tolerance: float
) -> None:
    floor = 0.1 * max(map(scale_of, needed.values()))
    for rank in range(layout.mesh.world):
        assert set(seen[rank].gradients) == set(needed)
        coordinates = layout.mesh.coordinates(rank)
        for name, gradient in needed.items():
            placement = seen[rank].placements[name]
            wanted = placement.local(gradient, coordinates)
            found = torch.zeros_like(wanted)
            for holder in layout.mesh.group(placement.holders, rank):
                part = seen[holder].gradients[name]
                found = found if part is None else found + part
            _close(f"gradient of {name} on rank {rank} ({placement})", found, wanted, tolerance, floor)


def _close(what: str, found: Tensor, needed: Tensor, tolerance: float, floor: float) -> None:
    assert found.shape == needed.shape, f"{what}: {list(found.shape)}, needed {list(needed.shape)}"
    error = error_of(found, needed, floor)
    assert error <= tolerance, f"{what}: error {error:.2e}, allowed {tolerance:.0e}"
