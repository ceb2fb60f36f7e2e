"""`Memory`: what lies in the memory of one rank, as expressions.

    memory = program.cost().memory
    memory.total, memory.numbers(B=8, S=1024), memory.fits(hardware.device.memory, B=8, S=1024)

Weights, gradients, averages and caches are to the byte. Activations are what is kept between forward and
backward, or the most that is alive at once where nothing is kept. What one operator needs on the way, and
what an allocator loses between its blocks, is not told, except for the largest results beside what is kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import sympy

from moec.cost.letters import missing, numbers_of
from moec.cost.operation import Operation
from moec.cost.rank.weights import Weights
from moec.cost.shown.table import Column, Table
from moec.ir.mesh import Mesh
from moec.runtime.ops.work import Amount

_NO_PART = ("mesh", "dealt")
_STEP_COUNT = 4  # AdamW counts the steps of every tensor in a float32


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    `parameters`, with what pads them where ranks share the optimizer's work; `gradients` of all of them;
    `optimizer`: AdamW's averages of what this rank updates; `buffers`; `cache`: keys and values of a decoder
    with room for L positions of B rows; `activations`: what is kept for backward, or the most that is alive
    at once; `working`: the largest results of one operator beside what is kept; `communication`: flat copies
    of gradients on their way, after backward, when activations are gone.
    `mesh`: the ranks of each axis here, which `numbers` puts in; `dealt`: as of `Cost`.
    """

    parameters: Amount = sympy.S.Zero
    gradients: Amount = sympy.S.Zero
    optimizer: Amount = sympy.S.Zero
    buffers: Amount = sympy.S.Zero
    cache: Amount = sympy.S.Zero
    activations: Amount = sympy.S.Zero
    working: Amount = sympy.S.Zero
    communication: Amount = sympy.S.Zero
    mesh: Mesh = field(default=Mesh())
    dealt: frozenset[sympy.Expr] = frozenset()

    @property
    def parts(self) -> dict[str, Amount]:
        """All of it by name, what there is none of left out."""
        named = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in _NO_PART}
        return {name: amount for name, amount in named.items() if amount != 0}

    @property
    def total(self) -> Amount:
        """The most at once: activations and gradients on their way are never there together."""
        lasting = self.parameters + self.gradients + self.optimizer + self.buffers + self.cache
        return lasting + _max(self.activations + self.working, self.communication)

    def numbers(self, **letters: int) -> dict[str, int]:
        """`parts` and `total` as bytes, rounded up; axes that are not given are as they are here, or follow.

        Raises `CostError` for a letter without a number, and as `Cost.given` does.
        """
        given = numbers_of(letters, self.mesh, self.dealt)
        return {name: _number(amount, given) for name, amount in {**self.parts, "total": self.total}.items()}

    def fits(self, limit: float, **letters: int) -> bool:
        """Whether the total is at most `limit` bytes, of a device say."""
        return self.numbers(**letters)["total"] <= limit

    def table(self, **letters: int) -> Table:
        """A row for each part: as expressions, or as bytes where letters are given."""
        rows = {**self.parts, "total": self.total}
        cells = self.numbers(**letters) if letters else rows
        *parts, last = ((name, cells[name]) for name in rows)
        return Table((Column("memory"), Column("bytes", "B")), tuple(parts), total=last)

    def __str__(self) -> str:
        return str(self.table())


def memory_of(
    operations: Sequence[Operation],
    weights: Weights,
    cache: Amount,
    *,
    training: bool,
    dealt: frozenset[sympy.Expr] = frozenset(),
) -> Memory:
    """The memory of a rank that runs `operations` and holds `weights`."""
    buffers, mesh = sympy.Add(*(buffer.bytes for buffer in weights.buffers)), weights.mesh
    if not training:
        parameters = sympy.Add(*(weight.bytes for weight in weights.parameters))
        alive = largest(_alive(operations))
        return Memory(parameters, buffers=buffers, cache=cache, activations=alive, mesh=mesh, dealt=dealt)
    groups = weights.groups
    frozen = sympy.Add(*(weight.bytes for weight in weights.parameters if weight.group is None))
    updated = sum(group.updated for group in groups)
    computed = [one for one in operations if one.kind != "optimizer"]
    return Memory(
        parameters=frozen + sympy.Add(*(group.flat for group in groups)),
        gradients=sympy.Add(*(group.bytes for group in groups)),
        optimizer=2 * sympy.Add(*(group.stretch for group in groups)) + _STEP_COUNT * updated,
        buffers=buffers,
        cache=cache,
        activations=sympy.Add(*(one.saved for one in computed)) + largest(_again(computed)),
        working=largest(amount for one in computed for amount in (one.forward.written, one.backward.written)),
        communication=sympy.Add(*(group.flat + group.stretch for group in groups if group.is_dealt)),
        mesh=mesh,
        dealt=dealt,
    )


def largest(amounts: Iterable[Amount]) -> Amount:
    """The largest of them; those that are never larger than another one are left out of the expression."""
    found: list[tuple[Mapping[Amount, Amount], Amount]] = []
    for amount in dict.fromkeys(map(sympy.sympify, amounts)):
        terms = amount.expand().as_coefficients_dict()
        if any(_is_at_most(terms, other) for other, _ in found):
            continue
        found = [(other, kept) for other, kept in found if not _is_at_most(other, terms)]
        found.append((terms, amount))
    return _max(*(amount for _, amount in found))


def _max(*amounts: Amount) -> Amount:
    """The largest, all of them kept: sympy compares wrongly where letters divide (it takes 1/B to be 1)."""
    if all(sympy.sympify(amount).is_number for amount in amounts):
        return sympy.Max(*amounts) if amounts else sympy.S.Zero
    return sympy.Max(*amounts, evaluate=False) if len(amounts) > 1 else amounts[0]


def _is_at_most(terms: Mapping[Amount, Amount], other: Mapping[Amount, Amount]) -> bool:
    """Term by term; letters are positive."""
    return all(terms.get(term, 0) <= other.get(term, 0) for term in {*terms, *other})


def _alive(operations: Sequence[Operation]) -> list[Amount]:
    """The bytes of results that are still to be read, after each operation."""
    last = list(range(len(operations)))
    for index, one in enumerate(operations):
        for other in one.after:
            last[other] = index
    ends = defaultdict(list)
    for index, end in enumerate(last):
        ends[end].append(index)
    alive, found = dict[int, Amount](), []
    for index, one in enumerate(operations):
        alive[index] = one.forward.written
        found.append(sympy.Add(*alive.values()))
        for gone in ends[index]:
            del alive[gone]
    return found


def _again(operations: Sequence[Operation]) -> list[Amount]:
    """What each region keeps from its second computation to the end of its gradient."""
    by_region = defaultdict(list)
    for one in operations:
        by_region[one.region].append(one.again)
    return [sympy.Add(*amounts) for amounts in by_region.values()]


def _number(amount: Amount, given: Mapping[sympy.Symbol, sympy.Expr]) -> int:
    found = sympy.sympify(amount).xreplace(dict(given))
    if found.free_symbols:
        raise missing(min(map(str, found.free_symbols)))
    return int(sympy.ceiling(found))
