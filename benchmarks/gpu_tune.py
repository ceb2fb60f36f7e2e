"""Which tiles are the fastest: other entries for the table in `moec/runtime/ops/triton/shapes.py`, one at a
time.

    python -m benchmarks.gpu --only tune --out tune.json

Nothing is chosen while a program runs: what wins here is written into the table by hand, so that equal
programs take equal tiles, and equal bits, wherever they run.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks import gpu_decode, gpu_layers
from benchmarks.gpu_clock import Run, attempt
from moec.runtime.ops.triton.shapes import Shape, instead

# (kind, several leaves) -> other entries, beside the one in the table
CANDIDATES: dict[tuple[str, bool], tuple[Shape, ...]] = {
    ("rows", False): (
        Shape(128, 256, 64, 8, 3),
        Shape(128, 128, 64, 8, 4),
        Shape(128, 128, 64, 4, 4),
        Shape(256, 128, 64, 8, 4),
        Shape(64, 256, 64, 4, 4),
        Shape(128, 256, 64, 8, 4, group=4),
        Shape(128, 256, 64, 8, 4, group=16),
    ),
    ("rows", True): (
        Shape(128, 128, 64, 8, 3),
        Shape(64, 128, 64, 4, 4),
        Shape(128, 64, 64, 4, 4),
        Shape(128, 128, 32, 8, 6),
        Shape(128, 128, 64, 8, 4, group=16),
    ),
    ("outer", False): (
        Shape(128, 256, 64, 8, 4),
        Shape(256, 128, 64, 8, 5),
        Shape(128, 128, 64, 4, 5),
        Shape(128, 256, 32, 8, 6),
    ),
    ("decode", False): (
        Shape(16, 16, 256, 4, 4),
        Shape(16, 32, 256, 4, 3),
        Shape(16, 32, 512, 8, 3),
        Shape(16, 64, 128, 4, 4),
    ),
}


def tune(run: Run) -> dict[str, Any]:
    """Milliseconds with each candidate: of three of the layers forward and backward, and of decoding."""
    record: dict[str, Any] = {}
    sizes = gpu_layers.TINY if run.dry else (gpu_layers.SIZES[0], gpu_layers.SIZES[2], gpu_layers.SIZES[5])
    for size in sizes:
        weights = gpu_layers.Weights(size, run)
        for (kind, several), shapes in CANDIDATES.items():
            if kind != "decode":
                work = partial(_layer, size, weights, run)
                name = f"{size}, {kind}{', several leaves' if several else ''}"
                record[name] = _each(kind, several, shapes, work, run)
        del weights
    for case in gpu_decode.TINY if run.dry else gpu_decode.CASES[:1]:
        work = partial(_decoding, gpu_decode.Layers(case, run), run)
        record[f"{case}, decode"] = _each("decode", False, CANDIDATES["decode", False], work, run)
    return record


def _each(kind: str, several: bool, shapes: tuple[Shape, ...], work: Any, run: Run) -> dict[str, Any]:
    """What `work` gives with the table as it is, and with each of `shapes` in it."""
    found: dict[str, Any] = {}
    attempt("as it is", work, found)
    for shape in shapes[:1] if run.dry else shapes:

        def one(shape: Shape = shape) -> dict[str, float]:
            run.demand(0.0 if run.dry else 20.0, str(shape))
            with instead(kind, torch.bfloat16, several, shape):
                made: dict[str, float] = work()
            return made

        attempt(str(shape), one, found)
    return found


def _layer(size: gpu_layers.Size, weights: gpu_layers.Weights, run: Run) -> dict[str, float]:
    found = gpu_layers.measure("moec, experts alone", size, weights, gpu_layers.tokens_of(size, run), run)
    return {name: found[name] for name in ("forward_ms", "backward_ms")}


def _decoding(layers: gpu_decode.Layers, run: Run) -> dict[str, float]:
    with torch.no_grad():
        layers.step()
        seconds = run.seconds(gpu_decode.replayed(layers.step, run), 1.0)
    return {"microseconds_a_layer": seconds / layers.case.layers * 1e6}
