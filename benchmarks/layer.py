"""One expert layer, forward and backward, against a dense feed-forward and other libraries, on the CPU.

    python -m benchmarks.layer [--threads 2] [--rounds 15] [--only swiglu-e8] [--dtype float32] [--peers DIR]

T2048 d512 f2048 E16 top-1 (GELU) and two SwiGLU layers, in float32 and bfloat16. Every contender has the same
weights, and its output is compared with ours first. Times are of one process, contenders taking turns;
gradients are set to None before each step, as `zero_grad` leaves them. The limit is the peak of products of
the same dtype in the same run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import machine, page, peers
from benchmarks.layers import Dense, OurDense, Shape, Sparse, Unfused
from benchmarks.race import race
from moec.runtime.ops.buffers import GRADIENTS, ROWS
from moec.testing.tolerances import TOLERANCES

Contenders = dict[str, Callable[[], object]]
Make = Callable[[Sparse], nn.Module]
RESULTS = page.RESULTS / "layer.json"
_CONSOLE = Console(width=120)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A layer, how many tokens it gets, and whom it meets."""

    name: str
    tokens: int
    shape: Shape
    peers: dict[str, Make]


@dataclass(frozen=True)
class Result:
    """One case: its times, what was missing, the work that was done, and how long it takes at the peak."""

    case: str
    dtype: str
    times: dict[str, dict[str, float]]
    missing: dict[str, str]
    gflop: float
    limit_ms: float


TOP_ONE = Case(
    "T2048 d512 f2048 E16 K1 GELU", 2048,
    Shape(512, 2048, 16, 1, gated=False, gate="probability", factor=1.0),
    {"DeepSpeed, capacity 1.0": peers.deepspeed},
)  # fmt: skip
SWIGLU: dict[str, Make] = {
    "transformers, grouped_mm": peers.hugging_face,
    "transformers, eager": partial(peers.hugging_face, experts="eager"),
    "Tutel": peers.tutel,
    "torchtitan": peers.torchtitan,
}
CASES = {
    "top-1": TOP_ONE,
    "swiglu-e8": Case("T1024 d512 n1024 E8 K2 SwiGLU", 1024, Shape(512, 1024, 8, 2, gated=True), SWIGLU),
    "swiglu-e32": Case("T1024 d512 n256 E32 K8 SwiGLU", 1024, Shape(512, 256, 32, 8, gated=True), SWIGLU),
}


def training_step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """Forward and backward, from gradients set to None."""
    leaves = [x, *layer.parameters()]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        layer(x).backward(grad)

    return step


def without_kept_memory(step: Callable[[], None]) -> Callable[[], None]:
    """The same step with fresh memory for every result."""

    def plain() -> None:
        GRADIENTS.enabled = ROWS.enabled = False
        step()
        GRADIENTS.enabled = ROWS.enabled = True

    return plain


def measure(case: Case, dtype: torch.dtype, rounds: int, limits: dict[str, float]) -> Result:
    """Make the contenders of a case, compare what they compute, and let them take turns."""
    shape = case.shape
    x = torch.randn(case.tokens, shape.width).to(dtype).requires_grad_()
    grad = torch.randn(case.tokens, shape.width).to(dtype)
    ours = Sparse(shape, dtype)
    step = training_step(ours, x, grad)
    contenders = _beside_a_dense(case, dtype, x, grad)
    contenders |= {"moec": step, "moec, not fused": training_step(Unfused(ours), x, grad)}
    contenders |= {"moec, fresh memory": without_kept_memory(step)}
    missing = {}
    for name, make in case.peers.items():
        try:
            peer = make(ours)
            check_agreement(name, peer, ours, x)
            contenders[name] = training_step(peer, x, grad)
        except peers.MissingPeerError as reason:
            missing[name] = str(reason)
    gflop = 6 * case.tokens * shape.active / 1e9
    word = str(dtype).removeprefix("torch.")
    limit = gflop / limits[f"gflops_{word}"] * 1e3
    return Result(case.name, word, timed(contenders, rounds), missing, gflop, limit)


def _beside_a_dense(case: Case, dtype: torch.dtype, x: Tensor, grad: Tensor) -> Contenders:
    """For a top-1 layer: the dense layer of the same arithmetic a token, and ours without drops."""
    shape = case.shape
    if shape.top_k > 1:
        return {}
    dropless = Sparse(Shape(shape.width, shape.hidden, shape.experts, 1, False, "straight-through"), dtype)
    found: Contenders = {}
    for name, dense in {"dense": Dense, "dense, by our products": OurDense}.items():
        found[name] = training_step(dense(shape.width, shape.hidden).to(dtype), x, grad)
    return found | {"moec, dropless": training_step(dropless, x, grad)}


