"""How many GPUs a model of the paper needs to be served at all: bytes of one rank, and what a GPU holds."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.paper_models import SERVED, Served
from benchmarks.paper_points import POSITIONS, ROWS, cluster, decoder_of
from moec.cost import Cost

_8B = SERVED["8B+MoE-128"]
NEEDS = (
    (_8B, 16),
    (_8B, 32),
    (_8B.pyramid(), 16),
    (_8B.pyramid().student(), 8),
    (_8B.pyramid().student(), 16),
)


@dataclass(frozen=True)
class Need:
    """`weights` and `cache`: bytes of one of `ranks` ranks; `fits`: together they are less than it has."""

    model: str
    ranks: int
    weights: float
    cache: float
    fits: bool


def weights_of(cost: Cost) -> float:
    """Bytes of all parameters of one rank, each once: the head's are those of the embedding."""
    return cost.number(sum(one.weights for one in cost.operations if one.name != "logits"))


def cache_of(model: Served) -> float:
    """Bytes of keys and values of all rows of a tensor group, on one of its ranks."""
    return 2 * 2 * model.layers * ROWS * POSITIONS * model.width / model.tensor


def need_of(model: Served, ranks: int) -> Need:
    """What one rank holds of a model on `ranks` ranks."""
    weights, cache = weights_of(decoder_of(model, ranks)), cache_of(model)
    return Need(model.name, ranks, weights, cache, weights + cache < cluster(ranks).device.memory)
