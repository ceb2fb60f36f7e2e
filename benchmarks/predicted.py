"""Predicted against measured on this machine: whole training steps, forward runs and decoded tokens.

    python -m benchmarks.predicted [--hardware FILE.toml] [--rounds 11] [--only WORD]... [--explain WORD]
                                   [--out FILE.json]

Without a hardware file, or where there is none yet, the machine is calibrated first (`moec calibrate`, about
three minutes). Every point is
predicted before anything of it is measured, and none has a size that was calibrated. Points take turns, round
after round. A prediction is held against the fastest round: what the code takes when the machine lets it; the
median is beside it. Two ranks are two processes of one thread; the slower one counts.

`--explain` sets one point's operators side by side, predicted and measured where they stand in the program.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.multiprocessing.spawn import spawn

from benchmarks import machine, page
from benchmarks.predicted_points import ALONE, TOGETHER, Point
from benchmarks.race import Timing, race
from benchmarks.ranks import free_port, slower
from moec.calibration.calibrate import calibrate
from moec.calibration.clock import Stopwatch
from moec.calibration.operators import Sights
from moec.calibration.references import Shape
from moec.calibration.written import write
from moec.cost import Hardware, Prediction
from moec.runtime.mesh import connected

RESULTS = page.RESULTS / "predicted.json"
_CONSOLE = Console(width=150)


def predicted(point: Point, hardware: Hardware) -> dict[str, Any]:
    """A prediction as it is recorded."""
    found: Prediction = point.predict(hardware)
    kinds = {kind: round(seconds * 1e3, 4) for kind, seconds in found.by("kind").items() if seconds}
    return {
        "case": point.name,
        "point": asdict(point),
        "predicted_ms": round(found.seconds * 1e3, 4),
        "predicted_by_kind_ms": kinds,
        "unmeasured": list(found.unmeasured),
    }


def measured(timing: Timing) -> dict[str, float]:
    """What was measured, as it is recorded."""
    return {
        "min_ms": round(timing.best * 1e3, 4),
        "median_ms": round(timing.median * 1e3, 4),
        "busy_ms": round(min(timing.busy) * 1e3, 4),
    }


def error(case: dict[str, Any]) -> float:
    """By how much the prediction is above what was measured; below: negative."""
    return float(case["predicted_ms"] / case["min_ms"] - 1.0)


def run_alone(points: tuple[Point, ...], rounds: int) -> dict[str, dict[str, float]]:
    """Measure points of one process, taking turns."""
    runs = {point.name: (point.run(), point.in_a_row) for point in points}
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for round_ in range(rounds + 1):
        for name, (run, in_a_row) in runs.items():
            seconds = seconds_in_a_row(run, in_a_row)
            if round_:
                times[name].append(seconds)
    return {name: measured(Timing(name, *zip(*here, strict=True))) for name, here in times.items()}


def seconds_in_a_row(run: Callable[[], object], count: int) -> tuple[float, float]:
    """(by the clock, of the processor) of one of `count` runs, after one that brings back into the caches
    what the point before it has displaced."""
    run()
    busy, begin = time.process_time(), time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - begin) / count, (time.process_time() - busy) / count


def run_together(points: tuple[Point, ...], rounds: int, out: Path) -> dict[str, dict[str, float]]:
    """Measure points of two ranks, in two processes."""
    spawn(_run_rank, ([free_port() for _ in points], points, rounds, out), nprocs=2)
    found: dict[str, dict[str, float]] = torch.load(out, weights_only=True)
    out.unlink()
    return found


def _run_rank(rank: int, ports: list[int], points: tuple[Point, ...], rounds: int, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # Linux: a core for each
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    found = {}
    for port, point in zip(ports, points, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        layout = point.program.layout
        assert layout is not None
        with connected(layout.mesh):
            timing = race({point.name: point.run()}, rounds, before=dist.barrier)[point.name]
            found[point.name] = measured(slower(timing))
            dist.barrier()
    if rank == 0:
        torch.save(found, out)


def page_table(cases: list[dict[str, Any]]) -> str:
    """The table of the page, from the cases of a record."""
    lines = ["| point | predicted ms | measured ms (min) | median | error |", "|---|---|---|---|---|"]
    for case in cases:
        numbers = " | ".join(f"{case[key]:.2f}" for key in ("predicted_ms", "min_ms", "median_ms"))
        lines.append(f"| {case['case']} | {numbers} | {error(case):+.1%} |")
    errors = sorted(abs(error(case)) for case in cases)
    lines.append("")
    lines.append(
        f"Median error {statistics.median(errors):.1%}, worst {errors[-1]:.1%}, {len(errors)} points."
    )
    return "\n".join(lines)


def show(cases: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table()
    for column in (
        "point",
        "predicted ms",
        "min ms",
        "median ms",
        "busy ms",
        "error",
        "of busy",
        "not measured",
    ):
        table.add_column(column, justify="left" if column == "point" else "right", no_wrap=True)
    for case in cases:
        cells = [f"{case[key]:.2f}" for key in ("predicted_ms", "min_ms", "median_ms", "busy_ms")]
        of_busy = f"{case['predicted_ms'] / case['busy_ms'] - 1:+.1%}"
        table.add_row(case["case"], *cells, f"{error(case):+.1%}", of_busy, str(len(case["unmeasured"])))
    errors = sorted(abs(error(case)) for case in cases)
    _CONSOLE.print(table)
    _CONSOLE.print(f"median error {statistics.median(errors):.1%}, worst {errors[-1]:.1%}")


def explain(point: Point, hardware: Hardware) -> None:
    """Print one point's operators: predicted, and as they were measured one by one in the program."""
    foreseen: dict[tuple[str, str], float] = defaultdict(float)
    for step in point.predict(hardware).timeline:
        direction = "inference" if point.phase != "training" else step.direction
        foreseen[step.operation.operator, direction] += step.end - step.begin
    sights = Sights(Stopwatch(), 8)
    sizes = (point.vocabulary, point.batch, point.sequence, point.sequence)
    sights.look_at_phase(point.program, Shape(point.width, point.heads, *sizes), point.phase)
    seen: dict[tuple[str, str], float] = defaultdict(float)
    for sight in sights.seen:
        seen[sight.operator, sight.direction] += sight.seconds
    table = Table(title=point.name, title_justify="left")
    for column in ("operator", "direction", "predicted µs", "measured µs", "apart µs"):
        table.add_column(column, justify="right")
    for key in sorted(foreseen.keys() | seen.keys(), key=lambda key: -abs(foreseen[key] - seen[key])):
        apart = foreseen[key] - seen[key]
        table.add_row(*key, *(f"{1e6 * value:.0f}" for value in (foreseen[key], seen[key], apart)))
    _CONSOLE.print(table)
    _CONSOLE.print(
        f"predicted {1e3 * sum(foreseen.values()):.2f} ms, measured {1e3 * sum(seen.values()):.2f}"
    )


