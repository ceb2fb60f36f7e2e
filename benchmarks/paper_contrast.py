"""The paper's contrast in one process: decoding with its baseline's expert layer, with others', with ours.

    python -m benchmarks.paper_contrast [--threads 2] [--rounds 3] [--width 1024] [--unpacked] [--peers DIR]

A GPT of four layers shaped as the paper's 52B model (1.3B+MoE-128: heads of 128, feed-forwards 4 × width, 128
experts, top-1, in every other layer), `--width` wide instead of 2048, decoding random tokens one by one with
a memory of keys and values, after 32 of them a row. The vocabulary is small: its product is everyone's. All
contenders use the same weights in memory, and their logits are compared before they take turns. float32.
The limit: the weights that a step needs, read once at the speed of this machine's memory in the same run.
Ours holds packed weights beside them (17 GB in all; 9 with `--unpacked`).
`--peers` names folders in which further libraries are found.
"""

from __future__ import annotations

import argparse
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
from benchmarks import machine, page
from benchmarks.generation import gigabytes
from benchmarks.generation_cases import difference
from benchmarks.paper_layers import CachedGPT, ExpertsInUse, OneHotEinsum, deepspeed
from benchmarks.peers import MissingPeerError
from benchmarks.peers_ranks import ExpertLayer
from benchmarks.race import Timing, race
from examples.gpt import GPT, GPTConfig
from moec.program import Program

BATCHES = (1, 8, 64)
PROMPT = 32
#: Largest difference of logits, relative to the largest of them, of the same function in fp32.
SAME = 1e-5
EXPERTS = 128
#: Goes on from a prompt that was read: for how many steps, to their logits [B, steps, V].
Decode = Callable[[int], Tensor]

LOOP = "PyTorch, loop over experts in use"
BASELINES: dict[str, Callable[[ExpertLayer], nn.Module]] = {
    "PyTorch, one-hot einsum": OneHotEinsum,
    "DeepSpeed MoE": deepspeed,
}
RESULTS = page.RESULTS / "paper_contrast.json"
_CONSOLE = Console(width=130)


@dataclass
class Result:
    """One batch size. `times`: by contender, of a step; `limit_ms`: of a step, by what it has to read."""

    model: str
    rows: int
    steps: int
    times: dict[str, dict[str, float]] = field(default_factory=dict)
    difference_to_ours: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    experts_used: float = 0.0
    step_gb: float = 0.0
    limit_ms: float = 0.0


def compiled(config: GPTConfig, experts: int) -> Program:
    """The sparse GPT: experts in every other layer, drawn anew.

    Positions weigh little: with weights that were never trained, tokens at the same position would otherwise
    choose the same few experts, which no balanced router does, and which is to our advantage.
    """
    torch.manual_seed(0)
    model = GPT(config).eval()
    with torch.no_grad():
        model.position_embedding.weight.mul_(0.1)
    moe = {"layers": "1::2", "experts": experts, "gate": "probability", "init": "fresh", "router_std": 0.1}
    return moec.compile(model, {"moe": moe}, verify="off").eval()


def measure(
    program: Program,
    config: GPTConfig,
    rows: int,
    steps: int,
    rounds: int,
    gb_per_s: float,
    packed: bool = True,
) -> Result:
    """All contenders at one batch size; `packed`: our weights are held twice, as a CPU reads them fastest."""
    experts = max(settings.experts for settings in program.moe_settings().values())
    name = f"{config.layers} layers, d{config.width} f{4 * config.width} E{experts} K1"
    result = Result(name, rows, steps)
    shape, generator = (rows, PROMPT + steps), torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab, shape, generator=generator)
    in_use = CachedGPT.of(program, config, ExpertsInUse)
    decoders = {"moec": by_decoder(program, tokens, packed), LOOP: by_hand(in_use, tokens)}
    for name, make in BASELINES.items():
        try:
            decoders[name] = by_hand(CachedGPT.of(program, config, make), tokens)
        except MissingPeerError as reason:
            result.missing[name] = str(reason)
    compare(decoders, steps, result)
    used = experts_used(in_use, decoders[LOOP], steps)
    result.experts_used, gb = round(used, 2), gigabytes(program, used, "position_embedding.weight")
    result.step_gb, result.limit_ms = round(gb, 4), round(gb / gb_per_s * 1e3, 2)
    result.times = timed(decoders, steps, rounds)
    return result


def compare(decoders: dict[str, Decode], steps: int, result: Result) -> None:
    """Record how far the others' logits are from ours; AssertionError where they are not the same."""
    (_, ours), *others = decoders.items()
    logits = ours(steps)
    for name, decode in others:
        apart = result.difference_to_ours[name] = difference(logits, decode(steps))
        if apart > SAME:
            raise AssertionError(f"logits of {name} and moec differ by {apart:.1e}")


def experts_used(model: CachedGPT, decode: Decode, steps: int) -> float:
    """Different experts of a layer that a step of `decode`, by `model`, uses on average."""
    layers = model.of_type(ExpertsInUse)
    for layer in layers:
        layer.used.clear()
    decode(steps)
    return sum(sum(layer.used) for layer in layers) / (len(layers) * steps)


def by_decoder(program: Program, tokens_BS: Tensor, packed: bool) -> Decode:
    """The program's derived decoder."""
    B, S = tokens_BS.shape
    decoder = program.decoder(S, packed=packed)
    cache, first = decoder.new_cache(B, S), torch.zeros(B, 1, dtype=torch.int64)
    decoder.step(tokens_BS[:, :PROMPT], first[:, 0], first, cache, PROMPT)
    return _fed(
        lambda token, past: decoder.step(token, first[:, 0] + past, first, cache, past + 1), tokens_BS
    )


def by_hand(model: CachedGPT, tokens_BS: Tensor) -> Decode:
    """A GPT whose memory is written by hand."""
    model.new_cache(*tokens_BS.shape)
    model.step(tokens_BS[:, :PROMPT], 0)
    return _fed(model.step, tokens_BS)


def _fed(step: Callable[[Tensor, int], Tensor], tokens_BS: Tensor) -> Decode:
    """One token after the other: each call goes on from the prompt, and writes over the memory after it."""

    def decode(steps: int) -> Tensor:
        places = range(PROMPT, PROMPT + steps)
        return torch.cat([step(tokens_BS[:, past : past + 1], past) for past in places], 1)

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
    parser.add_argument("--unpacked", action="store_true")
    parser.add_argument("--rows", type=int, action="append")
    parser.add_argument("--peers", action="append", default=[])
    parser.add_argument("--out", type=Path, default=RESULTS)
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
        result = measure(
            program, config, rows, arguments.steps, arguments.rounds, speed, not arguments.unpacked
        )
        show(result)
        record["cases"].append(vars(result))
    page.record(record, arguments.out, RESULTS, page_table)
    _CONSOLE.print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
