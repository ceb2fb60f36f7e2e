"""A trillion parameters on `meta`: compile the paper's 24B+MoE-128, and take out the programs of two ranks.

    python -m benchmarks.one_trillion            # prints the table of docs/performance.md
    python -m benchmarks.one_trillion --one NAME # one row, measured in this process, as JSON

Beside it, the same layers with fewer parameters, and on fewer and on more ranks: neither may matter. Each row
is measured in a process of its own, so that the peak of memory is its own, with one thread, so that the
processor's time is what it takes on an idle machine.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.memory import peak_bytes


@dataclass(frozen=True)
class Placed:
    """30 layers of `width`, every other one with 128 experts, on `world` ranks: tensor 8, experts over
    `expert` ranks, each shared by `slice`."""

    name: str
    width: int
    world: int
    expert: int
    slice: int


TRILLION = Placed("24B+MoE-128", 8192, 256, 128, 2)
ROWS = (
    TRILLION,
    Placed("24B+MoE-128, 16 ranks", 8192, 16, 8, 2),
    Placed("24B+MoE-128, 4096 ranks", 8192, 4096, 128, 32),
    Placed("width 512", 512, 256, 128, 2),
)


@dataclass(frozen=True)
class Measured:
    """What one row took: `parameters` of the whole and `local` ones of rank 0; processor `seconds` and
    seconds on the clock (`wall`) for compiling (`compile_…`) and for the programs of the first and the last
    rank; `peak_bytes` of memory, with Python and torch."""

    name: str
    parameters: int
    local: int
    compile_seconds: float
    compile_wall: float
    partition_seconds: float
    partition_wall: float
    peak_bytes: int


def measure(row: Placed) -> Measured:
    """Compile one row on `meta` and partition it, in this process."""
    import torch

    import moec
    from examples.gpt import GPT, GPTConfig

    torch.set_num_threads(1)
    plan: dict[str, Any] = {
        "moe": {"layers": "1::2", "experts": 128, "top_k": 1, "capacity_factor": 1.0},
        "parallel": {"tensor": 8, "expert": row.expert, "slice": row.slice},
    }
    start = _clocks()
    with torch.device("meta"):
        dense = GPT(GPTConfig(vocab=50257, seq=2048, layers=30, width=row.width, heads=64))
    program = moec.compile(dense, plan, world=row.world)
    compiled = _clocks()
    first, last = program.partition(0), program.partition(row.world - 1)
    done = _clocks()
    if ast.dump(ast.parse(first.text())) != ast.dump(ast.parse(last.text())):
        raise RuntimeError("the first and the last rank have different programs")
    (seconds, wall), (more, more_wall) = _between(start, compiled), _between(compiled, done)
    peak = peak_bytes()
    total, local = program.num_parameters(), first.num_parameters()
    return Measured(row.name, total, local, seconds, wall, more, more_wall, peak)


def _clocks() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def _between(start: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
    return round(end[0] - start[0], 1), round(end[1] - start[1], 1)


def measure_apart(row: Placed) -> Measured:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.one_trillion", "--one", row.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def table(rows: list[Measured]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| model | ranks | parameters | of rank 0 | compile s | partition two ranks s | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, found in zip(ROWS, rows, strict=True):
        lines.append(
            f"| {found.name} | {row.world} | {found.parameters:,} | {found.local:,} "
            f"| {found.compile_seconds} ({found.compile_wall}) "
            f"| {found.partition_seconds} ({found.partition_wall}) | {found.peak_bytes / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """The table, or one row."""
    if arguments[:1] == ["--one"]:
        row = next(row for row in ROWS if row.name == arguments[1])
        print(json.dumps(asdict(measure(row))))
        return
    print(table([measure_apart(row) for row in ROWS]))


if __name__ == "__main__":
    main(sys.argv[1:])
