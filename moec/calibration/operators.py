"""What every operator of the reference programs takes beside its products, by the bytes it moves."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moec.cost.cost import Cost
from moec.cost.machine.measured import ATTENTION, Direction, Line, Measured, beside_products
from moec.cost.timing.arranged import arranged
from moec.cost.timing.numbers import numbered
from moec.foresight import Phase
from moec.program import Program
from moec.runtime.ops.work import Work

from .clock import Stopwatch
from .references import Shape
from .watched import Times, WatchedRun

_LOSS = "loss.cross_entropy"  # as `moec.cost.step.loss` names it
_FEWEST, _MOST, _LONG = 3, 40, 2.0  # runs; seconds after which the fewest will do
_FIRST = 2  # runs that are not counted: the first ones find nothing where it will be


@dataclass(frozen=True)
class Sight:
    """One operator seen once: its work in numbers, the bytes that the run touches, the seconds it took."""

    operator: str
    direction: Direction
    work: Work
    working: float
    seconds: float


@dataclass
class Sights:
    """All that was seen of the operators of programs.

    `in_step`: every program runs as often, whatever it takes, as ranks that wait for each other have to.
    """

    watch: Stopwatch
    runs: int = 6
    patience: float = 0.25
    in_step: bool = False
    seen: list[Sight] = field(default_factory=list)
    between: dict[Direction, list[float]] = field(default_factory=lambda: defaultdict(list))

    def look_at(self, program: Program, shape: Shape) -> None:
        """Train, run and decode `program`, which is left as it was but for its gradients."""
        for ready in (program, program.fused(verify="off")):
            self.look_at_phase(ready, shape, "training")
            self.look_at_phase(ready, shape, "forward")
        self.look_at_phase(program, shape, "decode")

    def look_at_phase(self, program: Program, shape: Shape, phase: Phase) -> None:
        """One phase of it alone, as it is; leaves it in the mode of that phase."""
        tokens = torch.randint(0, shape.vocabulary, (shape.batch, shape.sequence))
        letters = {"B": shape.batch, "S": shape.sequence}
        if phase == "training":
            self._train(program.train(), tokens, letters)
        elif phase == "forward":
            self._run(program.eval(), tokens, letters)
        else:
            self._decode(program.eval(), shape)

    def _train(self, program: Program, tokens: Tensor, letters: Mapping[str, int]) -> None:
        watched = WatchedRun(program.graph, self.watch.now)

        def loss_of(out: Any) -> tuple[Tensor, Any]:
            logits, terms = out if isinstance(out, tuple) else (out, {})
            begin = self.watch.now()
            task = program._task_loss(logits, tokens)
            watched.forward[_LOSS].append(self.watch.now() - begin)
            return task, terms.get("balance", 0.0) + terms.get("z", 0.0)

        def watch() -> None:
            task, others = loss_of(watched.run(tokens))
            watched.backward[_LOSS].append(watched.run_backward(task + others))
            program.graph.zero_grad()

        def plain() -> None:
            program.loss_terms(tokens, tokens)["loss"].backward()
            program.graph.zero_grad()

        whole = self._both(watch, plain)
        cost = program.cost("training")
        first = len(self.seen)
        self._note(cost, letters, "forward", watched.forward)
        operators = len(self.seen) - first
        self._note(cost, letters, "backward", watched.backward)
        self._spare("forward", whole, self.seen[first:], operators)

    @torch.no_grad()
    def _run(self, program: Program, tokens: Tensor, letters: Mapping[str, int]) -> None:
        watched = WatchedRun(program.graph, self.watch.now)
        self._both(lambda: watched.run(tokens), lambda: program.graph(tokens))
        self._note(program.cost("forward"), letters, "inference", watched.forward)

    def _decode(self, program: Program, shape: Shape) -> None:
        decoder, rows, length = program.decoder(), shape.batch, shape.past
        cache = decoder.new_cache(rows, length)
        past, wanted = torch.full((rows,), length - 1), torch.zeros(rows, 1, dtype=torch.int64)
        tokens = torch.zeros(rows, 1, dtype=torch.int64)
        watched = WatchedRun(decoder.fused.graph, self.watch.now)

        def watch() -> None:
            with torch.inference_mode():
                watched.run(tokens, past, wanted, *cache.views(rows, length))

        whole = self._both(watch, lambda: decoder.step(tokens, past, wanted, cache, length))
        letters, first = {"B": rows, "n": 1, "m": 1, "L": length}, len(self.seen)
        self._note(program.cost("decode"), letters, "inference", watched.forward)
        self._spare("inference", whole, self.seen[first:], len(self.seen) - first)

    def _both(self, watch: Callable[[], object], plain: Callable[[], object]) -> float:
        """Run one and the other in turn; gives the seconds of the plain one."""
        times: list[float] = []
        begin = time.perf_counter()
        while self._wants_more(len(times), time.perf_counter() - begin):
            watch()
            start = self.watch.now()
            plain()
            times.append(self.watch.now() - start)
        return typical(times)

    def _wants_more(self, runs: int, seconds: float) -> bool:
        """Whether to go on: for all the runs, fewer of slow programs, more of fast ones."""
        counted = runs - _FIRST
        if self.in_step:
            return counted < self.runs
        if counted < self.runs:
            return counted < _FEWEST or seconds < _LONG
        return seconds < self.patience and counted < _MOST

    def _spare(self, direction: Direction, whole: float, seen: Sequence[Sight], operators: int) -> None:
        """Note what passes between operators, in a run that took `whole`."""
        self.between[direction].append((whole - sum(sight.seconds for sight in seen)) / operators)

    def _note(self, cost: Cost, letters: Mapping[str, int], direction: Direction, times: Times) -> None:
        evaluator = cost.evaluator
        amounts = evaluator({**letters, **arranged(cost.mesh, dict(letters)).numbers})
        places = evaluator.backward if direction == "backward" else evaluator.forward
        works = {
            one.name: (one.operator, numbered(evaluator.tasks[place], amounts))
            for one, place in zip(cost.operations, places, strict=True)
        }
        weights = sum(amounts[evaluator.tasks[place].weights] for place in evaluator.forward)
        working = float(weights + sum(float(work.written) for _, work in works.values()))
        for name, seconds in times.items():
            if name in works:
                operator, work = works[name]
                self.seen.append(Sight(operator, direction, work, working, typical(seconds)))

    def seconds_between(self) -> dict[Direction, float]:
        """Seconds that pass between one operator and the next, in the middle of all programs."""
        return {direction: max(0.0, statistics.median(here)) for direction, here in self.between.items()}


def typical(seconds: Sequence[float]) -> float:
    """The middle of the faster half of runs, without the first ones."""
    counted = sorted(seconds[_FIRST:])
    return statistics.median_low(counted[: len(counted) // 2 + 1])


def lines(seen: Sequence[Sight], measured: Measured) -> dict[str, dict[str, Line]]:
    """For every operator and direction the line of what it took beside its products."""
    points: dict[tuple[str, Direction], list[tuple[float, float]]] = defaultdict(list)
    for sight in seen:
        far = measured.far_share(sight.working)
        if sight.operator == ATTENTION:
            known, amount = measured.attention_seconds(sight.work, sight.direction, far), 0.0
        else:
            known = measured.products_seconds(sight.work, sight.operator, sight.direction, far)
            amount = beside_products(sight.work, sight.operator, sight.direction)
        points[sight.operator, sight.direction].append((amount, sight.seconds - known))
    found: dict[str, dict[str, Line]] = defaultdict(dict)
    for (operator, direction), here in sorted(points.items()):
        found[operator][direction] = line_through(here)
    return dict(found)


def line_through(points: Sequence[tuple[float, float]]) -> Line:
    """A line through the medians of points (bytes, seconds) of about as many bytes; never below zero."""
    by_size: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for amount, seconds in points:
        by_size[int(amount).bit_length()].append((amount, seconds))
    knots = [_middle(by_size[size]) for size in sorted(by_size)]
    return Line(bytes=[knot[0] for knot in knots], seconds=[max(knot[1], 0.0) for knot in knots])


def _middle(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    amounts, times = zip(*points, strict=True)
    return statistics.median(amounts), statistics.median(times)
