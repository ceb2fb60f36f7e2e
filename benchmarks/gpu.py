"""Everything that is measured on a GPU, in one call, without a network.

    python -m benchmarks.gpu [--budget 540] [--only layers] [--scattermoe FOLDER] [--out FILE.json] [--dry]

Needs torch 2.11 with CUDA and Triton 3.6, and what moec itself needs; transformers, pytest and ScatterMoE
where they are to be seen. The parts: `tests` (tests/gpu), `layers` (six sizes of SwiGLU experts against other
implementations and the published lines), `decode` (a layer for 1 and 64 tokens), `model` (350M+PR-MoE-32/64,
a training step and decoding). Each writes what it found, or why it could not, before the next begins; none
begins when the budget (seconds) is too short for it. One more part, `tune`, tries other tiles, and runs only
where it is asked for. `--dry`: all parts at tiny sizes on the CPU, kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import page

RESULTS = page.RESULTS / "gpu.json"
PARTS = ("tests", "layers", "decode", "model")


def tests(run: Any) -> dict[str, Any]:
    """tests/gpu in a process of their own: the last line that pytest says, and what failed."""
    if importlib.util.find_spec("pytest") is None:
        return {"failed": "pytest is not installed"}
    run.demand(0.0 if run.dry else 60.0, "tests/gpu")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    limit = min(150.0, run.left())
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()[-1:]
    wrong = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"status": done.returncode, "summary": lines[-1] if lines else "", "wrong": wrong}


def machine(run: Any) -> dict[str, Any]:
    """GPU, versions, and what its library's own products and memory reach."""
    import torch

    from benchmarks.machine import describe

    triton = importlib.util.find_spec("triton")
    found = {"host": describe(), "cuda": torch.version.cuda, "triton": triton is not None}
    if triton is not None:
        found["triton"] = importlib.import_module("triton").__version__
    if run.device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found | {"tflops": run.peak_flops(), "gb_per_s": run.bandwidth()}


def part(name: str) -> Callable[[Any], dict[str, Any]]:
    """The function that measures a part."""
    if name in ("machine", "tests"):
        return machine if name == "machine" else tests
    made: Callable[[Any], dict[str, Any]] = getattr(importlib.import_module(f"benchmarks.gpu_{name}"), name)
    return made


