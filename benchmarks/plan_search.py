"""The search against the paper's own arrangements of ranks, for the models that it serves.

    python -m benchmarks.plan_search             # the record, and the table in docs/paper.md
    python -m benchmarks.plan_search --one NAME  # one model, in this process, as JSON

Both are asked for the same job: the next token of 8 sequences for every data rank that the paper's
arrangement has, with 1024 positions, on as many A100 as the paper had. The paper's arrangement: as many
tensor ranks as it prints, experts over 128 ranks, what is left of the ranks slices them; rows travel in two
steps, shared where there are tensor ranks.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.page import write_table

RESULTS = Path(__file__).parent / "results" / "plan_search.json"
PAPER = Path(__file__).parents[1] / "docs" / "paper.md"
RANKS = {
    "1.3B+MoE-128": 128,
    "2.4B+MoE-128": 128,
    "8B+MoE-128": 128,
    "24B+MoE-128": 256,
    "47B+MoE-128": 256,
}
ROWS, POSITIONS = 8, 1024


@dataclass(frozen=True)
class Searched:
    """One model: seconds of a token by the `paper`'s arrangement and by the `best` one, what these are
    (`paper_plan`, `best_plan`), arrangements tried, programs lowered, seconds of processor time to capture
    and to search."""

    name: str
    ranks: int
    paper: float | None
    paper_memory: int
    paper_plan: str
    best: float
    best_plan: str
    tried: int
    shapes: int
    capture_seconds: float
    search_seconds: float


def measure(name: str) -> Searched:
    """Search for one model in this process."""
    import torch

    from benchmarks.paper_models import SERVED, Place, compiled
    from moec.cost.machine.hardware import Hardware
    from moec.plan import Parallel
    from moec.planning.job import Job
    from moec.planning.search import Search, search

    torch.set_num_threads(1)
    served, world = SERVED[name], RANKS[name]
    start = time.process_time()
    program, hardware = compiled(served), Hardware.shipped(f"a100x{world}")
    captured = time.process_time()
    batch = ROWS * world // served.tensor
    found = search(program, hardware, batch=batch, past=POSITIONS, check=0)
    done = time.process_time()
    place = Place.of(served, world)
    own = Parallel(
        data=world // served.tensor, tensor=served.tensor, expert=place.expert, slice=place.slice,
        all_to_all="auto" if served.tensor > 1 else "hierarchical", node=hardware.per_node,
    )  # fmt: skip
    job = Job.of(program, "latency", world, batch=batch, past=POSITIONS)
    theirs = Search(program, job, hardware, hardware.device.memory).outcome(own, ROWS)
    return Searched(
        name,
        world,
        theirs.seconds if theirs.fits else None,
        theirs.memory["total"],
        spelled_plan(own),
        found.best.seconds,
        spelled_plan(found.best.parallel),
        len(found.ranked) + len(found.refused),
        found.shapes,
        round(captured - start, 1),
        round(done - captured, 1),
    )


def spelled_plan(parallel: object) -> str:
    """`tensor 4, expert 128, slice 1, flat`."""
    names = ("tensor", "expert", "slice")
    numbers = ", ".join(f"{name} {getattr(parallel, name)}" for name in names)
    return f"{numbers}, {getattr(parallel, 'all_to_all')}"  # noqa: B009 - the plan is read when it runs


def measure_apart(name: str) -> Searched:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.plan_search", "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return Searched(**json.loads(done.stdout.splitlines()[-1]))


def table(rows: list[Searched]) -> str:
    """The rows as a Markdown table; seconds of searching are processor time."""
    lines = [
        "| model | ranks | paper's arrangement | ms | best found | ms "
        "| tried | lowered | capture s | search s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        paper = "does not fit" if row.paper is None else f"{1e3 * row.paper:.2f}"
        lines.append(
            f"| {row.name} | {row.ranks} | {row.paper_plan} | {paper} "
            f"| {row.best_plan} | {1e3 * row.best:.2f} | {row.tried} | {row.shapes} "
            f"| {row.capture_seconds} | {row.search_seconds} |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """The table, or one model."""
    if arguments[:1] == ["--one"]:
        print(json.dumps(asdict(measure(arguments[1]))))
        return
    rows = [measure_apart(name) for name in RANKS]
    RESULTS.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    write_table(PAPER, RESULTS.stem, table(rows))
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
