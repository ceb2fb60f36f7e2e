"""Parameter totals of the models in the DeepSpeed-MoE paper, from a dense GPT and a plan, on `meta`.

    python -m benchmarks.paper_totals            # prints the table of docs/paper.md
    python -m benchmarks.paper_totals --one NAME # one model, measured in this process, as JSON

Each model is compiled in a process of its own, so that the peak of memory is its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.memory import peak_bytes


@dataclass(frozen=True)
class PaperModel:
    """One row of the paper's tables: its `name`, the dense model in `examples/gpt.py` it grows from, the
    shipped `plan`, what is changed in it (`experts`, and those of the last two sparse layers), and the
    printed `total`."""

    name: str
    dense: str
    plan: str
    experts: int
    last_two: int
    total: str


PAPER = (
    PaperModel("350M+MoE-128", "gpt_350m", "moe", 128, 128, "13B"),
    PaperModel("1.3B+MoE-128", "gpt_1_3b", "moe", 128, 128, "52B"),
    PaperModel("350M+PR-MoE-32/64", "gpt_350m", "pr_moe", 32, 64, "4B"),
    PaperModel("1.3B+PR-MoE-64/128", "gpt_1_3b", "pr_moe", 64, 128, "31B"),
    PaperModel("350M+PR-MoE+L21+MoS", "gpt_350m", "pr_mos", 32, 64, "3.5B"),
    PaperModel("1.3B+PR-MoE+L21+MoS", "gpt_1_3b", "pr_mos", 64, 128, "27B"),
)


@dataclass(frozen=True)
class Measured:
    """What compiling one model gave: `parameters` in all, and `active` for one token; `seconds` without
    starting Python; `peak_bytes` of memory, with Python and torch."""

    name: str
    parameters: int
    active: int
    seconds: float
    peak_bytes: int


def plan_of(model: PaperModel) -> Any:
    """The shipped plan with this model's numbers of experts."""
    from moec import Plan

    shipped = Plan.shipped(model.plan)
    assert shipped.moe is not None
    overrides = tuple(o.model_copy(update={"experts": model.last_two}) for o in shipped.moe.override)
    return shipped.model_copy(
        update={"moe": shipped.moe.model_copy(update={"experts": model.experts, "override": overrides})}
    )


def compiled(model: PaperModel) -> Any:
    """The program of one model, on `meta`."""
    import torch

    import moec
    from examples import gpt

    with torch.device("meta"):
        dense = getattr(gpt, model.dense)()
    return moec.compile(dense, plan_of(model))


def measure(model: PaperModel) -> Measured:
    """Compile one model in this process."""
    import moec  # noqa: F401 - not part of the time

    started = time.perf_counter()
    program = compiled(model)
    seconds = time.perf_counter() - started
    peak = peak_bytes()
    return Measured(
        model.name, program.num_parameters(), program.num_parameters(active=True), round(seconds, 1), peak
    )


def measure_apart(model: PaperModel) -> Measured:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.paper_totals", "--one", model.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def digits(parameters: int, printed: str) -> str:
    """A total with as many decimals as the paper prints: whole billions, or tenths."""
    decimals = len(printed.removesuffix("B").partition(".")[2])
    return f"{parameters / 1e9:.{decimals}f}B"


def table(rows: list[Measured]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| model | paper | parameters | active per token | seconds | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for model, row in zip(PAPER, rows, strict=True):
        lines.append(
            f"| {row.name} | {model.total} | {row.parameters:,} ({digits(row.parameters, model.total)}) "
            f"| {row.active:,} | {row.seconds:.0f} | {row.peak_bytes / 1e9:.1f} GB |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """The table, or one model."""
    if arguments[:1] == ["--one"]:
        model = next(m for m in PAPER if m.name == arguments[1])
        print(json.dumps(asdict(measure(model))))
        return
    print(table([measure_apart(model) for model in PAPER]))


if __name__ == "__main__":
    main(sys.argv[1:])
