"""Decoding on a GPU: how much of the memory's speed a layer of experts reaches for 1 and 64 tokens.

Several layers of other weights are captured in one CUDA graph and replayed, so that what is read is in no
cache and no launch is waited for. A token's time is that of reading the experts that were chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import moec.runtime.ops  # noqa: F401
from benchmarks.gpu_clock import Run, attempt

ops = torch.ops.moec
GELU = "lambda h: gelu(h)"


@dataclass(frozen=True)
class Case:
    """Layers of `experts` experts, width × hidden, top-1, for `tokens` tokens; with a dense branch, or
    without."""

    tokens: int
    width: int
    hidden: int
    experts: int
    residual: bool = False
    layers: int = 8

    def __str__(self) -> str:
        kind = "residual" if self.residual else "top-1"
        return f"B{self.tokens} d{self.width} f{self.hidden} E{self.experts} {kind}"


CASES = tuple(
    Case(tokens, 1024, 4096, experts, residual)
    for tokens in (1, 64)
    for experts in (64, 128)
    for residual in (False, True)
)
TINY = (Case(1, 16, 32, 4, True, 1), Case(17, 16, 32, 4, False, 1))


class Layers:
    """The weights of all layers of a case, and one pass through them."""

    def __init__(self, case: Case, run: Run) -> None:
        def make(*shape: int) -> Tensor:
            return torch.randn(*shape, device=run.device, dtype=run.dtype) / shape[-1] ** 0.5

        self.case = case
        self.router = [make(case.experts, case.width) for _ in range(case.layers)]
        self.up = [make(case.experts, case.hidden, case.width) for _ in range(case.layers)]
        self.down = [make(case.experts, case.width, case.hidden) for _ in range(case.layers)]
        self.x = torch.randn(case.tokens, case.width, device=run.device, dtype=run.dtype)
        self.mix = torch.full((case.tokens, 2), 0.5, device=run.device, dtype=run.dtype)
        self.counts: list[Tensor] = []

    @torch.no_grad()
    def step(self) -> Tensor:
        """All layers, one after the other; the counts of each are left in `counts`."""
        x, self.counts = self.x, []
        for router, up, down in zip(self.router, self.up, self.down, strict=True):
            _, shares, _, order, counts = ops.gate(
                x, router, None, 1, "probability", "none", 0.0, 0.0, 4, False, False
            )
            mixed = (self.x, self.mix) if self.case.residual else (None, None)
            x = ops.moe_ffn(x, shares, order, counts, [up, down], [None, None], GELU, *mixed)
            self.counts.append(counts)
        return x

    def num_bytes(self) -> int:
        """Bytes of the weights that one pass reads: routers, and the experts that have rows."""
        used = sum(int((counts > 0).sum()) for counts in self.counts)
        expert = (self.up[0][0].numel() + self.down[0][0].numel()) * self.up[0].element_size()
        return used * expert + sum(router.nbytes for router in self.router)


def replayed(step: Callable[[], Tensor], run: Run) -> Callable[[], object]:
    """`step` captured in a CUDA graph; as it is where there is no GPU."""
    if run.device.type != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def measure(case: Case, run: Run, gb_per_s: float) -> dict[str, float]:
    """Microseconds a layer, GB/s, and the part of the measured bandwidth."""
    run.demand(0.0 if run.dry else 8.0, str(case))
    layers = Layers(case, run)
    layers.step()
    num_bytes = layers.num_bytes()
    seconds = run.seconds(replayed(layers.step, run), 1.0)
    eager = seconds if run.dry else run.seconds(layers.step, 0.5)
    return {
        "microseconds_a_layer": seconds / case.layers * 1e6,
        "without_graph": eager / case.layers * 1e6,
        "gb_per_s": num_bytes / seconds / 1e9,
        "of_bandwidth": num_bytes / seconds / 1e9 / gb_per_s,
    }


def decode(run: Run) -> dict[str, Any]:
    """Every case, beside the bandwidth that was measured just before."""
    speed = run.bandwidth()
    record: dict[str, Any] = {"bandwidth_gb_per_s": speed}
    for case in TINY if run.dry else CASES:
        attempt(str(case), lambda case=case: measure(case, run, speed["read"]), record)  # type: ignore[misc]
    return record
