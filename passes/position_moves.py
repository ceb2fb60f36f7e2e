"""Operators that only move numbers: where do the positions go?

Each is run once on a small tensor that holds position numbers, and the result is looked at: if some dim still
counts 0, 1, 2, … and nothing else varies, that dim is the positions. So `transpose`, `flatten`, `split` and
forty spellings of them need no rules, and a `flip` or a slice that cuts positions off is noticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

NEW, HELD, ROWS = "new", "held", "rows"
Roles = Mapping[int, str]

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
    """The length of the sequence, as it stands in the shapes of a program: the symbol S, and its sample."""

    def __init__(self, tokens: fx.Node) -> None:
        size = tokens.meta["val"].shape[1]
        self.symbol, self.length = size.node.expr, hint(size)

    def dims(self, value: Tensor | None) -> list[int]:
        """The dims whose size depends on the length of the sequence."""
        shape = () if value is None else value.shape
        return [i for i, size in enumerate(shape) if self.symbol in _symbols(size)]

    def moved(self, node: fx.Node, roles: Mapping[fx.Node, Roles]) -> list[dict[int, str]]:
        """The roles of each result of an operator that only moves numbers.

        `roles`: dim → role of every tensor it reads. Raises `ValueError` saying what happened to the positions
        when they are no longer one whole dim, or a batch of them.
        """
        kinds = {NEW if role == ROWS else role for known in roles.values() for role in known.values()}
        results = {kind: _listed(self._run(node, roles, kind)) for kind in sorted(kinds)}
        values = _listed(node.meta["val"])
        return [
            self._found({kind: made[i] for kind, made in results.items()}, value, node)
            for i, value in enumerate(values)
        ]

    def _run(self, node: fx.Node, roles: Mapping[fx.Node, Roles], kind: str) -> Any:
        """The operator on the position numbers of one role."""

        def concrete(source: fx.Node) -> Any:
            value = source.meta.get("val")
            if not isinstance(value, Tensor):
                return hint(value) if isinstance(value, torch.SymInt) else value
            numbers = torch.zeros([hint(size) for size in value.shape])
            for dim, role in roles.get(source, {}).items():
                if role == kind or (role == ROWS and kind == NEW):
                    numbers = numbers + self._counted(numbers, dim)
            return numbers

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), concrete)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _counted(self, numbers: Tensor, dim: int) -> Tensor:
        """0, 1, 2, … along `dim`, over and over, in a shape that broadcasts."""
        counted = torch.arange(numbers.shape[dim], dtype=numbers.dtype) % self.length
        return counted.view([-1 if i == dim else 1 for i in range(numbers.dim())])

    def _found(self, results: Mapping[str, Tensor], value: Tensor, node: fx.Node) -> dict[int, str]:
        roles: dict[int, str] = {}
        if 0 in value.shape:  # nothing is left to look at; what it becomes part of is looked at
            return {dim: NEW for dim in self.dims(value)}
        for kind, numbers in results.items():
            dim = self._counting(numbers)
            if dim is None:
                raise ValueError(f"{node.target}, which reorders, cuts or mixes positions")
            roles[dim] = self._role(value.shape[dim], kind, node)
        return roles

    def _counting(self, numbers: Tensor) -> int | None:
        """The one dim along which numbers count; None when there is none."""
        for dim, size in enumerate(numbers.shape):
            if size >= self.length and torch.equal(numbers, self._counted(numbers, dim).expand_as(numbers)):
                return dim
        return None

    def _role(self, size: Any, kind: str, node: fx.Node) -> str:
        if not isinstance(size, int) and size.node.expr == self.symbol:
            return kind
        if kind == NEW and _symbols(size) > {self.symbol}:
            return ROWS
        raise ValueError(f"{node.target}, which cuts positions off")


def _symbols(size: Any) -> set[Any]:
    return set() if isinstance(size, int) else set(size.node.expr.free_symbols)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]
