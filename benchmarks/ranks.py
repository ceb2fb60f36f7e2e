"""Training steps on two ranks of one thread, against expert parallelism of other libraries; float32, gloo.

    python -m benchmarks.ranks [--rounds 15] [--only top-1] [--peers DIR]... [--out FILE.json]

A step is forward, backward, and the sum of the gradients over the ranks. Every contender has the same
weights and the same tokens on each rank, and its gradients are compared with ours first; ours are compared
with those of the program in a single process. Contenders take turns in the same two processes; the time of a
round is that of the slower rank; busy is the processor time of both, which others on the machine change less.
`--peers` names folders in which further libraries are found.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import truediv
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.utils.flop_counter import FlopCounterMode

import moec
from benchmarks import machine
from benchmarks.peers import MissingPeerError
from benchmarks.race import Timing, race
from benchmarks.rank_cases import CASES, Case, batch_of
from benchmarks.rank_steps import Batch, Gradients, Step, difference, gradient_error, step_of_program
from moec.program import Program
from moec.runtime.mesh import connected

RANKS = 2
#: Largest gradient difference, relative to the largest gradient of a parameter, of the same function in fp32.
SAME = 1e-4
_CONSOLE = Console(width=130)


@dataclass
class Result:
    """One case: times, gradient differences, who was missing, and the limit of this run in milliseconds."""

    case: str
    tokens_per_rank: int
    times: dict[str, dict[str, float]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    error_of_ours: dict[str, float] = field(default_factory=dict)
    difference_to_ours: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    limit: dict[str, float] = field(default_factory=dict)


def measure(case: Case, rounds: int, peaks: Peaks) -> Result:
    """Run one case; every rank calls it, and gets the same times."""
    size, batch = case.size, batch_of(case.size)
    torch.manual_seed(0)
    dense = case.dense(size, size.hidden)
    programs = {name: compiled(dense, table) for name, table in case.moe.items()}
    reference = next(iter(programs.values()))
    result = Result(case.name, size.tokens)
    assert reference.layout is not None
    with connected(reference.layout.mesh):
        result.limit = limits(case, reference, batch, peaks)
        steps = {name: _ours(name, program, batch, result) for name, program in programs.items()}
        gradients = next(iter(steps.values())).gradients()
        for name, make in case.peers(dense, reference, batch).items():
            try:
                steps[name] = make()
            except MissingPeerError as reason:
                result.missing[name] = str(reason)
                continue
            if name not in case.loose:
                compare(name, steps[name], gradients, result)
        if rounds:
            result.times = _times(race(steps, rounds, before=dist.barrier))
    return result


def compiled(dense: nn.Module, moe: dict[str, Any]) -> Program:
    """The sparse program on all ranks, its experts dealt out to them."""
    ranks = dist.get_world_size()
    plan = {"moe": moe, "parallel": {"expert": ranks}}
    return moec.compile(dense, plan, world=ranks, verify="off").train()


def _ours(name: str, program: Program, batch: Batch, result: Result) -> Step:
    local = program.partition(dist.get_rank())
    step = step_of_program(local, batch)
    error = gradient_error(step, local, program, batch)
    result.error_of_ours[name], result.losses[name] = error, step.total()
    if error > SAME:
        raise AssertionError(f"{name}: gradients differ from the single process by {error:.1e}")
    return step


def compare(name: str, step: Step, ours: Gradients, result: Result) -> None:
    """Record how far a peer's gradients are from ours; raise where they are not the same."""
    apart = difference(step.gradients(), ours)
    result.difference_to_ours[name], result.losses[name] = apart, step.total()
    if apart > SAME:
        raise AssertionError(f"{name} and moec have gradients that differ by {apart:.1e}")


@dataclass(frozen=True)
class Peaks:
    """GFLOP/s of one rank's products while all ranks compute: by the clock, and by its processor time."""

    gflops: float
    busy_gflops: float


def limits(case: Case, program: Program, batch: Batch, peaks: Peaks) -> dict[str, float]:
    """What a step costs at least here: its products at the measured peak, its messages as measured alone.

    The products are those of a dense model of the same active width; a layer sends rows four times.
    `sum_ms` by the clock; `sum_busy_ms`: processor time, of all ranks together.
    """
    layers, gflop = len(program.moe_settings()), _products(case, batch)
    rows = torch.randn(case.size.tokens * case.top_k, case.size.width)
    experts = {name for name in program.origins if program.origins[name].experts}
    shared = sum(p.numel() for name, p in program.named_parameters() if name not in experts)
    flat, received = torch.randn(shared), torch.empty_like(rows)
    messages: dict[str, Callable[[], object]] = {
        "all_to_all": lambda: dist.all_to_all_single(received, rows),
        "all_reduce": lambda: dist.all_reduce(flat),
    }
    alone = {name: slower(timing) for name, timing in race(messages, 9, 2, dist.barrier).items()}
    rows_ms, sums_ms = (alone[name].best * 1e3 for name in messages)
    rows_busy, sums_busy = (min(alone[name].busy) * 1e3 for name in messages)
    products_ms, products_busy = (gflop / peak * 1e3 for peak in (peaks.gflops, peaks.busy_gflops))
    found = {
        "gflop": gflop,
        "products_ms": products_ms,
        "all_to_alls": 4 * layers,
        "all_to_all_ms": rows_ms,
        "all_to_all_gb_per_s": rows.nbytes / 2 / rows_ms / 1e6,
        "all_reduce_ms": sums_ms,
        "all_reduce_mb": flat.nbytes / 1e6,
        "sum_ms": products_ms + 4 * layers * rows_ms + sums_ms,
        "sum_busy_ms": RANKS * products_busy + 4 * layers * rows_busy + sums_busy,
    }
    return {name: round(value, 3) for name, value in found.items()}


