"""Experiments of several variants and seeds: one run, the runs that are kept, means and spreads.

What the experiments differ in is the program of a variant, and by what it is taught; how it is trained and
measured is here.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import machine
from moec.plan import Train
from moec.program import Program
from moec.runtime.data import TextData
from moec.runtime.distillation.teaching import Teaching
from moec.runtime.evaluate import Evaluation, evaluate
from moec.runtime.train import Trainer


@dataclass(frozen=True)
class Run:
    """One training run. `bits`: bits per byte on held-out text; `curve`: step → bits on a part of it."""

    variant: str
    seed: int
    bits: float
    parameters: int
    active: int
    tokens_per_second: float
    tokens_per_cpu_second: float
    seconds: float
    busiest: Mapping[str, float]
    curve: Mapping[str, float] = field(default_factory=dict)


class Results:
    """The finished runs, in a JSON file that is written after each of them.

    `conditions`: all that has to be equal for two runs to be compared, as JSON; `variants` among them, which
    may become more.
    """

    def __init__(self, path: Path, conditions: Mapping[str, Any]) -> None:
        self.path, self.conditions = path, dict(conditions)
        self.runs: list[Run] = []
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            self._require_same_conditions(kept["conditions"])
            self.runs = [Run(**run) for run in kept["runs"]]

    def _require_same_conditions(self, kept: Mapping[str, Any]) -> None:
        """Runs under other conditions do not belong into one table, and are not to be lost either."""
        # A variant more does not touch the others.
        now = {**self.conditions, "variants": {**kept["variants"], **self.conditions["variants"]}}
        then = {**kept, "variants": {**self.conditions["variants"], **kept["variants"]}}
        differing = [key for key in now if now[key] != then.get(key)]
        if differing:
            raise SystemExit(
                f"{self.path}: runs under another {', '.join(differing)}; "
                "give --out another file (and --pages nothing), or remove this one"
            )

    def has(self, variant: str, seed: int) -> bool:
        """Whether this run is among the finished ones."""
        return any(run.variant == variant and run.seed == seed for run in self.runs)

    def add(self, run: Run) -> None:
        """Keep `run`, and write the file."""
        self.runs.append(run)
        runs = [asdict(run) for run in self.runs]
        told = {"machine": machine.describe(), "conditions": self.conditions, "runs": runs}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".partial")
        draft.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        draft.replace(self.path)


@dataclass(frozen=True)
class Course:
    """How a run is trained and measured: on which text, and on how many held-out batches in the end."""

    settings: Train
    data: TextData
    final_batches: int
    console: Console

    @property
    def num_tokens(self) -> int:
        """What a run learns from."""
        return self.settings.steps * self.settings.batch * self.settings.sequence


def train_and_measure(
    program: Program, variant: str, seed: int, course: Course, teaching: Teaching | None = None
) -> Run:
    """Train `program` in place, its run called `variant` and `seed`, and measure it on held-out text.

    Batches are drawn by the seed of `course.settings`, which need not be that of the run.
    """
    settings, data = course.settings, course.data
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        result = Trainer(program, settings, data, folder, console=course.console, teaching=teaching).run()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    last = evaluate(program, data, settings, batches=course.final_batches)
    return Run(
        variant, seed, last.bits, program.num_parameters(), program.num_parameters(active=True),
        tokens_per_second=result.tokens_per_second, tokens_per_cpu_second=course.num_tokens / cpu,
        seconds=wall, busiest=busiest(last),
        curve={str(e.step): e.evaluation.bits for e in result.evaluations},
    )  # fmt: skip


def busiest(evaluation: Evaluation) -> dict[str, float]:
    """Rows of the busiest expert over the mean, for each layer."""
    return {layer: load.max_over_mean for layer, load in evaluation.load.items()}


def spread(values: Iterable[float], digits: int) -> str:
    """Mean ± standard deviation over the seeds (the mean alone when there is one)."""
    seen = list(values)
    mean = f"{statistics.mean(seen):,.{digits}f}"
    return f"{mean} ± {statistics.stdev(seen):,.{digits}f}" if len(seen) > 1 else mean
