"""One expert layer against the dense feed-forward and against other libraries, float32, on the CPU.

    python -m benchmarks.layer [--threads 2] [--rounds 15] [--only decode] [--out FILE.json]

Forward and backward of T2048 d512 f2048 E16 top-1 (GELU) and of two SwiGLU layers; forward of eight tokens
through 64 experts (decoding). Every contender has the same weights, and its output is compared with ours
first. Times are of one process, contenders taking turns; `x` is seconds relative to the first contender.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import machine, peers
from benchmarks.layers import Dense, DenseAsOneExpert, Sparse
from benchmarks.race import race
from moec.runtime.ops.buffers import GRADIENTS, ROWS

Contenders = dict[str, Callable[[], object]]
_CONSOLE = Console()


@dataclass(frozen=True)
class Result:
    """One case: its times, what was missing, and the work that was done."""

    case: str
    times: dict[str, dict[str, float]]
    missing: dict[str, str]
    gflop: float = 0.0
    gigabytes: float = 0.0


def training_step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """Forward and backward, from gradients set to None as `zero_grad` leaves them."""
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


def top_one(rounds: int) -> Result:
    """T2048 d512 f2048 E16 top-1 GELU against the dense layer of equal active FLOPs, and DeepSpeed."""
    tokens, width, hidden, experts = 2048, 512, 2048, 16
    x, grad = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
    dropless = Sparse(width, hidden, experts, 1, "straight-through", gated=False)
    as_deepspeed = Sparse(width, hidden, experts, 1, "probability", gated=False, factor=1.0)
    as_deepspeed.load_state_dict(dropless.state_dict())
    step = training_step(dropless, x, grad)
    contenders: Contenders = {
        "dense": training_step(Dense(width, hidden), x, grad),
        "dense, by our products": training_step(DenseAsOneExpert(width, hidden), x, grad),
        "moec, dropless": step,
        "moec, dropless, fresh memory": without_kept_memory(step),
        "moec, capacity 1.0": training_step(as_deepspeed, x, grad),
    }
    missing = _add_peer(contenders, "DeepSpeed, capacity 1.0", peers.deepspeed, as_deepspeed, x, grad)
    gflop = 6 * tokens * width * hidden * 2 / 1e9
    return _measure(
        "T2048 d512 f2048 E16 K1 GELU, forward+backward", contenders, missing, rounds, gflop=gflop
    )


def swiglu(hidden: int, experts: int, top_k: int, rounds: int) -> Result:
    """T1024 d512 SwiGLU against transformers' grouped_mm."""
    tokens, width = 1024, 512
    x, grad = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
    ours = Sparse(width, hidden, experts, top_k, "normalized", gated=True)
    contenders: Contenders = {"moec": training_step(ours, x, grad)}
    missing = _add_peer(contenders, "transformers grouped_mm", peers.hugging_face, ours, x, grad)
    name = f"T1024 d512 n{hidden} E{experts} K{top_k} SwiGLU, forward+backward"
    return _measure(name, contenders, missing, rounds, gflop=6 * tokens * top_k * width * hidden * 3 / 1e9)


@torch.no_grad()
def decode(rounds: int) -> Result:
    """T8 d1024 f4096 E64 top-1, forward only: the time is that of reading the experts used."""
    tokens, width, hidden, experts = 8, 1024, 4096, 64
    x = torch.randn(tokens, width)
    ours = Sparse(width, hidden, experts, 1, "probability", gated=False, factor=1.0).eval()
    used = ours.routed(x)[2].unique().numel()
    contenders: Contenders = {"moec": lambda: ours(x)}
    missing = _add_peer(contenders, "DeepSpeed", peers.deepspeed, ours, x)
    gigabytes = used * 2 * width * hidden * 4 / 1e9
    name = f"T8 d1024 f4096 E64 K1 GELU, forward ({used} experts used)"
    return _measure(name, contenders, missing, rounds, gigabytes=gigabytes)


def _add_peer(
    contenders: Contenders,
    name: str,
    make: Callable[[Sparse], nn.Module],
    ours: Sparse,
    x: Tensor,
    grad: Tensor | None = None,
) -> dict[str, str]:
    try:
        peer = make(ours).train(ours.training)
    except peers.MissingPeerError as reason:
        return {name: str(reason)}
    _check_agreement(name, peer, ours, x)
    contenders[name] = (lambda: peer(x)) if grad is None else training_step(peer, x, grad)
    return {}


@torch.no_grad()
def _check_agreement(name: str, peer: nn.Module, ours: nn.Module, x: Tensor) -> None:
    """The same outputs for every token that neither drops (whom DeepSpeed drops is up to `topk` on ties)."""
    theirs, mine = peer(x), ours(x)
    kept = theirs.ne(0).any(1) & mine.ne(0).any(1)
    if kept.float().mean() < 0.75:
        raise AssertionError(f"{name} and moec keep only {int(kept.sum())} tokens of {len(kept)} in common")
    torch.testing.assert_close(theirs[kept], mine[kept], rtol=1e-3, atol=1e-4)


def _measure(
    case: str,
    contenders: Contenders,
    missing: dict[str, str],
    rounds: int,
    gflop: float = 0.0,
    gigabytes: float = 0.0,
) -> Result:
    timings = race(contenders, rounds)
    first = next(iter(timings.values()))
    times = {
        name: {
            "min_ms": round(timing.best * 1e3, 2),
            "median_ms": round(timing.median * 1e3, 2),
            "min_ratio": round(timing.best / first.best, 3),
            "median_ratio": round(timing.median / first.median, 3),
        }
        for name, timing in timings.items()
    }
    GRADIENTS.clear()
    ROWS.clear()
    return Result(case, times, missing, gflop, gigabytes)


def show(result: Result, limits: dict[str, float]) -> None:
    """Print one case as a table."""
    table = Table(title=result.case, title_justify="left")
    for column in ("", "min ms", "median ms", "x min", "x median", "of limit"):
        table.add_column(column, justify="right" if column else "left", min_width=0 if column else 28)
    for name, row in result.times.items():
        cells = (f"{row['min_ms']:.1f}", f"{row['median_ms']:.1f}")
        ratios = (f"{row['min_ratio']:.2f}", f"{row['median_ratio']:.2f}")
        table.add_row(name, *cells, *ratios, f"{_share(result, row, limits):.0%}")
    for name, reason in result.missing.items():
        table.add_row(name, reason)
    _CONSOLE.print(table)


def _share(result: Result, row: dict[str, float], limits: dict[str, float]) -> float:
    """The part of this run's peak (products, or memory for decoding) that the fastest round reached."""
    ideal = result.gflop / limits["gflops"] + result.gigabytes / limits["read_gb_per_s"]
    return ideal / (row["min_ms"] / 1e3)


CASES: dict[str, Callable[[int], Result]] = {
    "top-1": top_one,
    "swiglu-e8": lambda rounds: swiglu(1024, 8, 2, rounds),
    "swiglu-e32": lambda rounds: swiglu(256, 32, 8, rounds),
    "decode": decode,
}


def main() -> None:
    """Run the cases, print them, and write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer", description=__doc__)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=CASES, action="append")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/layer.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    record: dict[str, Any] = {"command": f"python -m benchmarks.layer {' '.join(sys.argv[1:])}".strip()}
    record |= {"machine": machine.describe(), "limits": machine.limits(), "cases": []}
    _CONSOLE.print(record["machine"], record["limits"])
    for name in arguments.only or CASES:
        result = CASES[name](arguments.rounds)
        show(result, record["limits"])
        record["cases"].append(vars(result))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    _CONSOLE.print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
