"""Operators that only move numbers: where do the positions and the rows of the batch go?

Each is run once on a small tensor that holds position numbers, and the result is looked at: if some dim still
counts 0, 1, 2, … and nothing else varies, that dim is the positions. So `transpose`, `flatten`, `split` and
forty spellings of them need no rules, and a `flip` or a slice that cuts positions off is noticed. Rows of the
batch likewise: their numbers must still be in order, each perhaps several times (rows and heads in one dim).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from .position_axes import BATCH, NEW, ROWS, Roles

aten = torch.ops.aten

MOVES = {
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.transpose.int, aten.permute.default, aten.t.default, aten.numpy_T.default,
    aten.expand.default, aten.expand_as.default, aten.broadcast_to.default, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.split.Tensor, aten.split.sizes,
    aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.slice.Tensor, aten.select.int,
    aten.narrow.default, aten.cat.default, aten.stack.default, aten.repeat.default, aten.tile.default,
    aten.repeat_interleave.self_int, aten.flip.default, aten.roll.default, aten.movedim.int,
    aten.movedim.intlist, aten.swapaxes.default, aten.swapdims.default, aten.clone.default,
    aten.contiguous.default, aten.detach.default, aten.alias.default, aten.view_as.default,
    aten.reshape_as.default, aten.unfold.default, aten.concat.default,
}  # fmt: skip


def hint(size: Any) -> int:
    """The number behind a size in the sample that shapes were made with."""
    return size if isinstance(size, int) else int(size.node.hint)


class Sequence:
    """The sizes of `tokens` as they stand in the shapes of a program: the symbols B and S, and their
    samples."""

    def __init__(self, tokens: fx.Node) -> None:
        rows, size = tokens.meta["val"].shape
        self.symbol, self.length = size.node.expr, hint(size)
        self.rows, self.batch = rows.node.expr, hint(rows)

    def dims(self, value: Tensor | None) -> list[int]:
        """The dims whose size depends on the length of the sequence."""
        shape = () if value is None else value.shape
        return [i for i, size in enumerate(shape) if self.symbol in _symbols(size)]

    def whole(self, size: Any) -> bool:
        """Whether a size is the length of the sequence itself."""
        return not isinstance(size, int) and bool(size.node.expr == self.symbol)

    def by_size(self, value: Tensor) -> dict[int, str]:
        """Roles told by sizes alone, for a value that has new positions in their usual places."""
        found: dict[int, str] = {}
        for dim, size in enumerate(value.shape):
            symbols = _symbols(size) & {self.symbol, self.rows}
            if symbols:
                found[dim] = ROWS if len(symbols) > 1 else NEW if self.symbol in symbols else BATCH
        return found

    def moved(self, node: fx.Node, roles: Mapping[fx.Node, Roles]) -> list[dict[int, str]]:
        """The roles of each result of an operator that only moves numbers.

        `roles`: dim → role of every tensor it reads. Raises `ValueError` saying what happened to the
        positions when they are no longer one whole dim, or a batch of them.
        """
        present = {role for known in roles.values() for role in known.values()}
        kinds = sorted((present - {ROWS}) | ({NEW, BATCH} if ROWS in present else set()))
        results = {kind: _listed(self._run(node, roles, kind)) for kind in kinds}
        values = _listed(node.meta["val"])
        return [
            self._found({kind: made[i] for kind, made in results.items()}, value, node)
            for i, value in enumerate(values)
        ]

    def _run(self, node: fx.Node, roles: Mapping[fx.Node, Roles], kind: str) -> Any:
        """The operator on the numbers of one role."""

        def concrete(source: fx.Node) -> Any:
            value = source.meta.get("val")
            if not isinstance(value, Tensor):
                return hint(value) if isinstance(value, torch.SymInt) else value
            numbers = torch.zeros([hint(size) for size in value.shape])
            for dim, role in roles.get(source, {}).items():
                if role == kind or (role == ROWS and kind in (NEW, BATCH)):
                    numbers = numbers + self._counted(numbers, dim, kind)
            return numbers

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), concrete)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _counted(self, numbers: Tensor, dim: int, kind: str) -> Tensor:
        """Positions: 0, 1, 2, … along `dim`, over and over; rows: 0, …, 0, 1, …, 1. In a shape that
        broadcasts."""
        size = numbers.shape[dim]
        counted = torch.arange(size, dtype=numbers.dtype)
        if kind == BATCH:
            counted = torch.div(counted, max(1, size // self.batch), rounding_mode="floor")
        else:
            counted = counted % self.length
        return counted.view([-1 if i == dim else 1 for i in range(numbers.dim())])

    def _found(self, results: Mapping[str, Tensor], value: Tensor, node: fx.Node) -> dict[int, str]:
        if 0 in value.shape:  # nothing is left to look at; what it becomes part of is looked at
            return self.by_size(value)
        places: dict[str, int] = {}
        for kind, numbers in results.items():
            dim = self._counting(numbers, kind)
            if dim is None:
                what = "rows of the batch" if kind == BATCH else "positions"
                raise ValueError(f"{node.target}, which reorders, cuts or mixes {what}")
            places[kind] = dim
        both = BATCH in places and places.get(NEW) == places[BATCH]
        for kind, dim in places.items():
            self._check(value.shape[dim], kind, both, node)
        roles = {dim: kind for kind, dim in places.items()}
        return roles | {places[BATCH]: ROWS} if both else roles

    def _counting(self, numbers: Tensor, kind: str) -> int | None:
        """The one dim along which numbers count; None when there is none."""
        least = self.batch if kind == BATCH else self.length
        for dim, size in enumerate(numbers.shape):
            if size >= least and torch.equal(numbers, self._counted(numbers, dim, kind).expand_as(numbers)):
                return dim
        return None

    def _check(self, size: Any, kind: str, both: bool, node: fx.Node) -> None:
        symbols = _symbols(size)
        if kind == BATCH or (both and kind == NEW):
            if self.rows not in symbols or (both and self.symbol not in symbols):
                raise ValueError(f"{node.target}, which cuts rows of the batch off")
        elif not self.whole(size):
            raise ValueError(f"{node.target}, which cuts positions off")


def _symbols(size: Any) -> set[Any]:
    return set() if isinstance(size, int) else set(size.node.expr.free_symbols)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]
