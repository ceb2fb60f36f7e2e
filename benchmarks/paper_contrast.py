"""The paper's contrast in one process: decoding with its baseline's expert layer, with others', with ours.

    python -m benchmarks.paper_contrast [--threads 2] [--rounds 3] [--width 1024] [--peers DIR] [--out FILE]

A GPT of four layers shaped as the paper's 52B model (1.3B+MoE-128: heads of 128, feed-forwards 4 × width, 128
experts, top-1, in every other layer), `--width` wide instead of 2048, decoding greedily with a memory of keys
and values after a prompt of 32 tokens a row. The vocabulary is small: its product is the same for everyone.
All contenders use the same weights in memory, and their tokens are compared before they take turns. float32.
The limit: the weights that a step needs, read once at the speed of this machine's memory in the same run.
`--peers` names folders in which further libraries are found.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import moec
from benchmarks import machine
from benchmarks.generation import check_tokens, gigabytes
from benchmarks.paper_layers import CachedGPT, ExpertsInUse, OneHotEinsum, deepspeed
from benchmarks.peers import MissingPeerError
from benchmarks.peers_ranks import ExpertLayer
from benchmarks.race import Timing, race
from examples.gpt import GPT, GPTConfig
from moec.program import Program

BATCHES = (1, 8, 64)
PROMPT = 32
EXPERTS = 128
#: Goes on from a prompt that was read: how many tokens to write, to those tokens i64 [B, steps].
Decode = Callable[[int], Tensor]

LOOP = "PyTorch, loop over experts in use"
BASELINES: dict[str, Callable[[ExpertLayer], nn.Module]] = {
    "PyTorch, one-hot einsum": OneHotEinsum,
    "DeepSpeed MoE": deepspeed,
}
_CONSOLE = Console(width=130)


@dataclass
class Result:
    """One batch size. `times`: by contender, of a step; `limit_ms`: of a step, by what it has to read."""

    model: str
    rows: int
    steps: int
    times: dict[str, dict[str, float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    experts_used: float = 0.0
    step_gb: float = 0.0
    limit_ms: float = 0.0


def compiled(config: GPTConfig, experts: int) -> Program:
    """The sparse GPT: experts in every other layer, drawn anew."""
    torch.manual_seed(0)
    moe = {"layers": "1::2", "experts": experts, "gate": "probability", "init": "fresh", "router_std": 0.1}
    return moec.compile(GPT(config).eval(), {"moe": moe}, verify="off").eval()


def measure(
    program: Program, config: GPTConfig, rows: int, steps: int, rounds: int, gb_per_s: float
) -> Result:
    """All contenders at one batch size."""
    experts = max(settings.experts for settings in program.moe_settings().values())
    name = f"{config.layers} layers, d{config.width} f{4 * config.width} E{experts} K1"
    result = Result(name, rows, steps)
    prompt = torch.randint(config.vocab, (rows, PROMPT), generator=torch.Generator().manual_seed(1))
    in_use = CachedGPT.of(program, config, ExpertsInUse)
    decoders = {"moec": by_decoder(program, prompt, steps), LOOP: by_hand(in_use, prompt, steps)}
    for name, make in BASELINES.items():
        try:
            decoders[name] = by_hand(CachedGPT.of(program, config, make), prompt, steps)
        except MissingPeerError as reason:
            result.missing[name] = str(reason)
    used = compare(decoders, in_use, steps)
    result.experts_used, gb = round(used, 2), gigabytes(program, used, "position_embedding.weight")
    result.step_gb, result.limit_ms = round(gb, 4), round(gb / gb_per_s * 1e3, 2)
    result.times = timed(decoders, steps, rounds)
    return result


def compare(decoders: dict[str, Decode], in_use: CachedGPT, steps: int) -> float:
    """All write the same tokens (AssertionError otherwise); gives how many experts of a layer they used."""
    expected = next(iter(decoders.values()))(steps)
    for layer in in_use.of_type(ExpertsInUse):
        layer.used.clear()
    for name, decode in decoders.items():
        check_tokens(decode(steps), expected, name)
    counts = [count for layer in in_use.of_type(ExpertsInUse) for count in layer.used]
    return sum(counts) / len(counts)


@torch.no_grad()
def by_decoder(program: Program, prompt_BS: Tensor, steps: int) -> Decode:
    """The program's derived decoder, after the prompt."""
    B, S = prompt_BS.shape
    decoder = program.decoder(S + steps)
    cache = decoder.new_cache(B, S + steps)
    first = torch.zeros(B, 1, dtype=torch.int64)
    logits = decoder.step(prompt_BS, first[:, 0], first + S - 1, cache, S)
    start = logits[:, -1].argmax(-1, keepdim=True)

    def step(token_B1: Tensor, past: int) -> Tensor:
        return decoder.step(token_B1, first[:, 0] + past, first, cache, past + 1)[:, -1]

    return _greedy(step, start, S)


