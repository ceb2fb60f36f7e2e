"""Whole-model generation on a CPU against transformers: the same sparse model, the same greedy tokens.

    python -m benchmarks.generation [--threads 2] [--rounds 3] [--new 64] [--only mixtral] [--uncompiled]

Each case is a dense model, compiled by moec into a sparse one, whose weights are then given to transformers'
own class of that sparse model. Logits are compared first, then every contender's tokens, then contenders take
turns, round after round: a call with a prompt of 64 random tokens a row that writes `--new` tokens a row, and
one that writes a single token (reading the prompt). Making the decoder and compiling are not timed, and
`--uncompiled` leaves those out that torch.compile needs minutes for. float32.
The limit: the weights that a step needs, read once at the speed of this machine's memory in the same run.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import machine, page
from benchmarks.generation_cases import CASES, Case, compiled, difference, prompts
from benchmarks.peers_generation import WAYS, ExpertsUsed, Generate, Way, transformers
from benchmarks.race import Timing, race
from moec.program import Program
from moec.runtime.generation.generate import generate

#: Largest difference of logits, relative to the largest of them, of the same function in fp32.
SAME = 1e-5
PROMPT = 64
EMBEDDING = "model.embed_tokens.weight"
RESULTS = page.RESULTS / "generation.json"
_CONSOLE = Console(width=130)


@dataclass
class Result:
    """One case at one batch size. `times`: by contender; `limit_ms`: of a step, by what it has to read."""

    case: str
    rows: int
    prompt: int
    new: int
    difference_of_logits: float = 0.0
    times: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    experts_used: float = 0.0
    step_gb: float = 0.0
    limit_ms: float = 0.0


def measure(
    case: Case, batches: list[int], new: int, rounds: int, gb_per_s: float, ways: Mapping[str, Way]
) -> list[Result]:
    """One case at several batch sizes, against these ways of transformers."""
    program, twin = compiled(case)
    ours = contenders(program, PROMPT + new)
    theirs = {name: transformers(twin, way) for name, way in ways.items()}
    results = []
    for rows in batches:
        tokens = prompts(case, rows, PROMPT)
        result = Result(f"{case.name}: {case.size}", rows, PROMPT, new)
        result.difference_of_logits = compare_logits(program, twin, tokens)
        result.experts_used = round(ExpertsUsed.of(twin, tokens, new), 2)
        result.step_gb = round(gigabytes(program, result.experts_used, EMBEDDING), 4)
        result.limit_ms = round(result.step_gb / gb_per_s * 1e3, 2)
        able = agreeing({**ours, **theirs}, tokens, new, result)
        result.times = timed(able, tokens, new, rounds)
        results.append(result)
    return results


def contenders(program: Program, length: int) -> dict[str, Generate]:
    """Ours, the first of which the others are held against."""
    decoder = program.decoder(length, packed=True)

    def write(tokens: Tensor, new: int) -> Tensor:
        out = generate(decoder, tokens, new)
        assert isinstance(out, Tensor)
        return out[:, tokens.shape[1] :]

    return {"moec": write}


@torch.no_grad()
def compare_logits(program: Program, twin: PreTrainedModel, tokens: Tensor) -> float:
    """How far the whole program's logits are from its twin's; raises AssertionError where that is much."""
    apart = difference(program(tokens), twin(tokens).logits)
    if apart > SAME:
        raise AssertionError(f"logits of transformers and moec differ by {apart:.1e}")
    return apart


def gigabytes(program: Program, experts_used: float, looked_up: str) -> float:
    """What a step reads of the weights: experts as used, all else once, but for what is only `looked_up`."""
    experts = {name for name in program.origins if program.origins[name].experts}
    total = 0.0
    for name, weight in program.named_parameters():
        share = experts_used / weight.shape[0] if name in experts else float(name != looked_up)
        total += share * weight.nbytes
    return total / 1e9


def agreeing(
    contenders: dict[str, Generate], tokens: Tensor, new: int, result: Result
) -> dict[str, Generate]:
    """Those that write what the first one writes; also warms them up, twice, since the second call compiles.

    A peer that fails is recorded with its error and left out; one that writes other tokens is an error.
    """
    able: dict[str, Generate] = {}
    expected: Tensor | None = None
    for name, write in contenders.items():
        try:
            write(tokens, 2)
            found = write(tokens, new)
        except Exception as error:
            if expected is None:
                raise
            result.failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        expected = found if expected is None else expected
        check_tokens(found, expected, name)
        able[name] = write
    return able


def check_tokens(found: Tensor, expected: Tensor, who: str) -> None:
    """Raise AssertionError where a contender wrote other tokens; both i64 [B, n]."""
    if found.shape != expected.shape:
        raise AssertionError(f"{who} wrote tokens {list(found.shape)}, not {list(expected.shape)}")
    if not torch.equal(found, expected):
        row, place = (found != expected).nonzero()[0].tolist()
        raise AssertionError(f"{who} writes another token in row {row} at {place}")


def timed(
    contenders: dict[str, Generate], tokens: Tensor, new: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Seconds, tokens a second and milliseconds a step of each, and ratios to the first within rounds."""

    def calls(count: int) -> dict[str, Callable[[], object]]:
        return {name: partial(write, tokens, count) for name, write in contenders.items()}

    first = race(calls(1), rounds, warm_up=1)
    whole = race(calls(new), rounds, warm_up=0)
    ours = next(iter(whole.values()))
    return {name: _row(first[name], whole[name], ours, tokens.shape[0], new) for name in contenders}


