"""The paper's curves, predicted: latency of a token, and memory, beside what was published.

    python -m benchmarks.paper_curves             # everything anew: record and tables of docs/paper.md
    python -m benchmarks.paper_curves --missing   # only what the record does not have yet
    python -m benchmarks.paper_curves --tables    # the tables again, of the record as it is

Nothing is measured here: programs are compiled on `meta`, and times come of the shipped hardware file. The
picture needs matplotlib (`moec[plot]`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import page
from benchmarks.paper_memory import NEEDS, need_of
from benchmarks.paper_models import SERVED, Served, total_parameters
from benchmarks.paper_picture import draw
from benchmarks.paper_points import POINTS, Point, found_of, host_seconds
from benchmarks.paper_tables import tables
from benchmarks.paper_training import RUNS, trained

RESULTS = page.RESULTS / "paper_curves.json"
PAGE = Path(__file__).parents[1] / "docs" / "paper.md"
Record = dict[str, Any]


def key(point: Point) -> str:
    """What a point is called in the record."""
    return f"{point.model.name} · {point.system} · {point.ranks}"


def predicted(point: Point) -> Record:
    """One point as data."""
    found = found_of(point)
    return {
        "figure": point.figure,
        "model": point.model.name,
        "system": point.system,
        "ranks": point.ranks,
        "published": point.published,
        "seconds": found.seconds,
        "by": found.by,
        "host": found.host,
        "supposed": found.supposed,
        "moec": found.moec,
    }


def tasks() -> dict[str, dict[str, Callable[[], Any]]]:
    """Everything that the record holds, by section and name, and how it is made."""
    return {
        "totals": {name: partial(total_parameters, model) for name, model in SERVED.items()},
        "memory": {f"{model.name} · {ranks}": partial(_needed, model, ranks) for model, ranks in NEEDS},
        "points": {key(point): partial(predicted, point) for point in POINTS},
        "training": {run.model.name: partial(trained, run) for run in RUNS},
    }


def _needed(model: Served, ranks: int) -> Record:
    return vars(need_of(model, ranks))


def fill(record: Record, out: Path) -> Record:
    """Add what is missing, one after the other; the file is whole after each."""
    record.setdefault("host_seconds", host_seconds())
    for section, made in tasks().items():
        held = record.setdefault(section, {})
        for name, make in made.items():
            if name not in held:
                held[name] = make()
                out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                print(section, name, flush=True)
    return record


def main() -> None:
    """Predict, record, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--missing", action="store_true", help="only what the record does not have yet")
    parser.add_argument("--tables", action="store_true", help="the tables again, of the record as it is")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    known = chosen.missing or chosen.tables
    record = json.loads(RESULTS.read_text(encoding="utf-8")) if known and RESULTS.exists() else {}
    if not chosen.tables:
        record = fill(record, RESULTS)
    for name, text in tables(record).items():
        page.write_table(PAGE, name, text)
    draw(record)


if __name__ == "__main__":
    main()
