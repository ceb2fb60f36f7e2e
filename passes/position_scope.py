"""One graph on the walk: what is known of its values, and what was found to remember and to look up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from moec.errors import PassError
from moec.ir.graphs import output
from moec.ir.patterns import is_call, tensor

from .position_axes import BATCH, HELD, NEW, Axes, Labels, Read, Site, Table, refusal
from .position_moves import MOVES, Sequence, hint


class Scope:
    """The root, or a region called from it. `known`: the label of each node (a list for several results)."""

    def __init__(self, labels: Labels, sequence: Sequence, module: fx.GraphModule, name: str) -> None:
        self.labels, self.sequence, self.module, self.name = labels, sequence, module, name
        self.known: dict[fx.Node, Any] = {}

    def returned(self) -> list[Any]:
        """The labels of what the graph returns."""
        values = output(self.module.graph).args[0]
        listed = values if isinstance(values, tuple | list) else (values,)
        return [self.known.get(value) if isinstance(value, fx.Node) else None for value in listed]

    def refuse(self, node: fx.Node, found: str) -> PassError:
        """The error that names `node` and its source line."""
        source = node.meta.get("source") or node.meta.get("path") or ""
        return refusal(f"{self.name or 'root'}: {node.name}" + (f" ({source})" if source else ""), found)

    def axes(self, node: Any) -> Axes:
        """What is known of a value of tokens; nothing for weights. A table raises `PassError`."""
        found = self.known.get(node) if isinstance(node, fx.Node) else None
        if isinstance(found, Table):
            raise self.refuse(node, "a table of positions where only values of tokens are understood")
        return found if isinstance(found, Axes) else Axes()

    def aligned(self, node: fx.Node, rank: int) -> dict[int, str]:
        """The roles of `node` broadcast to `rank` dims; positions of a table: the new ones, of its keys:
        held."""
        found = self.known.get(node)
        if isinstance(found, Axes):
            return found.aligned(rank_of(node), rank)
        if not isinstance(found, Table):
            return {}
        names = (NEW, HELD) if len(found.dims) == 2 else (NEW,)
        return {dim + rank - found.rank: role for dim, role in zip(found.dims, names, strict=False)}

    # what is looked up

    def read(self, user: fx.Node, value: fx.Node, rank: int, around: Mapping[int, str]) -> dict[int, str]:
        """Note that `user` reads the table `value`, broadcast to `rank` dims among values whose roles are
        `around`; the roles of what is looked up."""
        table = self.known[value]
        if len(table.dims) > 2:
            raise self.refuse(user, "a table over more than two positions")
        roles = self.aligned(value, rank)
        if len(roles) == 1:
            ((dim, _),) = roles.items()
            roles[dim] = around.get(dim, NEW)
        if NEW in roles.values() and (0 in roles or around.get(0, BATCH) != BATCH):
            raise self.refuse(user, "a table of positions beside values whose dim 0 is not the batch")
        if not set(roles.values()) <= {NEW, HELD}:
            raise self.refuse(user, "a table of positions beside values with batch and positions in one dim")
        times = self.times(user) if NEW in roles.values() else 1
        read = Read(self.name, user, value, table.index, rank, tuple(sorted(roles.items())), times)
        self.labels.reads.append(read)
        return {0: BATCH, **roles} if NEW in roles.values() else roles

    def times(self, node: fx.Node) -> int:
        """How many rows of dim 0 belong to each row of the batch."""
        made = tensor(node)
        assert made is not None
        size = made.shape[0]
        return 1 if isinstance(size, int) else max(1, hint(size) // self.sequence.batch)

    # what is remembered

    def remember(self, user: fx.Node, value: fx.Node, name: str) -> None:
        """`user` shall read `value` at all held positions; it is remembered where it is smallest."""
        best, reader = value, user
        step, last = value, user
        while (source := self._source(step)) is not None:
            last, step = step, source
            if _width(step) < _width(best):
                best, reader = step, last
        axes = self.axes(best)
        if len(axes.dims(NEW)) != 1 or axes.dims(BATCH) != [0]:
            raise self.refuse(user, f"{name} whose dim 0 is not the batch")
        site = Site(self.name, reader, best, axes.dims(NEW)[0], name)
        if site not in self.labels.sites:
            self.labels.sites.append(site)
        node = value
        while node is not best:
            roles = self.axes(node).roles
            self.known[node] = Axes({dim: HELD if role == NEW else role for dim, role in roles.items()})
            node = node.args[0]  # type: ignore[assignment]

    def _source(self, node: fx.Node) -> fx.Node | None:
        """What `node` merely moves, where that could be remembered in its place."""
        if not is_call(node, *MOVES) or len(node.users) > 1 or len(node.all_input_nodes) != 1:
            return None
        source = node.all_input_nodes[0]
        known = self.known.get(source)
        alone = isinstance(known, Axes) and sorted(known.roles.values()) == [BATCH, NEW]
        same = alone and source is node.args[0] and known.dims(BATCH) == [0]  # type: ignore[union-attr]
        return source if same and tensor(source) is not None else None


def rank_of(node: Any) -> int:
    """The number of dims of a value."""
    value = tensor(node)
    assert isinstance(value, torch.Tensor)
    return value.dim()


def _width(node: fx.Node) -> int:
    """The numbers of a value at the sample sizes."""
    value = tensor(node)
    assert value is not None
    total = 1
    for size in value.shape:
        total *= hint(size)
    return total