def by_hand(model: CachedGPT, prompt_BS: Tensor, steps: int) -> Decode:
    """A GPT whose memory is written by hand, after the prompt."""
    B, S = prompt_BS.shape
    model.new_cache(B, S + steps)
    start = model.step(prompt_BS, 0).argmax(-1, keepdim=True)
    return _greedy(model.step, start, S)


def _greedy(step: Callable[[Tensor, int], Tensor], start_B1: Tensor, past: int) -> Decode:
    """The likeliest tokens: each call goes on from the same place, and writes over the memory after it."""

    def decode(steps: int) -> Tensor:
        token, found = start_B1, []
        for number in range(steps):
            token = step(token, past + number).argmax(-1, keepdim=True)
            found.append(token)
        return torch.cat(found, 1)

    return decode


def timed(decoders: dict[str, Decode], steps: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step of each, and ratios to the first, of the fastest rounds and within rounds."""
    calls = {name: partial(decode, steps) for name, decode in decoders.items()}
    timings = race(calls, rounds, warm_up=0)
    ours = next(iter(timings.values()))
    return {name: _row(timing, ours, steps) for name, timing in timings.items()}


def _row(timing: Timing, ours: Timing, steps: int) -> dict[str, float]:
    found = {
        "min_ms": timing.best / steps * 1e3,
        "median_ms": timing.median / steps * 1e3,
        "min_ratio": timing.best / ours.best,
        "median_ratio": statistics.median(map(truediv, timing.seconds, ours.seconds)),
    }
    return {name: round(value, 3) for name, value in found.items()}


_COLUMNS = {
    "min_ms": ("min ms", "{:.1f}"),
    "median_ms": ("median ms", "{:.1f}"),
    "min_ratio": ("x min", "{:.2f}"),
    "median_ratio": ("x median", "{:.2f}"),
}


def show(result: Result) -> None:
    """Print one batch size as a table."""
    title = f"{result.model}, {result.rows} rows, {result.experts_used:.1f} experts used"
    table = Table(title=title, title_justify="left")
    for heading in ("", *(heading for heading, _ in _COLUMNS.values()), "of the limit"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, row in result.times.items():
        cells = [spelling.format(row[key]) for key, (_, spelling) in _COLUMNS.items()]
        table.add_row(name, *cells, f"{result.limit_ms / row['min_ms']:.0%}")
    for name, reason in result.missing.items():
        table.add_row(name, reason)
    _CONSOLE.print(table)


def page_table(results: list[dict[str, Any]]) -> str:
    """The table of docs/performance.md, from the results of a record."""
    headings = [heading for heading, _ in _COLUMNS.values()]
    lines = [f"| rows | experts used | contestant | {' | '.join(headings)} | of the limit |"]
    lines.append("|---" * (len(headings) + 4) + "|")
    for result in results:
        rows, used = str(result["rows"]), f"{result['experts_used']:.1f}"
        for name, row in result["times"].items():
            cells = " | ".join(spelling.format(row[key]) for key, (_, spelling) in _COLUMNS.items())
            share = result["limit_ms"] / row["min_ms"]
            lines.append(f"| {rows} | {used} | {name} | {cells} | {share:.0%} |")
            rows, used = "", ""
    return "\n".join(lines)


def main() -> None:
    """Run the batch sizes, print them, and write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper_contrast", description=__doc__)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, action="append")
    parser.add_argument("--peers", action="append", default=[])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/paper_contrast.json"))
    arguments = parser.parse_args()
    sys.path.extend(arguments.peers)
    os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    words = ["DIR" if word in arguments.peers else word for word in sys.argv[1:]]
    record: dict[str, Any] = {"command": " ".join(["python -m benchmarks.paper_contrast", *words])}
    record |= {"machine": machine.describe(), "limits": machine.limits(), "cases": []}
    _CONSOLE.print(record["machine"], record["limits"])
    config = GPTConfig(512, 256, 4, arguments.width, arguments.width // 128, dropout=0.0)
    program, speed = compiled(config, EXPERTS), record["limits"]["read_gb_per_s"]
    for rows in arguments.rows or BATCHES:
        result = measure(program, config, rows, arguments.steps, arguments.rounds, speed)
        show(result)
        record["cases"].append(vars(result))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _CONSOLE.print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
