"""Activation recomputation: the backward pass computes the insides of regions again instead of keeping them.

Between forward and backward a region (`attention_3`, `ffn_3`, `moe_3`) keeps its inputs alone. Random states
are put back for the second computation, so dropout and routing noise are those of the first. Collectives
inside a region are sent again too, on every rank at the same place of its backward. The first half of an
expert layer, `dispatch_3`, keeps its values: it ends with rows on their way, which nobody would receive.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx
from torch.utils.checkpoint import checkpoint

from moec.errors import TrainError
from moec.ir import regions
from moec.runtime.trainable import Trainable

KINDS = ("attention", "ffn", "branch", "moe", "mix")


@contextmanager
def recomputing(program: Trainable, wanted: bool) -> Iterator[None]:
    """Inside, where `wanted`, what `program` computes keeps the inputs of its regions alone.

    Raises `TrainError` for a program without regions, and for one compiled as a whole.
    """
    # Not stopped early, which would leave out the wait of a collective that was sent again.
    again = functools.partial(functools.partial, checkpoint, use_reentrant=False, early_stop=False)
    changed = _regions(program) if wanted else []
    for region in changed:
        region.__dict__["forward"] = again(region.forward)
    try:
        yield
    finally:
        for region in changed:
            del region.__dict__["forward"]


def _regions(program: Trainable) -> list[fx.GraphModule]:
    backend = getattr(program, "backend", "eager")
    if backend not in ("eager", "fused"):
        raise TrainError("train.recompute", f"backend = '{backend}'", "backend = 'eager' or 'fused'")
    found = [region for one in (program, *getattr(program, "taps", ())) for region in _inside(one)]
    if not found:
        raise TrainError("train.recompute", "a program without regions", "one that moec.compile made")
    return list(dict.fromkeys(found))


def _inside(program: object) -> list[fx.GraphModule]:
    graph = getattr(program, "executed", getattr(program, "graph", None))
    inside = [regions(graph, kind) for kind in KINDS] if isinstance(graph, fx.GraphModule) else []
    return [region for named in inside for region in named.values()]
