"""What a shallower student saves: teacher and student of `benchmarks.students` generate side by side.

    python -m benchmarks.students_speed [--work build/students] [--rounds 15] [--threads 1]

Both write on from the same prompts, greedily, taking turns round after round; times are ratios within one
run. The table goes into `docs/experiments.md`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import moec
from benchmarks import machine
from benchmarks.page import RESULTS, record
from benchmarks.race import Timing, race
from benchmarks.students import PAGE, STUDENTS, TEACHER, folder_of
from moec.program import Program
from moec.runtime.data import load_text

OWN = RESULTS / "students_speed.json"
PROMPT, NEW = 32, 32


def measure(work: Path, rounds: int, rows: int) -> list[dict[str, Any]]:
    """Milliseconds a step of `rows` rows, of the teacher of seed 0 and of its student."""
    names = TEACHER, list(STUDENTS)[-1]
    programs = {name: moec.load(folder_of(name, 0, work)).eval() for name in names}
    prompts = next(load_text(sequence=PROMPT).held_out_batches(rows))[0]
    timings = race({name: _writing(program, prompts) for name, program in programs.items()}, rounds)
    teacher = timings[TEACHER]
    return [_case(name, programs[name], timings[name], teacher, rows) for name in names]


def _writing(program: Program, prompts: torch.Tensor) -> Any:
    return lambda: program.generate(prompts, NEW)


def _case(name: str, program: Program, timing: Timing, teacher: Timing, rows: int) -> dict[str, Any]:
    return {
        "program": name, "rows": rows, "parameters": program.num_parameters(),
        "active": program.num_parameters(active=True),
        "ms": [timing.best / NEW * 1e3, timing.median / NEW * 1e3],
        "faster": [teacher.best / timing.best, teacher.median / timing.median],
    }  # fmt: skip


def table(cases: list[dict[str, Any]]) -> str:
    """The cases as a Markdown table."""
    heads = "program", "rows", "parameters", "active", "ms a token, best / median", "× teacher"
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for case in cases:
        ms, faster = ("{:.2f} / {:.2f}".format(*case[key]) for key in ("ms", "faster"))
        cells = [
            case["program"],
            str(case["rows"]),
            f"{case['parameters']:,}",
            f"{case['active']:,}",
            ms,
            faster,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write the record and the page."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--work", type=Path, default=Path("build/students"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OWN)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    told = {"machine": machine.describe(), "rounds": options.rounds}
    cases = [case for rows in (1, 8) for case in measure(options.work, options.rounds, rows)]
    print(table(cases))
    record({**told, "cases": cases}, options.out, OWN, table, PAGE)


if __name__ == "__main__":
    main()
