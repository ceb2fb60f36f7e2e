"""One expert layer that decodes: few tokens, forward only, against DeepSpeed and transformers, on the CPU.

    python -m benchmarks.decode [--threads 2] [--rounds 32] [--experts 64] [--tokens 8] [--dtype float32]
                                [--peers DIR] [--out FILE.json]

1, 8 and 64 tokens through d1024 f4096 with 64 and 128 experts, top-1, with and without a learned residual.
What such a step costs is reading the weights of the experts it uses: the limit is the speed of reading
memory in the same run. Every contender goes through the same batches of tokens, each beginning with another
one, so that none finds in the cache what it or the one before it has just read.

DeepSpeed's layer has biases and GELU (so has ours beside it); transformers' has SwiGLU, and meets ours of the
same kind. The weights of the largest case take 4.3 GB, and as much again packed; peers share them.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import machine, page, peers
from benchmarks.layer import DTYPES, Contenders, Make, check_agreement, command, timed
from benchmarks.layers import Shape, Sparse

WIDTH, HIDDEN = 1024, 4096
INPUTS, STRIDE = 16, 5
TOKENS, EXPERTS = (1, 8, 64), (64, 128)
RESULTS = page.RESULTS / "decode.json"
_CONSOLE = Console(width=120)


@dataclass(frozen=True)
class Result:
    """One case: its times, what was missing or refused, what a step has to read, and how long that takes."""

    case: str
    dtype: str
    times: dict[str, dict[str, float]]
    missing: dict[str, str]
    experts_used: float
    gigabytes: float
    limit_ms: float


class Steps:
    """A layer and the tokens that its calls go through, one batch after the other, from the `first` on."""

    def __init__(self, layer: nn.Module, tokens: list[Tensor], first: int) -> None:
        self.layer = layer
        self.tokens = cycle(tokens[first % INPUTS :] + tokens[: first % INPUTS])

    def __call__(self) -> None:
        self.layer(next(self.tokens))


def layers(experts: int, residual: bool, dtype: torch.dtype) -> dict[str, tuple[Sparse, dict[str, Make]]]:
    """Our layers by kind, and the peers that compute the same."""
    shape = Shape(WIDTH, HIDDEN, experts, 1, gated=False, gate="probability", factor=1.0, residual=residual)
    found: dict[str, tuple[Sparse, dict[str, Make]]] = {
        "GELU": (Sparse(shape, dtype).eval(), {"DeepSpeed": peers.deepspeed})
    }
    if not residual and experts == EXPERTS[0]:
        gated = Shape(WIDTH, HIDDEN, experts, 1, gated=True)
        eager: Make = partial(peers.hugging_face, experts="eager")
        others: dict[str, Make] = {"transformers, eager": eager}
        others["transformers, grouped_mm"] = peers.hugging_face
        found["SwiGLU"] = (Sparse(gated, dtype).eval(), others)
    return found


@torch.no_grad()
def measure(
    kind: str, ours: Sparse, others: dict[str, Make], tokens: int, rounds: int, speed: float
) -> Result:
    """Let ours, plain and packed, and the peers take turns on `tokens` tokens."""
    dtype = ours.up.dtype
    batches = [torch.randn(tokens, WIDTH).to(dtype) for _ in range(INPUTS)]
    ready: dict[str, nn.Module] = {"moec, packed weights": ours.packed(), "moec": ours}
    missing = {}
    for name, make in others.items():
        try:
            ready[name] = _willing(name, make(ours).eval(), ours, batches[0])
        except peers.MissingPeerError as reason:
            missing[name] = str(reason)
    steps: Contenders = {
        name: Steps(layer, batches, STRIDE * i) for i, (name, layer) in enumerate(ready.items())
    }
    times = timed(steps, rounds)
    shape, used = ours.shape, sum(ours.used(x) for x in batches) / INPUTS
    words = f"T{tokens} d{WIDTH} f{HIDDEN} E{shape.experts} K1 {kind}" + ", residual" * shape.residual
    gigabytes = (used * shape.active + shape.residual * 2 * WIDTH * HIDDEN) * dtype.itemsize / 1e9
    word = str(dtype).removeprefix("torch.")
    return Result(words, word, times, missing, used, gigabytes, gigabytes / speed * 1e3)


def _willing(name: str, peer: nn.Module, ours: Sparse, x: Tensor) -> nn.Module:
    """The peer; `MissingPeerError`, in the peer's own words, where it refuses such a call."""
    try:
        peer(x)
    except (RuntimeError, AssertionError, ValueError) as refusal:
        words = str(refusal).splitlines()[0]
        raise peers.MissingPeerError(f"refuses {x.shape[0]} tokens: {words}") from refusal
    check_agreement(name, peer, ours, x)
    return peer


def page_table(results: list[dict[str, Any]]) -> str:
    """The table of docs/performance.md, from the results of a record."""
    lines = ["| layer, decoding | dtype | contestant | min ms | median ms | against moec | of memory |"]
    lines.append("|---" * 7 + "|")
    for result in results:
        label, dtype = f"{result['case']} ({result['experts_used']:.1f} used)", result["dtype"]
        for name, row in result["times"].items():
            clock = f"{row['min_ms']:.2f} | {row['median_ms']:.2f} | {row['median_ratio']:.2f}"
            lines.append(
                f"| {label} | {dtype} | {name} | {clock} | {result['limit_ms'] / row['median_ms']:.0%} |"
            )
            label = dtype = ""
    return "\n".join(lines)


def show(result: Result) -> None:
    """Print one case as a table."""
    title = f"{result.case}, {result.dtype}, {result.experts_used:.1f} experts used"
    table = Table(title=title, title_justify="left")
    for column in ("", "min ms", "median ms", "x median", "of memory"):
        table.add_column(column, justify="right" if column else "left", min_width=0 if column else 28)
    for name, row in result.times.items():
        cells = (f"{row['min_ms']:.2f}", f"{row['median_ms']:.2f}", f"{row['median_ratio']:.2f}")
        table.add_row(name, *cells, f"{result.limit_ms / row['median_ms']:.0%}")
    for name, reason in result.missing.items():
        table.add_row(name, reason)
    _CONSOLE.print(table)


def main() -> None:
    """Run the cases, print them, and write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=32)
    parser.add_argument("--experts", type=int, choices=EXPERTS, action="append")
    parser.add_argument("--tokens", type=int, choices=TOKENS, action="append")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--peers", action="append", default=[])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    sys.path.extend(arguments.peers)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    record: dict[str, Any] = {"command": command("decode", arguments.peers)}
    record |= {"machine": machine.describe(), "limits": machine.limits(), "cases": []}
    _CONSOLE.print(record["machine"], record["limits"])
    speed = record["limits"]["read_gb_per_s"]
    made = product(arguments.dtype or DTYPES, arguments.experts or EXPERTS, (False, True))
    for dtype, experts, residual in made:
        for kind, (ours, others) in layers(experts, residual, DTYPES[dtype]).items():
            for tokens in arguments.tokens or TOKENS:
                result = measure(kind, ours, others, tokens, arguments.rounds, speed)
                show(result)
                record["cases"].append(vars(result))
    page.record(record, arguments.out, RESULTS, page_table)
    _CONSOLE.print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