def _products(case: Case, batch: Batch) -> float:
    """GFLOP of forward and backward of the dense model whose feed-forwards are as wide as the chosen
    experts."""
    with FlopCounterMode(display=False) as counter:
        out = case.dense(case.size, case.size.hidden * case.top_k)(batch.here.tokens)
        (out if isinstance(out, torch.Tensor) else out.logits).sum().backward()
    return counter.get_total_flops() / 1e9


def slower(timing: Timing) -> Timing:
    """The times of each round on the slower rank, and the processor time of all."""
    seconds, busy = (torch.tensor(times, dtype=torch.float64) for times in (timing.seconds, timing.busy))
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    dist.all_reduce(busy)
    return Timing(timing.name, tuple(seconds.tolist()), tuple(busy.tolist()))


def _times(timings: dict[str, Timing]) -> dict[str, dict[str, float]]:
    """As recorded; `median_ratio` is that of the ratios within each round, in which the load is alike."""
    jobs = {name: slower(timing) for name, timing in timings.items()}
    first = next(iter(jobs.values()))
    return {
        name: {
            "min_ms": round(timing.best * 1e3, 2),
            "median_ms": round(timing.median * 1e3, 2),
            "min_ratio": round(timing.best / first.best, 3),
            "median_ratio": round(statistics.median(map(truediv, timing.seconds, first.seconds)), 3),
            "busy_ms": round(min(timing.busy) * 1e3, 2),
            "busy_ratio": round(min(timing.busy) / min(first.busy), 3),
        }
        for name, timing in jobs.items()
    }


def show(result: Result) -> None:
    """Print one case as a table."""
    title = f"{result.case}, {result.tokens_per_rank} tokens a rank"
    table = Table(title=title, title_justify="left")
    columns = "min ms, median ms, x min, x median, busy ms, x busy, of limit, gradients"
    table.add_column()
    for column in columns.split(", "):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in result.times.items():
        keys = ("min_ms", "median_ms", "min_ratio", "median_ratio", "busy_ms", "busy_ratio")
        cells = [f"{row[key]:.{1 if key.endswith('ms') else 2}f}" for key in keys]
        share = result.limit["sum_busy_ms"] / row["busy_ms"]
        table.add_row(name, *cells, f"{share:.0%}", _exactness(name, result))
    for name, reason in result.missing.items():
        table.add_row(name, reason)
    _CONSOLE.print(table)
    _CONSOLE.print("limit:", result.limit)


def _exactness(name: str, result: Result) -> str:
    if name in result.error_of_ours:
        return f"{result.error_of_ours[name]:.0e} from one process"
    apart = result.difference_to_ours.get(name)
    return "drops other tokens" if apart is None else f"{apart:.0e} from ours"


def page_table(cases: list[dict[str, Any]]) -> str:
    """The table of docs/performance.md, from the cases of a record."""
    lines = [
        "| case | contestant | min ms | median ms | against moec | busy ms | against moec | of the limit |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for case in cases:
        label = case["case"]
        for name, row in case["times"].items():
            share = case["limit"]["sum_busy_ms"] / row["busy_ms"]
            clock = f"{row['min_ms']:.0f} | {row['median_ms']:.0f} | {row['min_ratio']:.2f}"
            busy = f"{row['busy_ms']:.0f} | {row['busy_ratio']:.2f}"
            lines.append(f"| {label} | {name} | {clock} | {busy} | {share:.0%} |")
            label = ""
    return "\n".join(lines)


@contextmanager
def joined(rank: int, port: int, ranks: int = RANKS) -> Iterator[None]:
    """Inside, this process is one of `ranks` that meet at `port` of this machine: one thread, on one core."""
    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # Linux
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    dist.init_process_group("gloo")
    yield
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def run_rank(rank: int, port: int, names: list[str], rounds: int, out: Path, peers: list[str]) -> None:
    """One of the processes: joins the others, runs the cases; rank 0 prints and writes the record."""
    sys.path.extend(peers)
    with joined(rank, port):
        words = ["DIR" if word in peers else word for word in sys.argv[1:]]
        record: dict[str, Any] = {"command": " ".join(["python -m benchmarks.ranks", *words])}
        record |= {"ranks": RANKS, "machine": machine.describe(), "peaks": machine.limits(), "cases": []}
        found = (record["peaks"][name] for name in ("gflops", "gflops_a_busy_core"))
        both = torch.tensor([*found], dtype=torch.float64)
        dist.all_reduce(both, dist.ReduceOp.MIN)
        peaks = Peaks(*both.tolist())
        for name in names:
            result = measure(CASES[name], rounds, peaks)
            record["cases"].append(vars(result))
            if rank == 0:
                show(result)
        if rank == 0:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            _CONSOLE.print(record["machine"], record["peaks"], f"written to {out}")


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=CASES, action="append")
    parser.add_argument("--peers", action="append", default=[])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ranks.json"))
    arguments = parser.parse_args()
    names = arguments.only or list(CASES)
    spawn(run_rank, (free_port(), names, arguments.rounds, arguments.out, arguments.peers), nprocs=RANKS)


if __name__ == "__main__":
    main()
