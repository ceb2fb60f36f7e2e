"""Experiments of several variants and seeds: one run, the runs that are kept, means and spreads."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import machine
from moec.runtime.evaluate import Evaluation


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


def busiest(evaluation: Evaluation) -> dict[str, float]:
    """Rows of the busiest expert over the mean, for each layer."""
    return {layer: load.max_over_mean for layer, load in evaluation.load.items()}


def spread(values: Iterable[float], digits: int) -> str:
    """Mean ± standard deviation over the seeds (the mean alone when there is one)."""
    seen = list(values)
    mean = f"{statistics.mean(seen):,.{digits}f}"
    return f"{mean} ± {statistics.stdev(seen):,.{digits}f}" if len(seen) > 1 else mean
