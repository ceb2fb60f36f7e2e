"""Products and attention by shape, in the caches and in memory, through the operators that programs call."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import moec.runtime.ops  # noqa: F401 (registers moec::linear)
from moec.cost.machine.measured import Grid, Line

from .clock import Stopwatch
from .pool import FAR, NEAR, Pool, Run, Shapes

_LONG = 0.06  # seconds for what everything else depends on
_SLOW = 2e8  # a product of so many operations takes as long from memory as from a cache


@dataclass(frozen=True)
class Sizes:
    """What grids are measured at; products of more than `most` operations are left to proportion."""

    rows: Sequence[int] = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
    widths: Sequence[int] = (32, 64, 128, 256, 512, 1024, 2048)
    tokens: Sequence[int] = (4, 16, 64, 256, 1024, 4096)
    lengths: Sequence[int] = (16, 32, 64, 128, 256, 512, 1024)
    heads: Sequence[int] = (16, 32, 64, 128)
    positions: Sequence[int] = (32, 128, 512, 2048)
    most: float = 1.1e9


QUICK = Sizes((1, 8, 64), (16, 128), (4, 64), (16, 64), (16, 32), (32, 128), 1e8)


def measure_products(watch: Stopwatch, sizes: Sizes) -> dict[str, Grid]:
    """Forward products and gradients of weights, of torch and of `moec::linear`."""
    ours, outer = torch.ops.moec.linear.default, torch.ops.moec.linear_outer.default
    forward = (sizes.rows, sizes.widths, sizes.widths)
    gradient = (sizes.widths, sizes.widths, sizes.tokens)
    pools = Pool(NEAR), Pool(FAR)

    def grid(axes: Axes, shapes: ShapesOf, run: Run) -> Grid:
        return _grid(watch, pools, axes, shapes, run, sizes.most)

    return {
        "torch": grid(forward, _layer, torch.ops.aten.linear.default),
        "moec": grid(forward, _layer, ours),
        "torch backward": grid(gradient, _gradient, lambda left, right: left.t() @ right),
        "moec backward": grid(gradient, _gradient, outer),
    }


Axes = Sequence[Sequence[int]]
ShapesOf = Callable[[int, int, int], Shapes]


def _layer(m: int, n: int, k: int) -> Shapes:
    return (m, k), (n, k), (n,)


def _gradient(m: int, n: int, k: int) -> Shapes:
    return (k, m), (k, n)


@torch.inference_mode()
def _grid(
    watch: Stopwatch, pools: tuple[Pool, Pool], axes: Axes, shapes: ShapesOf, run: Run, most: float
) -> Grid:
    """Times at all combinations of sizes."""
    near: dict[tuple[int, ...], float] = {}
    far: dict[tuple[int, ...], float] = {}
    for shape in itertools.product(*axes):
        m, n, k = shape
        if 2.0 * m * n * k > most:
            near[shape] = far[shape] = _in_proportion(shape, axes, far)
            continue
        near[shape] = pools[0].least(watch, shapes(m, n, k), run)
        small = 2.0 * m * n * k < _SLOW
        far[shape] = pools[1].least(watch, shapes(m, n, k), run) if small else near[shape]
    sizes = [[float(size) for size in axis] for axis in axes]
    return Grid(m=sizes[0], n=sizes[1], k=sizes[2], near=list(near.values()), far=list(far.values()))


def _in_proportion(shape: tuple[int, ...], axes: Axes, known: dict[tuple[int, ...], float]) -> float:
    """As long as the next smaller product by as many operations more."""
    dim = max(range(3), key=lambda dim: (axes[dim].index(shape[dim]) > 0, shape[dim]))
    smaller = axes[dim][axes[dim].index(shape[dim]) - 1]
    return known[(*shape[:dim], smaller, *shape[dim + 1 :])] * shape[dim] / smaller


def measure_attention(watch: Stopwatch, sizes: Sizes) -> dict[str, Grid]:
    """Seconds of one head: causal over as many keys as queries, forward and backward, and of one query.

    What lies between (a text that is continued) is told by proportion: a query of `q` costs by its keys.
    """
    return {
        "forward": _square(watch, sizes, backward=False),
        "backward": _square(watch, sizes, backward=True),
        "one query": _one_query(watch, sizes),
    }


def _square(watch: Stopwatch, sizes: Sizes, *, backward: bool) -> Grid:
    """Measured where there are as many keys as queries; half the pairs are masked."""
    found: dict[tuple[int, int], float] = {}
    for length, depth in itertools.product(sizes.lengths, sizes.heads):
        heads = max(8, min(64, (1 << 21) // (length * length)))
        found[length, depth] = _attend(watch, heads, length, depth, backward) / heads
    lengths, depths = [float(x) for x in sizes.lengths], [float(x) for x in sizes.heads]
    times = [
        found[queries, depth] * (keys / queries if keys > queries else 1.0)
        for queries, keys, depth in itertools.product(sizes.lengths, sizes.lengths, sizes.heads)
    ]
    return Grid(m=lengths, n=lengths, k=depths, near=times, far=times)


def _attend(watch: Stopwatch, heads: int, length: int, depth: int, backward: bool) -> float:
    qkv = torch.randn(2, length, 3 * heads // 2, depth).transpose(1, 2).requires_grad_(backward)
    grad = torch.randn(2, heads // 2, length, depth)

    def forward() -> Tensor:
        q, k, v = qkv.chunk(3, dim=1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    if not backward:
        with torch.inference_mode():
            return watch.least(forward)
    y = forward()
    return watch.least(lambda: torch.autograd.grad(y, qkv, grad, retain_graph=True))


@torch.inference_mode()
def _one_query(watch: Stopwatch, sizes: Sizes) -> Grid:
    pools, found, few = (Pool(NEAR), Pool(FAR)), ([], []), 8  # type: ignore[var-annotated]
    for keys, depth in itertools.product(sizes.positions, sizes.heads):
        seen = torch.ones(2, 1, 1, keys, dtype=torch.bool)
        shapes = [(2, few, 1, depth), (2, few, keys, depth), (2, few, keys, depth)]

        def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor = seen) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, seen)

        for pool, times in zip(pools, found, strict=True):
            times.append(pool.least(watch, shapes, attend) / (2 * few))
    positions, depths = ([float(size) for size in axis] for axis in (sizes.positions, sizes.heads))
    return Grid(m=[1.0], n=positions, k=depths, near=found[0], far=found[1])


@torch.inference_mode()
def measure_caches(watch: Stopwatch) -> Line:
    """Seconds to read one byte of weights for one row, where so many bytes are read in turn."""
    width, watch = 256, replace(watch, patience=_LONG)
    piece, shapes = 4 * width * width, [(1, width), (width, width)]
    footprints = [NEAR << shift for shift in range(5)] + [NEAR * 3, NEAR * 6, FAR]
    found = []
    for size in sorted(footprints):
        pool = Pool(size)
        for _ in range(size // piece):  # once through, so that it lies where it will
            torch.sum(pool.take((width, width)))
        found.append(pool.least(watch, shapes, torch.ops.aten.linear.default, min(64, size // piece)) / piece)
    return Line(bytes=[float(size) for size in sorted(footprints)], seconds=found)