def _row(first: Timing, whole: Timing, ours: Timing, rows: int, new: int) -> dict[str, float]:
    found = {
        "min_s": whole.best,
        "median_s": whole.median,
        "tokens_per_s": rows * new / whole.best,
        "first_token_ms": first.best * 1e3,
        "step_ms": (whole.best - first.best) / (new - 1) * 1e3,
        "min_ratio": whole.best / ours.best,
        "median_ratio": statistics.median(map(truediv, whole.seconds, ours.seconds)),
    }
    return {name: round(value, 4) for name, value in found.items()}


_COLUMNS = {
    "tokens_per_s": ("tokens/s", "{:.1f}"),
    "first_token_ms": ("first token ms", "{:.0f}"),
    "step_ms": ("step ms", "{:.1f}"),
    "min_ratio": ("x min", "{:.2f}"),
    "median_ratio": ("x median", "{:.2f}"),
}


def show(result: Result) -> None:
    """Print one case as a table."""
    table = Table(title=f"{result.case}; {result.rows} rows", title_justify="left")
    for heading in ("", *(heading for heading, _ in _COLUMNS.values()), "of the limit"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, row in result.times.items():
        cells = [spelling.format(row[key]) for key, (_, spelling) in _COLUMNS.items()]
        table.add_row(name, *cells, f"{result.limit_ms / row['step_ms']:.0%}")
    for name, reason in result.failed.items():
        table.add_row(name, reason)
    _CONSOLE.print(table)


def page_table(results: list[dict[str, Any]]) -> str:
    """The table of docs/performance.md, from the results of a record."""
    headings = [heading for heading, _ in _COLUMNS.values()]
    lines = [f"| model | rows | contestant | {' | '.join(headings)} | of the limit |"]
    lines.append("|---" * (len(headings) + 4) + "|")
    for result in results:
        label, rows = result["case"], str(result["rows"])
        for name, row in result["times"].items():
            cells = " | ".join(spelling.format(row[key]) for key, (_, spelling) in _COLUMNS.items())
            share = result["limit_ms"] / row["step_ms"]
            lines.append(f"| {label} | {rows} | {name} | {cells} | {share:.0%} |")
            label, rows = "", ""
    return "\n".join(lines)


def main() -> None:
    """Run the cases, print them, and write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=__doc__)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rows", type=int, action="append")
    parser.add_argument("--uncompiled", action="store_true")
    parser.add_argument("--only", choices=CASES, action="append")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    ways = {name: way for name, way in WAYS.items() if not (arguments.uncompiled and way.compiled)}
    record: dict[str, Any] = {"command": f"python -m benchmarks.generation {' '.join(sys.argv[1:])}".strip()}
    record |= {"machine": machine.describe(), "limits": machine.limits(), "cases": []}
    _CONSOLE.print(record["machine"], record["limits"])
    for name in arguments.only or CASES:
        rows, speed = arguments.rows or [1, 8], record["limits"]["read_gb_per_s"]
        for result in measure(CASES[name], rows, arguments.new, arguments.rounds, speed, ways):
            show(result)
            record["cases"].append(vars(result))
    page.record(record, arguments.out, RESULTS, page_table)
    _CONSOLE.print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
