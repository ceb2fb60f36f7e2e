"""The paper's training cost: samples a second of a sparse model and of the dense one of the same quality.

Table 3 of the paper, on 128 A100. How the models lay on them it does not say there; here the dense one has
tensor groups of 8 (a node), the sparse one has one expert of every layer on each rank, and the batches are
1024 and 512 sequences of 2048 tokens, in half precision, nothing computed again. A step is linear in the
number of layers, as nothing of one layer overlaps with another, so two short programs tell of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.paper_models import SERVED, Place, Served, compiled
from benchmarks.paper_points import cluster
from moec.cost import predict

WORLD, SEQUENCE = 128, 2048


@dataclass(frozen=True)
class Run:
    """One line of the table: `batch` sequences of all ranks, `tensor` ranks to a tensor group, and the
    samples a second that were `published`."""

    model: Served
    tensor: int
    batch: int
    published: float


RUNS = (
    Run(SERVED["6.7B"], 8, 1024, 70),
    Run(SERVED["1.3B+MoE-128"], 1, 512, 372),
)


def trained(run: Run) -> dict[str, Any]:
    """Seconds of a step, samples a second, and operations of one rank, as data."""
    (few, work_few), (more, work_more) = (_step(run, layers) for layers in (4, 6))
    pairs = (run.model.layers - 4) // 2
    seconds = few + pairs * (more - few)
    return {
        "batch": run.batch,
        "published": run.published,
        "seconds": seconds,
        "samples": run.batch / seconds,
        "flops": work_few + pairs * (work_more - work_few),
    }


def _step(run: Run, layers: int) -> tuple[float, float]:
    """(seconds, operations of one rank) of a step of a model with fewer layers."""
    model = replace(run.model, tensor=run.tensor)
    cost = compiled(model, Place.of(model, WORLD), layers).cost("training")
    rows = run.batch * run.tensor // WORLD
    flops = cost.number(cost.flops, B=rows, S=SEQUENCE)
    return predict(cost, cluster(WORLD), B=rows, S=SEQUENCE).seconds, flops