def layers_table(record: Mapping[str, Any]) -> str:
    """The layers as Markdown: forward / backward TFLOP/s, one column a contender, and the published lines."""
    rows = [(size, row) for size, row in record.items() if isinstance(row, dict) and "sonic_published" in row]
    names = [name for name in (rows[0][1] if rows else {}) if not name.endswith("_published")]
    lines = ["| layer | " + " | ".join([*names, "SonicMoE, published", "ScatterMoE, published"]) + " |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for size, row in rows:
        published = [row["sonic_published"], row["scattermoe_published"]]
        cells = [_speed(row[name]) for name in names] + [f"{one} / {two}" for one, two in published]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_table(record: Mapping[str, Any]) -> str:
    """The layers as Markdown: GB kept for the backward / the most at once, one column a contender."""
    rows = [(size, row) for size, row in record.items() if isinstance(row, dict) and "sonic_published" in row]
    names = [name for name in (rows[0][1] if rows else {}) if not name.endswith("_published")]
    lines = [f"| layer | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for size, row in rows:
        cells = [
            f"{row[n]['kept_gb']:.2f} / {row[n]['peak_gb']:.2f}" if "kept_gb" in row[n] else "–"
            for n in names
        ]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def decode_table(record: Mapping[str, Any]) -> str:
    """Decoding as Markdown: microseconds a layer, and the part of the memory's speed."""
    lines = ["| layer | µs | without a graph, µs | GB/s | of the bandwidth |", "|---|---|---|---|---|"]
    for case, row in record.items():
        if isinstance(row, dict) and "gb_per_s" in row:
            speeds = f"{row['microseconds_a_layer']:.1f} | {row['without_graph']:.1f} | {row['gb_per_s']:.0f}"
            lines.append(f"| {case} | {speeds} | {row['of_bandwidth']:.0%} |")
    return "\n".join(lines)


def model_table(record: Mapping[str, Any]) -> str:
    """The whole model as Markdown: a training step, fused and plain, and a decoded token."""
    lines = ["| | ms | tokens/s |", "|---|---|---|"]
    train, decode = record.get("train", {}), record.get("decode", {})
    for name in ("fused", "plain"):
        if f"{name}_ms" in train:
            speed = f"{train[f'{name}_ms']:.0f} | {train[f'{name}_tokens_per_s']:.0f}"
            lines.append(f"| training step of {train['tokens']:.0f} tokens, {name} | {speed} |")
    for rows, row in decode.items():
        if isinstance(row, dict) and "ms_a_token" in row:
            lines.append(f"| a token of {rows} | {row['ms_a_token']:.2f} | {row['tokens_per_s']:.0f} |")
    return "\n".join(lines)


TABLES = {
    "Forward / backward TFLOP/s, bf16:": ("layers", layers_table),
    "GB kept for the backward / most at once:": ("layers", memory_table),
    "Decoding, bf16:": ("decode", decode_table),
    "350M+PR-MoE-32/64, bf16:": ("model", model_table),
}


def page_tables(record: Mapping[str, Any]) -> str:
    """All tables, each under its title, of the parts that were run."""
    made = [
        f"{title}\n\n{table(record[name])}"
        for title, (name, table) in TABLES.items()
        if isinstance(record.get(name), dict)
    ]
    return "\n\n".join(made)


def _speed(cell: Mapping[str, Any]) -> str:
    if "failed" in cell:
        return "–"
    return f"{cell['forward_tflops']:.0f} / {cell['backward_tflops']:.0f}"


def reasons(record: Any, where: str = "") -> list[str]:
    """Every `failed` in the record, with the place it stands at."""
    if not isinstance(record, dict):
        return []
    here = [f"{where}: {record['failed']}"] if "failed" in record else []
    return here + [line for name, value in record.items() for line in reasons(value, f"{where}/{name}")]


def show(record: Mapping[str, Any]) -> None:
    """Print the tables, the rest of the record, and every reason for a gap."""
    print(page_tables(record))
    for name in ("machine", "tests", "model"):
        print(f"\n{name}: {json.dumps(record.get(name), indent=1)}")
    print("\nnot measured:", *reasons(dict(record)), sep="\n  ")


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--budget", type=float, default=540.0, help="seconds in all")
    parser.add_argument("--only", choices=(*PARTS, "tune"), action="append", help="parts to run")
    parser.add_argument("--scattermoe", default="", help="a folder that holds the package scattermoe")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, in the interpreter")
    parser.add_argument("--out", type=Path, help="the record; benchmarks/results/gpu.json of a whole run")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Run the parts, write the record after each, and print it.

    A whole run on a GPU gives every part a process of its own: a kernel that hangs, or breaks the device for
    its process, costs that part alone.
    """
    arguments = parsed(words)
    if arguments.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    import torch

    if not arguments.dry and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: no CUDA device; --dry runs every part at tiny sizes on the CPU")
    given = list(words if words is not None else sys.argv[1:])
    record: dict[str, Any] = {"command": f"python -m benchmarks.gpu {' '.join(given)}".strip()}
    apart = not arguments.dry and not arguments.only
    found = _apart(arguments) if apart else _here(arguments)
    out = arguments.out or (RESULTS if apart else None)
    for seconds, update in found:
        record |= update | {"seconds": round(seconds, 1)}
        _write(record, out)
    show(record)
    print(f"\nafter {record['seconds']} s")


def _here(arguments: argparse.Namespace) -> Iterator[tuple[float, dict[str, Any]]]:
    """Machine and parts, one after the other, in this process; seconds so far with each."""
    import torch

    from benchmarks.gpu_clock import Run, attempt
    from moec.runtime.ops.triton.register import interpreting

    torch.manual_seed(0)
    device = torch.device("cpu" if arguments.dry else "cuda")
    limits = (arguments.budget, arguments.dry, arguments.rounds, arguments.scattermoe)
    run = Run(device, torch.bfloat16, *limits)
    with interpreting() if arguments.dry else nullcontext():
        for name in ("machine", *(arguments.only or PARTS)):
            update: dict[str, Any] = {}
            attempt(name, partial(lambda name: part(name)(run), name), update)
            yield run.budget - run.left(), update


def _apart(arguments: argparse.Namespace) -> Iterator[tuple[float, dict[str, Any]]]:
    """The same, each part in a process of its own, which has what is left of the budget."""
    started = time.monotonic()
    for name in PARTS:
        left = arguments.budget - (time.monotonic() - started)
        words = ["--rounds", str(arguments.rounds), "--scattermoe", arguments.scattermoe]
        update = alone(name, words, left)
        yield time.monotonic() - started, update


def alone(name: str, words: Sequence[str], limit: float) -> dict[str, Any]:
    """What a process that runs one part writes within `limit` seconds; or why it wrote nothing."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "part.json")
        command = [sys.executable, "-m", "benchmarks.gpu", "--only", name, "--out", str(out)]
        command += ["--budget", str(limit), *words]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=max(limit, 1.0), check=False
            )
            said = done.stderr.strip()[-600:]
        except subprocess.TimeoutExpired:
            said = f"not done after {limit:.0f} s"
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    return {key: found[key] for key in ("machine", name) if key in found} | (
        {} if name in found else {name: {"failed": said or "it wrote nothing"}}
    )


def _write(record: Mapping[str, Any], out: Path | None) -> None:
    """The record as JSON; in its own place, its tables on the page too."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if out.resolve() == RESULTS.resolve():
        page.write_table(page.PAGE, "gpu", page_tables(record))


if __name__ == "__main__":
    main()