def chosen(words: list[str]) -> tuple[tuple[Point, ...], tuple[Point, ...]]:
    """The points whose names have one of the words; all where there are none."""
    alone, together = (
        tuple(point for point in points if not words or any(word in point.name for word in words))
        for points in (ALONE, TOGETHER)
    )
    return alone, together


def hardware_of(path: Path | None) -> Hardware:
    """What the file says; where there is none, what a calibration says, which is written there."""
    if path is not None and path.exists():
        return Hardware.from_toml(path)
    found = calibrate(command="python -m benchmarks.predicted", told=_CONSOLE.print)
    if path is not None:
        write(found, path)
    return found


def main() -> None:
    """Calibrate if need be, predict, measure, compare."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predicted", description=__doc__)
    parser.add_argument("--hardware", type=Path)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--explain")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    hardware = hardware_of(arguments.hardware)
    alone, together = chosen(arguments.only)
    if arguments.explain:
        for point in alone:
            if arguments.explain in point.name:
                explain(point, hardware)
        return
    record: dict[str, Any] = {"command": "python -m benchmarks.predicted", "machine": machine.describe()}
    assert hardware.device.measured is not None
    record["calibration"] = hardware.device.measured.about.model_dump()
    cases = [predicted(point, hardware) for point in (*alone, *together)]
    times = run_alone(alone, arguments.rounds) if alone else {}
    if together:
        times |= run_together(together, arguments.rounds, arguments.out.with_suffix(".pt"))
    record["cases"] = [case | times[case["case"]] for case in cases]
    show(record["cases"])
    page.record(record, arguments.out, RESULTS, page_table)


if __name__ == "__main__":
    main()
