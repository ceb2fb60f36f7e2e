"""What one operator does, in amounts: products of matrices, bytes of memory, kernels started.

The formula of an operator stands beside its kernels and is registered with `price`. It is given a `Call`,
which says shapes and not values, and computes with whatever numbers a shape is made of: integers for a call
that runs (`torch.utils.flop_counter.FlopCounterMode` asks that way), sympy expressions for one that stands in
a graph (`moec.cost`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Amount = Any
"""An int or a `sympy.Expr`."""


@dataclass(frozen=True)
class Product:
    """`groups` products of matrices [m, k] · [k, n], each with operands of its own.

    The dimension `along` is that of all groups together: rows that are dealt out to experts are `m` of all
    (each group multiplies m / groups of them), and `k` of all in the gradient of the weights.
    """

    m: Amount
    n: Amount
    k: Amount
    groups: Amount = 1
    along: str = "m"

    @property
    def flops(self) -> Amount:
        """Multiplications and additions, as torch's flop counter has them."""
        return 2 * self.m * self.n * self.k


@dataclass(frozen=True)
class Work:
    """What an operator does in one direction.

    `read`, `written`: bytes, each operand once and each result once, of memory that holds nothing else;
    `calls`: kernels that are started. Views do nothing, in no call.
    """

    products: tuple[Product, ...] = ()
    read: Amount = 0
    written: Amount = 0
    calls: Amount = 1

    @property
    def flops(self) -> Amount:
        """Of all products; nothing else is counted."""
        return sum((product.flops for product in self.products), 0)

    @property
    def bytes(self) -> Amount:
        """Read and written together."""
        return self.read + self.written

    def __add__(self, other: Work) -> Work:
        return Work(
            self.products + other.products,
            self.read + other.read,
            self.written + other.written,
            self.calls + other.calls,
        )


NOTHING = Work(calls=0)


@dataclass(frozen=True)
class Price:
    """What an operator does: forward, backward, and the bytes it keeps in between.

    What is kept is asked of autograd itself (`moec.cost.reading.asked`) unless `shared` says it: the names of
    arguments that are kept whole, results by their number; `saved` are the bytes that are kept beside them.
    A value that two operators keep is in memory once, so the reader of a graph adds them up.
    """

    forward: Work
    backward: Work = NOTHING
    saved: Amount = 0
    shared: tuple[str | int, ...] | None = None


@dataclass(frozen=True)
class Load:
    """How many rows the experts of one table of counts get.

    `rows`: together; `touched`: experts that get any, as a mean where it is not known which.
    """

    rows: Amount
    touched: Amount


class Call(Protocol):
    """One call of an operator: its arguments by the names of its schema, defaults included."""

    @property
    def operands(self) -> Sequence[str]:
        """The names of all arguments that are tensors."""
        ...

    @property
    def training(self) -> bool:
        """Whether the program is being trained (dropout runs, noise is drawn)."""
        ...

    def has(self, name: str) -> bool:
        """Whether the argument is a tensor (an optional one may be None)."""
        ...

    def shape(self, name: str) -> tuple[Amount, ...]:
        """The shape of a tensor argument."""
        ...

    def bytes(self, name: str) -> Amount:
        """The bytes of a tensor argument, or of all tensors of a list; 0 where there is none."""
        ...

    def itemsize(self, name: str) -> int:
        """Bytes of an element of a tensor argument."""
        ...

    def needs_grad(self, name: str) -> bool:
        """Whether a gradient of this argument is wanted."""
        ...

    def is_weight(self, name: str) -> bool:
        """Whether the argument is a parameter or buffer as the program holds it."""
        ...

    def value(self, name: str) -> Any:
        """An argument that is no tensor: a number, a string, a list of them."""
        ...

    def tensors(self, name: str) -> Sequence[tuple[Amount, ...]]:
        """The shapes of a list of tensors."""
        ...

    def load(self, name: str) -> Load:
        """What the counts i64 [E] in this argument come to."""
        ...

    def result(self, index: int = 0) -> tuple[Amount, ...]:
        """The shape of a result."""
        ...

    def result_bytes(self, index: int | None = None) -> Amount:
        """The bytes of a result; of all of them where no index is given."""
        ...


Formula = Callable[[Call], Price]

PRICES: dict[str, Formula] = {}
"""The formula of every operator that has one: `moec::grouped_linear`."""


def price(name: str, formula: Formula) -> Formula:
    """Register the formula of the operator `moec::name`; gives it back."""
    PRICES[f"moec::{name}"] = formula
    return formula