@torch.no_grad()
def check_agreement(name: str, peer: nn.Module, ours: Sparse, x: Tensor) -> None:
    """The same outputs for every token that both keep and whose choice of experts is clear.

    Whom DeepSpeed drops is up to `topk` on ties; and peers round scores to the dtype of x, ours do not, so
    where the last chosen expert and the next one have nearly the same score, either may be taken.
    """
    theirs, mine = peer(x).float(), ours(x).float()
    kept = theirs.ne(0).any(1) & mine.ne(0).any(1)
    if kept.float().mean() < 0.75:
        raise AssertionError(f"{name} and moec keep only {int(kept.sum())} tokens of {len(kept)} in common")
    clear = kept & _clear(ours, x)
    if clear.float().mean() < 0.25:
        raise AssertionError(f"only {int(clear.sum())} tokens of {len(clear)} choose their experts clearly")
    near = (theirs - mine).abs().amax(1) <= TOLERANCES[x.dtype] * mine.abs().amax()
    if not near[clear].all():
        found = int(near[clear].sum())
        raise AssertionError(f"{name} and moec agree on {found} of {int(clear.sum())} tokens")


def _clear(ours: Sparse, x: Tensor) -> Tensor:
    """For each token: whether its last chosen expert is ahead of the next one by more than rounding."""
    scores_TE = x.float() @ ours.router.t()
    top = scores_TE.topk(ours.shape.top_k + 1).values
    return top[:, -2] - top[:, -1] > 2 * torch.finfo(x.dtype).eps * scores_TE.abs().amax()


def timed(contenders: Contenders, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each contender, and their ratio to those of "moec"; kept memory is freed afterwards."""
    timings = race(contenders, rounds)
    ours = timings["moec"]
    GRADIENTS.clear()
    ROWS.clear()
    return {
        name: {
            "min_ms": round(timing.best * 1e3, 3),
            "median_ms": round(timing.median * 1e3, 3),
            "min_ratio": round(timing.best / ours.best, 3),
            "median_ratio": round(timing.median / ours.median, 3),
        }
        for name, timing in timings.items()
    }


def page_table(results: list[dict[str, Any]]) -> str:
    """The table of docs/performance.md, from the results of a record."""
    lines = [
        "| layer, forward + backward | dtype | contestant | min ms | median ms | against moec | of peak |"
    ]
    lines.append("|---" * 7 + "|")
    for result in results:
        label, dtype = result["case"], result["dtype"]
        for name, row in result["times"].items():
            clock = f"{row['min_ms']:.1f} | {row['median_ms']:.1f} | {row['min_ratio']:.2f}"
            lines.append(
                f"| {label} | {dtype} | {name} | {clock} | {result['limit_ms'] / row['min_ms']:.0%} |"
            )
            label = dtype = ""
    return "\n".join(lines)


def show(result: Result) -> None:
    """Print one case as a table."""
    table = Table(title=f"{result.case}, {result.dtype}, forward + backward", title_justify="left")
    for column in ("", "min ms", "median ms", "x min", "x median", "of peak"):
        table.add_column(column, justify="right" if column else "left", min_width=0 if column else 28)
    for name, row in result.times.items():
        cells = (f"{row['min_ms']:.1f}", f"{row['median_ms']:.1f}")
        ratios = (f"{row['min_ratio']:.2f}", f"{row['median_ratio']:.2f}")
        table.add_row(name, *cells, *ratios, f"{result.limit_ms / row['min_ms']:.0%}")
    for name, reason in result.missing.items():
        table.add_row(name, reason)
    _CONSOLE.print(table)


def command(name: str, folders: list[str]) -> str:
    """How the running benchmark was started, folders of this machine left out."""
    words = ["DIR" if word in folders else word for word in sys.argv[1:]]
    return " ".join([f"python -m benchmarks.{name}", *words])


def main() -> None:
    """Run the cases, print them, and write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer", description=__doc__)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=CASES, action="append")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--peers", action="append", default=[])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    sys.path.extend(arguments.peers)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    record: dict[str, Any] = {"command": command("layer", arguments.peers)}
    record |= {"machine": machine.describe(), "limits": machine.limits(), "cases": []}
    _CONSOLE.print(record["machine"], record["limits"])
    for name in arguments.only or CASES:
        for dtype in arguments.dtype or DTYPES:
            result = measure(CASES[name], DTYPES[dtype], arguments.rounds, record["limits"])
            show(result)
            record["cases"].append(vars(result))
    page.record(record, arguments.out, RESULTS, page_table)
    _CONSOLE.print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
