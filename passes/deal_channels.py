"""Deal the channels of a region out to ranks: which part of each weight and of each value a rank has.

Each rank gets as many channels as the others, neighbours in the order of the last product. What follows for
the region is worked out on ids (`channels`): a rank's part of every value must be a box, the sizes that the
region spells become those of the box, and, as proof, every operator is evaluated on each rank's ids with its
new sizes: it has to give the rank's part of what it gave on the whole.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from moec.ir import region_of
from moec.ir.graphs import weight_of
from moec.ir.mesh import TENSOR
from moec.ir.patterns import tensor
from moec.ir.placement import Split

from .carry_ids import NONE, PRODUCTS, Meetings, MixedError, carry, has_ids, is_pointwise
from .channels import Channels, arguments_of, matrix_of
from .local_sizes import Box, Fraction, local_arguments

aten = torch.ops.aten


@dataclass(frozen=True)
class Part:
    """`operand`, which no channel makes, meets channels at `user`: a rank needs its part of dim `dim`."""

    user: fx.Node
    operand: fx.Node
    dim: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Deal:
    """A region dealt out to `ranks` ranks.

    `splits`: weight of the region → how it is cut. `arguments`: call → those of its arguments (by the
    schema's names) that change. `parts`: whole values of which a rank needs a part. `placements`: what is
    printed beside values.
    """

    ranks: int
    splits: Mapping[str, Split]
    arguments: Mapping[fx.Node, Mapping[str, Any]]
    parts: tuple[Part, ...]
    placements: Mapping[fx.Node, str]


def deal(region: fx.GraphModule, channels: Channels, ranks: int) -> Deal | str:
    """Deal `channels` of `region` out to `ranks` ranks; the reason, where that cannot be."""
    if channels.count == 1:
        return "what its first products make is all mixed before the last one"
    if channels.count % ranks:
        return f"{ranks} ranks do not divide its {channels.count} {_word(region)}"
    try:
        return _Dealing(region, channels, ranks).deal()
    except MixedError as mixed:
        return str(mixed)


def _word(region: fx.GraphModule) -> str:
    """What the channels of a region are, to a reader."""
    known = region_of(region)
    return "heads, grouped by keys" if known is not None and known.kind == "attention" else "hidden units"


def blocks_of(ranks_of: Tensor, ranks: int) -> tuple[int, ...]:
    """The lengths of the blocks that are each cut into `ranks` stretches; `ranks_of`: index → rank, i64 [n].

    Raises `MixedError` when the ranks do not run through the indices like that.
    """
    ends = (ranks_of[1:] != ranks_of[:-1]).nonzero().flatten() + 1
    starts = torch.cat([ends.new_zeros(1), ends])
    lengths = torch.diff(starts, append=ends.new_tensor([ranks_of.numel()]))
    if lengths.numel() % ranks:
        raise MixedError("its channels do not lie in blocks")
    lengths, owners = lengths.view(-1, ranks), ranks_of[starts].view(-1, ranks)
    even = bool((lengths == lengths[:, :1]).all()) and bool((owners == torch.arange(ranks)).all())
    if not even:
        raise MixedError("its channels do not lie in blocks")
    return tuple(lengths.sum(1).tolist())


@dataclass
class _Dealing:
    region: fx.GraphModule
    channels: Channels
    ranks: int
    boxes: dict[fx.Node, Any] = field(default_factory=dict)
    splits: dict[str, Split] = field(default_factory=dict)
    arguments: dict[fx.Node, dict[str, Any]] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)

    def deal(self) -> Deal:
        per_rank = self.channels.count // self.ranks
        self.rank_of_id = torch.div(self.channels.channel, per_rank, rounding_mode="floor")
        for node, ids in self.channels.ids.items():
            self.boxes[node] = [self._boxes(node, item) for item in ids] if isinstance(ids, list) else (
                self._boxes(node, ids))  # fmt: skip
        for node in self.channels.columns:
            self._cut_column(node)
        self._cut_row()
        for node in self.channels.ids:
            if node not in self.channels.columns and node.target is not operator.getitem:
                self._localise(node)
        self._cut_operands()
        self._require_whole_use()
        return Deal(self.ranks, self.splits, self.arguments, tuple(self.parts), self._placements())

    def _boxes(self, node: fx.Node, ids: Tensor) -> list[Box]:
        """For every rank, the indices along each dim at which its part of a value lies."""
        if not has_ids(ids):
            return [[torch.arange(size) for size in ids.shape]] * self.ranks
        if bool((ids == NONE).any()):
            raise MixedError(f"`{node.name}` holds channels beside what belongs to none")
        owners = self.rank_of_id[ids]
        boxes = [_box(owners == rank, node) for rank in range(self.ranks)]
        if len({tuple(map(len, box)) for box in boxes}) > 1:
            raise MixedError(f"the ranks' parts of `{node.name}` are not equally long")
        return boxes

    def _blocks(self, node: fx.Node, boxes: list[Box], dim: int) -> tuple[int, ...]:
        size = sum(len(box[dim]) for box in boxes)
        owner = torch.empty(size, dtype=torch.long)
        for rank, box in enumerate(boxes):
            owner[box[dim]] = rank
        return blocks_of(owner, self.ranks)

    def _cut(self, target: str, dim: int, blocks: tuple[int, ...]) -> None:
        split = Split(dim, TENSOR, self.ranks, blocks)
        if self.splits.setdefault(target, split) != split:
            raise MixedError(f"its weight `{target}` is read in two ways")

    def _cut_column(self, node: fx.Node) -> None:
        matrix, turned = matrix_of(self.region, node)
        blocks = self._blocks(node, self.boxes[node], -1)
        self._cut(str(matrix.target), int(turned), blocks)
        bias = arguments_of(node, lambda n: n).get("bias")
        if bias is not None and weight_of(self.region, bias) is None:
            raise MixedError(f"the bias of `{node.name}` is computed")
        if bias is not None:
            self._cut(str(bias.target), 0, blocks)

    def _cut_row(self) -> None:
        row = self.channels.row
        matrix, turned = matrix_of(self.region, row)
        source = row.args[0]
        assert isinstance(source, fx.Node)
        self._cut(str(matrix.target), int(not turned), self._blocks(source, self.boxes[source], -1))

    # values between the products

    def _localise(self, node: fx.Node) -> None:
        """Find the local arguments of a call, and prove on every rank's ids that they are right."""
        known = {n: self.boxes[n] for n in node.all_input_nodes if n in self.boxes}
        changed = local_arguments(node, self.channels, known, self.boxes[node], self.ranks)
        if changed:
            self.arguments[node] = changed
        parts = list(self._operand_parts(node))
        self.parts += parts
        for rank in range(self.ranks):
            self._prove(node, changed, parts, rank)

    def _operand_parts(self, node: fx.Node) -> Sequence[Part]:
        target = node.target
        products = target in PRODUCTS or target is aten.scaled_dot_product_attention.default
        if not (products or is_pointwise(target)):
            return []
        inner, boxes = 2 if products else 0, self.boxes[node]
        whole = self.channels.ids[node].shape
        found = []
        for operand in node.all_input_nodes:
            known = self.channels.inputs.get(operand)
            shape = known if isinstance(known, tuple) else ()
            for dim, size in enumerate(shape):
                along = dim - len(shape)
                divided = along < -inner and len(boxes[0][along]) < whole[along]
                if divided and size > 1:
                    found.append(self._part(node, operand, dim, self._blocks(node, boxes, along)))
        return found

    def _part(self, node: fx.Node, operand: fx.Node, dim: int, blocks: tuple[int, ...]) -> Part:
        value = tensor(operand)
        if value is None or not isinstance(value.shape[dim], int):
            raise MixedError(
                f"`{operand.name}`, which meets channels at `{node.name}`, counts them by a free size"
            )
        return Part(node, operand, dim, blocks)

    def _prove(self, node: fx.Node, changed: Mapping[str, Any], parts: list[Part], rank: int) -> None:
        def local(source: fx.Node) -> Any:
            if source in self.boxes:
                return _parts_of(self.channels.ids[source], self.boxes[source], rank)
            known = self.channels.inputs[source]
            if not isinstance(known, tuple):
                return known
            if 0 in known:  # nothing is read from it, and concatenation passes over an empty vector
                return torch.full([0], NONE)
            cut = {part.dim: sum(part.blocks) // self.ranks for part in parts if part.operand is source}
            return torch.full([cut.get(dim, size) for dim, size in enumerate(known)], NONE)

        arguments = arguments_of(node, local) | {
            name: fx.node.map_aggregate(value, lambda v: self._size(v)) for name, value in changed.items()
        }
        needed = _parts_of(self.channels.ids[node], self.boxes[node], rank)
        shape = () if isinstance(needed, list) else needed.shape
        if not _agree(_carried(node.target, arguments, shape), needed):
            raise MixedError(f"`{node.name}` cannot be spelled for a part of the channels")

    def _size(self, value: Any) -> Any:
        if isinstance(value, Fraction):
            return self.channels.inputs[value.size] // value.ranks
        return self.channels.inputs[value] if isinstance(value, fx.Node) else value

    # weights between the products

    def _cut_operands(self) -> None:
        """A weight of which every reader needs the same part is cut itself."""
        for target in {str(part.operand.target) for part in self.parts if part.operand.op == "get_attr"}:
            parts = [part for part in self.parts if part.operand.target == target]
            readers = [user for node in _reads(self.region, target) for user in node.users]
            if len({(part.dim, part.blocks) for part in parts}) == 1 and set(readers) == {
                p.user for p in parts
            }:
                self._cut(target, parts[0].dim, parts[0].blocks)
                self.parts = [part for part in self.parts if part not in parts]

    def _require_whole_use(self) -> None:
        """No weight that is cut may also be read by something that needs it whole."""
        known = {*self.channels.columns, self.channels.row, *self.channels.ids}
        for target in self.splits:
            for node in _reads(self.region, target):
                for user in node.users:
                    users = user.users if user.target is aten.t.default else [user]
                    if not known.issuperset(users):
                        raise MixedError(f"its weight `{target}` is also read whole, by `{user.name}`")

    def _placements(self) -> dict[fx.Node, str]:
        said = {node: self._said(node) for node in self.channels.ids}
        return {node: text for node, text in said.items() if text} | {self.channels.row: f"sum over {TENSOR}"}

    def _said(self, node: fx.Node) -> str:
        ids, boxes = self.channels.ids[node], self.boxes[node]
        ids, boxes = (ids[0], boxes[0]) if isinstance(ids, list) else (ids, boxes)
        divided = [dim for dim, indices in enumerate(boxes[0]) if len(indices) < ids.shape[dim]]
        return " · ".join(f"dim {dim} over {TENSOR}" for dim in divided)


def _box(here: Tensor, node: fx.Node) -> Box:
    """The indices along each dim where `here` holds; `MixedError` when that is no box."""
    box = [here.movedim(dim, 0).flatten(1).any(1).nonzero().flatten() for dim in range(here.dim())]
    if math.prod(map(len, box)) != int(here.sum()):
        raise MixedError(f"the channels of one rank are no box of `{node.name}`")
    return box


def _part_of(ids: Tensor, box: Box) -> Tensor:
    for dim, indices in enumerate(box):
        ids = ids if len(indices) == ids.shape[dim] else ids.index_select(dim, indices)
    return ids


def _parts_of(ids: Any, boxes: Any, rank: int) -> Any:
    if isinstance(ids, list):
        return [_part_of(item, ranks[rank]) for item, ranks in zip(ids, boxes, strict=True)]
    return _part_of(ids, boxes[rank])


def _carried(target: Any, arguments: dict[str, Any], shape: Sequence[int]) -> Any:
    try:
        return carry(target, arguments, shape, Meetings())
    except (RuntimeError, IndexError):
        return None  # the sizes do not fit the rank's parts


def _agree(found: Any, needed: Any) -> bool:
    if isinstance(needed, list):
        return isinstance(found, list) and len(found) == len(needed) and all(map(_agree, found, needed))
    return isinstance(found, Tensor) and torch.equal(found, needed)


def _reads(region: fx.GraphModule, target: str) -> list[fx.Node]:
    return [node for node in region.graph.nodes if node.op == "get_attr" and node.target == target]
