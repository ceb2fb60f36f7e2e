"""The time of an operator by the roofline: whichever is slower, its arithmetic or its memory.

Matrix products are dealt out to the units of a device in tiles, so a product that does not fill its last
tiles, or its last wave of tiles, leaves units idle (NVIDIA, *Matrix Multiplication Background User's Guide*:
tile and wave quantisation). A small tile also reads more for each operation than a unit can get from the
shared cache. Of the tiles that the device has, and of the ways to split k, the fastest is taken, as libraries
do. Nothing here is fitted.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moec.runtime.ops.work import Product, Work

if TYPE_CHECKING:
    from moec.cost.machine.device import Device
    from moec.cost.operation import Operation

_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_LEAST_DEPTH = 64  # of k that one unit multiplies at least, where k is split


def roofline_seconds(device: Device, work: Work, operation: Operation, direction: str) -> float:
    """Seconds of `work` (numbers): launches, and the longer of arithmetic and memory."""
    computed = sum(product_seconds(device, product, operation.dtype) for product in work.products)
    return device.launch * work.calls + max(computed, memory_seconds(device, work, operation, direction))


def memory_seconds(device: Device, work: Work, operation: Operation, direction: str) -> float:
    """Seconds in which the bytes of `work` move.

    What the operator before has just written is still in the cache, if it fits; weights, keys and values
    remembered, and whatever backward reads come from memory.
    """
    streams = device.bandwidth * device.memory_share
    total = work.read + work.written
    fresh = total - min(operation.weights, work.read)
    cached = device.cache_bandwidth is not None and direction == "forward" and operation.kind != "attention"
    if not cached or fresh > device.cache:
        return total / streams
    return (total - fresh) / streams + fresh / max(device.cache_bandwidth or 0.0, streams)


def product_seconds(device: Device, product: Product, dtype: str) -> float:
    """Seconds of arithmetic of one (grouped) matrix product."""
    if not product.flops:
        return 0.0
    speed = device.peak_of(dtype) * device.product_share
    if not device.tiles:
        return product.flops / speed
    return min(_tiled(device, product, speed, _BYTES.get(dtype, 1), tile) for tile in device.tiles)


def _tiled(device: Device, product: Product, speed: float, itemsize: int, tile: tuple[int, int]) -> float:
    """Seconds with one tile size: waves of tiles, each as long as one unit takes for one tile."""
    groups = max(product.groups, 1e-9)
    m, k = product.m, product.k
    if product.along == "m":
        m = m / groups
    elif product.along == "k":
        k = k / groups
    tiles = groups * math.ceil(m / tile[0]) * math.ceil(product.n / tile[1])
    a_step = max(2 * tile[0] * tile[1] * device.units / speed, _cached(device, tile, itemsize))
    waves = math.ceil(tiles / device.units)
    splits = max(1, int(device.units // tiles))
    return waves * max(k / splits, min(k, _LEAST_DEPTH)) * a_step


def _cached(device: Device, tile: tuple[int, int], itemsize: int) -> float:
    """Seconds in which one unit gets the operands of one step in k from the shared cache."""
    if device.cache_bandwidth is None:
        return 0.0
    return (tile[0] + tile[1]) * itemsize * device.units / device.cache_bandwidth
