"""`Cost`: what a program costs one rank, operator by operator, as expressions one can compute with.

cost = program.cost()                     # a training step; phase="forward", "decode"
print(cost)                               # a table by kind of work
cost.flops                                # an expression in B and S
cost.number(cost.flops, B=8, S=1024)      # a number
cost.table("layer", B=8, S=1024)          # numbers, by layer
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy

from moec.cost.letters import missing, numbers_of, require_known
from moec.cost.machine.hardware import Hardware
from moec.cost.operation import Operation
from moec.cost.rank.memory import Memory, memory_of
from moec.cost.rank.traffic import counted_traffic_of, traffic_of
from moec.cost.rank.weights import Weights
from moec.cost.shown import summary
from moec.cost.shown.crossover import Crossover, crossover
from moec.cost.shown.lambdified import Numbers, lambdified
from moec.cost.shown.spelling import latex
from moec.cost.shown.table import Table
from moec.cost.step.phases import ONE_PART, TrainingStep
from moec.cost.symbols import MEANINGS, symbol
from moec.cost.timing.numbers import Evaluator
from moec.cost.timing.time_expression import seconds_expression
from moec.errors import CostError, nearest
from moec.ir.mesh import Mesh
from moec.runtime.ops.sent import Kind, Sent, Traffic

AMOUNTS = ("flops", "forward_flops", "backward_flops", "bytes", "calls", "sent", "messages", "intensity")


@dataclass(frozen=True)
class Cost:
    """The operations of one rank of a program, and the axes they were read with.

    `phase`: `training` (a whole step, taken as `step` says), `forward`, or `decode` (one step of the derived
    decoder).
    `axes`: letter of each axis → its ranks in this program. Amounts are expressions in the letters of
    `moec.cost.symbols`; those of axes are in them until `number` or `at` puts numbers there, which are of
    ranks that all of `dealt` (`24/tensor`) can be dealt out to evenly.
    """

    operations: tuple[Operation, ...]
    phase: str
    mesh: Mesh = field(default=Mesh())
    weights: Weights | None = None
    step: TrainingStep = ONE_PART
    cache: Any = 0
    dealt: frozenset[sympy.Expr] = frozenset()

    @property
    def axes(self) -> dict[sympy.Symbol, int]:
        """The letters of the axes and the numbers of ranks they have here."""
        return {symbol(axis): ranks for axis, ranks in self.mesh.axes().items()}

    @cached_property
    def memory(self) -> Memory:
        """What lies in the memory of this rank; raises `CostError` where nothing is known of the weights."""
        if self.weights is None:
            raise CostError("Cost.memory", "operations alone", "the cost of a program: program.cost()")
        training = self.phase == "training"
        return memory_of(self.operations, self.weights, self.cache, training=training, dealt=self.dealt)

    @cached_property
    def traffic(self) -> dict[Kind, Sent]:
        """What this rank sends in one step, by direction, axis and operator."""
        return traffic_of(self.operations, self.step.accumulate)

    def counted_traffic(self, **letters: int) -> Traffic:
        """`traffic` in whole numbers, to the byte: what `count_traffic` would count of one step.

        Raises `CostError` for a letter without a number, and as `given` does.
        """
        return counted_traffic_of(self.operations, self.step.accumulate, self.given(letters))

    @cached_property
    def forward_flops(self) -> sympy.Expr:
        """Of the matrix products of a forward run, on this rank."""
        return self._sum(lambda one: one.forward.flops)

    @cached_property
    def backward_flops(self) -> sympy.Expr:
        """Of the matrix products of the gradients."""
        return self._sum(lambda one: one.backward.flops)

    @property
    def flops(self) -> sympy.Expr:
        """Forward and backward."""
        return self.forward_flops + self.backward_flops

    @cached_property
    def bytes(self) -> sympy.Expr:
        """Read and written in the memory of this rank, forward and backward."""
        return self._sum(lambda one: one.forward.bytes + one.backward.bytes)

    @cached_property
    def calls(self) -> sympy.Expr:
        """Kernels that are started, forward and backward."""
        return self._sum(lambda one: one.forward.calls + one.backward.calls)

    @cached_property
    def sent(self) -> sympy.Expr:
        """Bytes that this rank sends to others, forward and backward."""
        return self._sum(lambda one: sum(each.bytes for each in (*one.sends, *one.sends_back)))

    @cached_property
    def messages(self) -> sympy.Expr:
        """Messages that this rank sends to others, forward and backward."""
        return self._sum(lambda one: sum(each.messages for each in (*one.sends, *one.sends_back)))

    @property
    def intensity(self) -> sympy.Expr:
        """FLOPs for every byte of memory that is moved: what decides which of the two takes the time."""
        return self.flops / self.bytes

    @cached_property
    def evaluator(self) -> Evaluator:
        """Computes all amounts for given letters; made once."""
        return Evaluator(self.operations)

    def given(
        self, letters: Mapping[str, Any], others: Collection[str] = ()
    ) -> dict[sympy.Symbol, sympy.Expr]:
        """The numbers of `letters` by symbol, and those of axes: as they are here, or as follows from others.

        `others`: further letters that there may be, those of an expression. Raises `CostError` for a letter
        that is none and for a number that it cannot have, `MeshError` for ranks that do not fit together, or
        on which the program would be another one (`moec.cost.letters`).
        """
        return numbers_of(letters, self.mesh, self.dealt, others)

    def times(self, one: Operation) -> int:
        """How often a step runs it: the optimizer once, all else for each of the parts of a batch."""
        return 1 if one.kind == "optimizer" else self.step.accumulate

    def _sum(self, amount: Callable[[Operation], Any]) -> sympy.Expr:
        return summary.total(self.times(one) * amount(one) for one in self.operations)

    def amount(self, name: Any) -> sympy.Expr:
        """The amount of this name, one of `AMOUNTS`; an expression is itself.

        Raises `CostError` for others.
        """
        if not isinstance(name, str):
            return sympy.sympify(name)
        if name not in AMOUNTS:
            raise CostError(
                "Cost", f"amount {name!r}", f"one of {', '.join(AMOUNTS)}", nearest(name, AMOUNTS)
            )
        return sympy.sympify(getattr(self, name))

    def at(self, amount: Any, **letters: int) -> Any:
        """An amount (a name of `AMOUNTS`, or an expression) with these numbers in it, and axes as here.

        A number where no letter is left. Raises as `given` does.
        """
        return summary.filler(self, letters)(self.amount(amount))

    def table(self, by: str = "kind", **letters: int) -> Table:
        """The operations added up by `kind`, `layer`, `region`, `operator`, or what is sent by `axis`.

        Without letters the cells are expressions; with some, those and the axes as they are here become
        numbers. Raises `CostError` for another `by`, and as `given` does.
        """
        return summary.table_of(self, by, letters)

    def __str__(self) -> str:
        return f"{self.about}\n\n{self.table()}"

    @property
    def about(self) -> str:
        """`training, one of 4 ranks: data 2 × tensor 2`."""
        what = {"training": "a training step", "forward": "a forward run", "decode": "one step of decoding"}
        return f"{what[self.phase]}, on one of {self.mesh}" if self.mesh.world > 1 else what[self.phase]

    def lambdify(self, amount: Any, letters: Sequence[str]) -> Callable[..., Numbers]:
        """An amount (a name of `AMOUNTS`, or an expression) as a function of numpy arrays, for sweeps.

        `letters`: its arguments, in order; axes that are not among them are as they are here. Raises
        `CostError` where another letter of the amount is left, and for an argument that is no letter.
        """
        wanted = self.amount(amount)
        require_known(letters, [*MEANINGS, *self.mesh.axes(), *map(str, wanted.free_symbols)])
        fixed = {letter: count for letter, count in self.axes.items() if str(letter) not in letters}
        return lambdified(wanted.xreplace(fixed), letters)

    def seconds_expression(self, hardware: Hardware | None = None) -> sympy.Expr:
        """Seconds of one run by the roofline, operator by operator, nothing overlapping: one expression.

        Without hardware in the letters of `RATES` too. Coarser than `predict`, and there to be solved; see
        `moec.cost.timing.time_expression`.
        """
        return seconds_expression(self, hardware)

    def crossover(
        self,
        other: Any,
        letter: str,
        amount: Any = "flops",
        *,
        hardware: Hardware | None = None,
        names: tuple[str, str] = ("this", "the other"),
        over: tuple[float, float] = (1, 4096),
        said: str = "wins",
        **letters: float,
    ) -> Crossover:
        """Where this costs less than `other` (a cost, an expression or a number), as `letter` grows.

        `amount`: a name of `AMOUNTS`, an expression, or `"seconds"` with `hardware`. Axes that are neither
        `letter` nor among `letters` are as they are here, on either side. See `moec.cost.shown.crossover`.
        """
        free = {letter, *letters}
        mine = self._solvable(amount, hardware, free)
        theirs = other._solvable(amount, hardware, free) if isinstance(other, Cost) else other
        return crossover(mine, theirs, letter, names=names, over=over, said=said, **letters)

    def _solvable(self, amount: Any, hardware: Hardware | None, free: set[str]) -> sympy.Expr:
        found = self.seconds_expression(hardware) if amount == "seconds" else self.amount(amount)
        return found.xreplace({letter: n for letter, n in self.axes.items() if str(letter) not in free})

    def latex(self, amount: Any) -> str:
        """An amount (a name of `AMOUNTS`, or an expression) as LaTeX, coefficients in full."""
        return latex(self.amount(amount))

    def number(self, amount: Any, **letters: int) -> float:
        """An amount (a name of `AMOUNTS`, or an expression) with numbers for its letters; axes that are not
        given are as they are here, or follow from those that are.

        Raises `CostError`, naming the letter, where one is missing, and as `given` does.
        """
        wanted = self.amount(amount)
        standing = {str(letter): letter for letter in wanted.free_symbols}
        given = {standing.get(str(letter), letter): n for letter, n in self.given(letters, standing).items()}
        # All at once: a largest amount of which some letters are known is compared wrongly by sympy.
        found = wanted.xreplace(given)
        if found.free_symbols:
            raise missing(min(map(str, found.free_symbols)))
        return int(found) if found.is_Integer else float(found)
