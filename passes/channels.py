"""The channels of a region: what can be dealt out to ranks because nothing inside the region mixes it.

Between the products that read a region's input and its last product, hidden units of a feed-forward never
meet one another, nor do the heads of an attention (grouped ones meet with the keys they share). Which outputs
of which product belong together depends on the spelling: fused q, k and v in blocks or head by head, gate and
up in halves or interleaved, heads repeated or grouped. Instead of knowing the spellings, give each output of
a first product an id, and see which ids meet on the way (`carry_ids`).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from moec.ir.graphs import output, placeholder, weight_of
from moec.ir.patterns import is_call

from .carry_ids import NONE, Meetings, MixedError, carry, has_ids

aten = torch.ops.aten

Sample = Mapping[Any, int]


@dataclass(frozen=True)
class Channels:
    """What `find_channels` found: `count` channels, numbered in the order the last product reads them.

    `ids`: node → its ids for one sequence of two tokens, i64 (a list where the node is one); values made of
    no channel are not listed. `channel`: id → channel, i64. `columns`: the products that make the channels,
    `row`: the last product, which reads them. `inputs`: node → shape (or number) of every other value.
    """

    count: int
    ids: Mapping[fx.Node, Any]
    channel: Tensor
    columns: tuple[fx.Node, ...]
    row: fx.Node
    inputs: Mapping[fx.Node, Any]


def sample_of(root: fx.GraphModule) -> Sample:
    """The sizes that regions of `root` are evaluated with: one sequence of two tokens."""
    tokens = placeholder(root.graph).meta["val"]
    return {size.node.expr: n for size, n in zip(tokens.shape, (1, 2), strict=True)}


def find_channels(region: fx.GraphModule, sample: Sample) -> Channels | str:
    """The channels of an attention or a feed-forward; why there are none to speak of, otherwise."""
    try:
        return _Reading(region, sample).read()
    except MixedError as mixed:
        return str(mixed)


def concrete(value: Any, sample: Sample) -> Any:
    """A size, or the shape of a tensor (tuple), with the sample's sizes put in; lists item by item."""
    if isinstance(value, Tensor):
        return tuple(concrete(size, sample) for size in value.shape)
    if isinstance(value, list | tuple):
        return [concrete(item, sample) for item in value]
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        found = value.node.expr.subs(sample)
        return int(found) if isinstance(value, torch.SymInt) else float(found)
    return value


def matrix_of(region: fx.GraphModule, product: fx.Node) -> tuple[fx.Node, bool]:
    """The weight that a `linear` reads, and whether it is stored as [in, out]; `MixedError` for one that is
    computed."""
    matrix, turned = product.args[1], False
    while is_call(matrix, aten.t.default):
        matrix, turned = matrix.args[0], not turned  # type: ignore[union-attr]
    if not isinstance(matrix, fx.Node) or weight_of(region, matrix) is None:
        raise MixedError(f"the weight of `{product.name}` is computed")
    return matrix, turned


class _Reading:
    def __init__(self, region: fx.GraphModule, sample: Sample) -> None:
        self.region, self.sample = region, sample
        self.meetings = Meetings()
        self.ids: dict[fx.Node, Any] = {}
        self.inputs: dict[fx.Node, Any] = {}
        self.columns: list[fx.Node] = []

    def read(self) -> Channels:
        row = output(self.region.graph).args[0]
        if not is_call(row, aten.linear.default):
            raise MixedError("it does not end in a product with a weight")
        assert isinstance(row, fx.Node)
        for node in self.region.graph.nodes:
            if node is row:
                return self._finish(row)
            self._visit(node)
        raise AssertionError("unreachable: the output is a node of the graph")

    def _visit(self, node: fx.Node) -> None:
        shape = concrete(node.meta.get("val"), self.sample)
        if is_call(node, aten.linear.default):
            self._column(node, shape)
        elif any(source in self.ids for source in node.all_input_nodes):
            found = self._carry(node, shape)
            if has_ids(found):
                self.ids[node] = found
        if node not in self.ids:
            self.inputs[node] = shape

    def _column(self, node: fx.Node, shape: tuple[int, ...]) -> None:
        if node.args[0] in self.ids:
            raise MixedError(f"`{node.name}` mixes all channels before the last product")
        matrix_of(self.region, node)
        self.ids[node] = self.meetings.fresh(shape[-1]).expand(shape)
        self.columns.append(node)

    def _carry(self, node: fx.Node, shape: Any) -> Any:
        if node.target is operator.getitem:
            container, index = node.args
            return self.ids[container][index]  # type: ignore[index]
        if not isinstance(shape, tuple | list):
            raise MixedError(f"`{node.name}` reads a size that counts channels")
        return carry(node.target, arguments_of(node, self.value), shape, self.meetings)

    def value(self, node: fx.Node) -> Any:
        """The ids of a node; a tensor of none, or a number, for what is made of no channel."""
        if node in self.ids:
            return self.ids[node]
        known = self.inputs[node]
        return torch.full(known, NONE) if isinstance(known, tuple) else known

    def _finish(self, row: fx.Node) -> Channels:
        if row.args[0] not in self.ids:
            raise MixedError("its last product reads what no first product makes")
        matrix_of(self.region, row)
        read = self._units(self.ids[row.args[0]])  # type: ignore[index]
        smallest = self.meetings.channels()
        order = list(dict.fromkeys(smallest[read].tolist()))
        number = torch.full((self.meetings.count,), NONE)
        number[torch.tensor(order)] = torch.arange(len(order))
        channel = number[smallest]
        for node in self.columns:
            if bool((channel[self.ids[node]] == NONE).any()):
                raise MixedError(f"some outputs of `{node.name}` do not reach the last product")
        return Channels(len(order), self.ids, channel, tuple(self.columns), row, self.inputs)

    def _units(self, read: Tensor) -> Tensor:
        """The id of each feature that the last product reads, i64 [F]."""
        if bool((read == NONE).any()):
            raise MixedError("its last product also reads what no first product makes")
        features = read.flatten(0, -2)
        self.meetings.meet(features, features[:1].expand_as(features))
        return features[0]


def arguments_of(node: fx.Node, value: Any) -> dict[str, Any]:
    """The arguments of a call by the names of its schema, nodes replaced by `value(node)`."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    named = {argument.name: given for argument, given in zip(schema, node.args, strict=False)} | node.kwargs
    return {name: fx.node.map_arg(given, value) for name, given in named.items()}
