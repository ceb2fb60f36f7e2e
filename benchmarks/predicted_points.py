"""The points at which predictions are held against the clock; none of their sizes was calibrated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

import moec
from examples.gpt import GPT, GPTConfig
from moec.cost import Cost, Hardware, Prediction, predict
from moec.local_program import LocalProgram
from moec.plan import Train
from moec.program import Program
from moec.runtime.ranks import ranks_of
from moec.runtime.step import OptimizerStep

Phase = Literal["training", "forward", "decode"]

_SPARSE = {"layers": "1::2", "gate": "straight-through"}
MOE: Mapping[str, dict[str, Any] | None] = {
    "dense": None,
    "top-1": _SPARSE | {"experts": 10, "top_k": 1},
    "top-2": _SPARSE | {"experts": 6, "top_k": 2},
    "PR-MoE": _SPARSE | {"experts": 4, "residual": "learned", "override": [{"layers": "-1:", "experts": 8}]},
}


@dataclass(frozen=True)
class Point:
    """One program and one batch of it; `batch` is that of one rank, `sequence` what a decoder remembers."""

    phase: Phase
    kind: str
    width: int
    heads: int
    layers: int
    vocabulary: int
    batch: int
    sequence: int
    backend: Literal["eager", "fused"] = "eager"
    parallel: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        """What it is, in one line."""
        axes = "".join(f", {axis} {ranks}" for axis, ranks in self.parallel)
        last = "past" if self.phase == "decode" else "S"
        size = f"d{self.width} h{self.heads} l{self.layers} v{self.vocabulary}"
        return f"{self.phase} {self.kind} {self.backend}{axes} {size} B{self.batch} {last}{self.sequence}"

    @property
    def ranks(self) -> int:
        """Processes that run it."""
        return 2 if self.parallel else 1

    @property
    def in_a_row(self) -> int:
        """Runs that are timed together: a decoder takes one step after the other."""
        return 8 if self.phase == "decode" else 1

    @property
    def letters(self) -> dict[str, int]:
        """The numbers that a cost asks for."""
        if self.phase == "decode":
            return {"B": self.batch, "n": 1, "m": 1, "L": self.sequence}
        return {"B": self.batch, "S": self.sequence}

    @property
    def program(self) -> Program:
        """The program, made when it is first asked for; it does not go along to other processes."""
        return _program_of(self)

    def make(self) -> Program:
        """A new one, always of the same weights."""
        torch.manual_seed(0)
        sizes = GPTConfig(self.vocabulary, self.sequence + 8, self.layers, self.width, self.heads, 0.0)
        moe = MOE[self.kind]
        plan: dict[str, Any] = {} if moe is None else {"moe": moe}
        if self.parallel:
            plan["parallel"] = dict(self.parallel)
        made = moec.compile(
            GPT(sizes), plan or None, verify="off", world=self.ranks if self.parallel else None
        )
        return made.fused(verify="off") if self.backend == "fused" and not self.parallel else made

    def cost(self) -> Cost:
        """What one rank of it costs."""
        return self.program.cost(self.phase)

    def predict(self, hardware: Hardware) -> Prediction:
        """How long it should take."""
        return predict(self.cost(), hardware, captured=False, **self.letters)

    def run(self) -> Callable[[], object]:
        """One run of it in this process, on random tokens; of its rank, where it has several."""
        if self.phase == "decode":
            return self._step_of_decoder()
        whole, ranks = self.program, self.ranks
        program: Program | LocalProgram = whole
        if ranks > 1:
            program = whole.partition(torch.distributed.get_rank())
        tokens = torch.randint(0, self.vocabulary, (self.batch * ranks_of_data(program), self.sequence))
        if self.phase == "forward":
            here = ranks_of(program).stretch((tokens, tokens))[0]
            return _forward(program.eval(), here)
        step, targets = OptimizerStep(program.train(), Train(lr=1e-4)), tokens.roll(-1, 1)
        return lambda: step.take((tokens, targets), 0.0)  # routing stays: kernels for its rows are there

    def _step_of_decoder(self) -> Callable[[], object]:
        decoder = self.program.eval().decoder()
        cache = decoder.new_cache(self.batch, self.sequence)
        tokens = torch.randint(0, self.vocabulary, (self.batch, 1))
        past, wanted = torch.full((self.batch,), self.sequence - 1), torch.zeros_like(tokens)
        return lambda: decoder.step(tokens, past, wanted, cache, self.sequence)


@cache
def _program_of(point: Point) -> Program:
    return point.make()


def ranks_of_data(program: Program | LocalProgram) -> int:
    """How many stretches the tokens of a job are cut into."""
    layout = program.layout
    return 1 if layout is None else layout.mesh.data


def _forward(program: Any, tokens: Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            program(tokens)

    return run


ALONE: tuple[Point, ...] = (
    Point("training", "dense", 144, 4, 3, 1100, 4, 96),
    Point("training", "dense", 272, 8, 2, 3000, 3, 200),
    Point("training", "dense", 100, 5, 6, 500, 16, 32),
    Point("training", "dense", 320, 5, 3, 2000, 2, 256, "fused"),
    Point("training", "dense", 192, 6, 2, 820, 1, 500),
    Point("training", "top-1", 176, 4, 4, 1500, 4, 128),
    Point("training", "top-2", 240, 6, 4, 1000, 6, 80, "fused"),
    Point("training", "PR-MoE", 120, 3, 4, 800, 8, 64, "fused"),
    Point("forward", "dense", 280, 7, 4, 1200, 2, 150),
    Point("forward", "top-2", 160, 5, 4, 900, 5, 90, "fused"),
    Point("forward", "PR-MoE", 224, 7, 2, 2200, 1, 320),
    Point("decode", "dense", 336, 6, 4, 3000, 1, 200),
    Point("decode", "dense", 180, 6, 6, 1000, 8, 100),
    Point("decode", "top-1", 264, 4, 4, 1700, 4, 380),
    Point("decode", "top-2", 384, 8, 2, 5000, 2, 250),
    Point("decode", "PR-MoE", 150, 5, 4, 600, 16, 60),
)
TOGETHER: tuple[Point, ...] = (
    Point("training", "dense", 168, 4, 3, 900, 4, 100, "eager", (("data", 2),)),
    Point("training", "dense", 288, 6, 2, 1300, 4, 112, "eager", (("tensor", 2),)),
    Point("training", "top-2", 216, 6, 4, 1000, 4, 72, "eager", (("expert", 2),)),
    Point("forward", "top-1", 248, 4, 4, 1600, 3, 180, "eager", (("expert", 2),)),
)
