"""The divergence of a student from its teacher, forward and backward, against torch's, on the CPU.

    python -m benchmarks.divergence [--rounds 9] [--rows 1024]

1024 positions of a vocabulary of 50257 words, and of bytes, in float32 on one thread. Contenders take turns
on the same logits, after their results and gradients were compared. Memory is the growth of the peak of a
copy of the process that has run nothing yet.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moec.runtime.ops  # noqa: F401
from benchmarks import machine, page
from benchmarks.memory import peak_bytes
from benchmarks.race import race
from moec.runtime.distillation.losses import Words
from moec.runtime.distillation.top_words import top_words
from moec.testing.tolerances import error_of, tolerance_of

ops = torch.ops.moec
RESULTS = page.RESULTS / "divergence.json"
WORDS = (50257, 256)
TOP = 32
Cost = Callable[[Tensor, Tensor], Tensor]


def torch_kl(logits_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """As it is usually written."""
    return F.kl_div(logits_NV.log_softmax(1), teacher_NV.softmax(1), reduction="none").sum(1)


def torch_kl_of_logs(logits_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """The same with the teacher's logarithms."""
    logs = logits_NV.log_softmax(1), teacher_NV.log_softmax(1)
    return F.kl_div(*logs, reduction="none", log_target=True).sum(1)


def torch_reverse(logits_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """KL(student ‖ teacher)."""
    logs = teacher_NV.log_softmax(1), logits_NV.log_softmax(1)
    return F.kl_div(*logs, reduction="none", log_target=True).sum(1)


def ours(logits_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """`moec.divergence`, forward."""
    return ops.divergence(logits_NV, teacher_NV, logits_NV.shape[1], 1.0, False, "")


def ours_reverse(logits_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """`moec.divergence`, reverse."""
    return ops.divergence(logits_NV, teacher_NV, logits_NV.shape[1], 1.0, True, "")


class OfTopWords:
    """`moec.divergence_top` of the teacher's 32 likeliest words, found once: they may come from disk."""

    def __init__(self, teacher_NV: Tensor) -> None:
        self.told = top_words(teacher_NV, TOP, 1.0, Words(teacher_NV.shape[1]))

    def __call__(self, logits_NV: Tensor, teacher_NV: Tensor) -> Tensor:
        """The cost; the logits of the teacher are not looked at."""
        words = self.told.words, self.told.log_shares
        return ops.divergence_top(logits_NV, *words, logits_NV.shape[1], 1.0, False, "")


CONTENDERS: dict[str, Cost] = {
    "torch, kl_div(log_softmax, softmax)": torch_kl,
    "torch, log_target": torch_kl_of_logs,
    "moec": ours,
    "torch, reverse": torch_reverse,
    "moec, reverse": ours_reverse,
}
TOP_NAME = f"moec, {TOP} likeliest words"
SAME = [("torch, kl_div(log_softmax, softmax)", "moec"), ("torch, reverse", "moec, reverse")]


@dataclass(frozen=True)
class Row:
    """One contender at one size: the fastest round, on the clock and of the processor, and its memory."""

    rows: int
    words: int
    contender: str
    best_ms: float
    busy_ms: float
    extra_mb: float


def inputs(rows: int, words: int) -> tuple[Tensor, Tensor]:
    """Logits of a student, which have a gradient, and of a teacher."""
    torch.manual_seed(0)
    return torch.randn(rows, words, requires_grad=True), torch.randn(rows, words) * 2


def step(cost: Cost, logits_NV: Tensor, teacher_NV: Tensor) -> Callable[[], None]:
    """Forward and backward, from no gradient."""

    def run() -> None:
        logits_NV.grad = None
        cost(logits_NV, teacher_NV).mean().backward()

    return run


def contenders(teacher_NV: Tensor) -> dict[str, Cost]:
    """All of them."""
    return {**CONTENDERS, TOP_NAME: OfTopWords(teacher_NV)}


def require_alike(logits_NV: Tensor, teacher_NV: Tensor) -> None:
    """The same values and gradients as torch's."""
    for names in SAME:
        costs = [CONTENDERS[name](logits_NV, teacher_NV) for name in names]
        slopes = [torch.autograd.grad(cost.sum(), logits_NV)[0] for cost in costs]
        for needed, found in (costs, slopes):
            assert error_of(found, needed) <= tolerance_of(torch.float32), names


def measure(rows: int, words: int, rounds: int) -> list[Row]:
    """Every contender at one size."""
    logits, teacher = inputs(rows, words)
    steps = {name: step(cost, logits, teacher) for name, cost in contenders(teacher).items()}
    memory = {name: extra_memory(run) for name, run in steps.items()}
    require_alike(logits, teacher)
    timings = race(steps, rounds, warm_up=1)
    return [
        Row(rows, words, name, timing.best * 1e3, min(timing.busy) * 1e3, memory[name])
        for name, timing in timings.items()
    ]


def extra_memory(run: Callable[[], None]) -> float:
    """Megabytes that `run` takes beside what is there, in a copy of this process: its peak begins at what the
    copy holds."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        before = peak_bytes()
        run()
        os.write(writer, str(peak_bytes() - before).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        extra = told.read()
    os.waitpid(child, 0)
    return int(extra) / 1e6


def table(cases: list[dict[str, Any]]) -> str:
    """The record's cases in Markdown."""
    lines = [
        "| positions × words | contestant | min ms | processor ms | memory MB |",
        "|---|---|---|---|---|",
    ]
    for at, case in enumerate(cases):
        new = not at or case["words"] != cases[at - 1]["words"]
        size = f"{case['rows']} × {case['words']}" if new else ""
        told = f"{case['best_ms']:.1f} | {case['busy_ms']:.1f} | {case['extra_mb']:.1f}"
        lines.append(f"| {size} | {case['contender']} | {told} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the record and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = [row for words in WORDS for row in measure(asked.rows, words, asked.rounds)]
    record: dict[str, Any] = {"machine": machine.describe(), "cases": [asdict(row) for row in found]}
    page.record(record, asked.out, RESULTS, table)
    print(table(record["cases"]))


if __name__ == "__main__":
    main()
