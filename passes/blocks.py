"""The layers of a program, found by dataflow: what stands between two values that everything goes through.

A *cut* is a value of the residual stream, [B, S, D], that nothing of the stream jumps over and that every
attention and feed-forward either leads to or follows from. Between two cuts stand attentions (a),
feed-forwards (f), both (a parallel residual) or neither (a norm). Blocks are the pieces that repeat: those
under one number of the user's module list where the model has one and its paths say so, else the smallest
period of the kinds (`a f a f` → `a f`), else a block begins at each attention that follows a feed-forward.

    x_b ─ n ─ attention ─ + ─ n ─ ffn ─ + ─ … ─ +       what blocks read and give: x_b, x_0b, x_1b, …
     └───────────────────┘└────────────┘

Values made before the first attention or feed-forward may be read by every block (an embedding that is
added again): they are no part of the stream. Loss terms are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from moec.errors import PassError
from moec.ir import Region, region_of
from moec.ir.dependence import READS_SHAPE_ONLY, token_dependent
from moec.ir.graphs import output, placeholder

aten = torch.ops.aten
ATTENTION_CORES = {aten.scaled_dot_product_attention.default, aten.softmax.int}


@dataclass(frozen=True)
class Block:
    """One layer. `entry`: the value of the stream that it reads; `exit`: the one it gives.

    `nodes`: the calls on the way from entry (not among them) to exit, in graph order. `regions`: the names of
    the regions it calls. `path`: the user's module path up to its number (`transformer.h.3`), '' where the
    paths do not tell.
    """

    index: int
    entry: fx.Node
    exit: fx.Node
    nodes: tuple[fx.Node, ...]
    regions: tuple[str, ...]
    path: str = ""


def blocks_of(root: fx.GraphModule) -> list[Block]:
    """The blocks of a root graph, in order; at least one.

    Raises `PassError` where there is no residual stream to cut: no attention or feed-forward that is a
    region, or no value that everything goes through. Reads the graph and its shapes; changes nothing.
    """
    stream = _Stream(root)
    layers = _layers(root, stream.groups())
    exits = _exits(layers)
    entries = [stream.entry(exits[0]), *exits[:-1]]
    return [
        _block(root, index, entry, exit_, _number(root, layer[0].working))
        for index, (entry, exit_, layer) in enumerate(zip(entries, exits, layers, strict=True))
    ]


def logits_of(graph: fx.Graph) -> fx.Node:
    """The node that is the program's logits, with loss terms beside it or without."""
    result: Any = output(graph).args[0]
    found = result[0] if isinstance(result, tuple | list) else result
    assert isinstance(found, fx.Node)
    return found


def ancestors(node: fx.Node) -> set[fx.Node]:
    """`node` and everything it is computed from."""
    found, stack = {node}, [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                stack.append(source)
    return found


@dataclass
class _Group:
    """A cut that completes some attentions or feed-forwards, and the cuts that follow without any.

    `working`: those attentions and feed-forwards; `kind`: `a`, `f` or `af`.
    """

    kind: str
    working: list[fx.Node]
    run: list[fx.Node]


class _Stream:
    """The part of a root graph that logits are computed from, and its cuts."""

    def __init__(self, root: fx.GraphModule) -> None:
        self.root = root
        live = ancestors(logits_of(root.graph))
        self.nodes = [node for node in root.graph.nodes if node in live]
        self.says = _says(root)
        called = [node for node in self.nodes if _kind(root, node)]
        if not called:
            found = "no attention and no feed-forward that is a region"
            raise PassError("the layers of the program", found, "a decoder at stage structured or sparse")
        self.shape = _shape(called[0].args[0])
        self.working = self._working(set(called))
        self.bits = {node: 1 << i for i, node in enumerate(self.working)}
        self.before, self.after = self._masks()
        reached = token_dependent(root.graph, set(called))
        self.body = {node for node in self.nodes if node in reached}

    def _working(self, called: set[fx.Node]) -> list[fx.Node]:
        """Attentions and feed-forwards: regions, cores of attention and products that are in none."""
        later, head = token_dependent(self.root.graph, called), _head(self.root.graph)
        loose = {*ATTENTION_CORES, aten.linear.default}
        return [n for n in self.nodes if n in called or (n in later and n.target in loose and n is not head)]

    def _masks(self) -> tuple[dict[fx.Node, int], dict[fx.Node, int]]:
        """For each node, as bits: what works before it (or is it), and what works after it."""
        before, after = dict[fx.Node, int](), dict.fromkeys(self.nodes, 0)
        for node in self.nodes:
            before[node] = self.bits.get(node, 0)
            for source in node.all_input_nodes:
                before[node] |= before[source]
        for node in reversed(self.nodes):
            for source in node.all_input_nodes:
                after[source] |= after[node] | self.bits.get(node, 0)
        return before, after

    def cuts(self) -> list[fx.Node]:
        """Values of the stream that nothing jumps over, in order."""
        place = {node: i for i, node in enumerate(self.nodes)}
        found, seen, furthest = [], 0, -1
        everything = (1 << len(self.working)) - 1
        for node in self.nodes:
            seen |= self.bits.get(node, 0)
            if node not in self.body or _shape(node) != self.shape:
                continue
            divides = self.before[node] == seen and self.after[node] == everything & ~seen
            if furthest <= place[node] and divides:
                found.append(node)
            furthest = max([furthest, *(place[user] for user in node.users if user in place)])
        return found

    def groups(self) -> list[_Group]:
        """Cuts by what they complete; raises `PassError` where there are none."""
        groups: list[_Group] = []
        done = 0
        for cut in self.cuts():
            fresh = [node for node in self.working if self.bits[node] & self.before[cut] & ~done]
            done |= self.before[cut]
            if fresh:
                kinds = {_kind(self.root, node) or _loose_kind(node) for node in fresh}
                groups.append(_Group("".join(sorted(kinds)), fresh, [cut]))
            elif groups:
                groups[-1].run.append(cut)
        if not groups:
            found = f"no value {self.shape} that everything goes through"
            raise PassError("the layers of the program", found, "a residual stream")
        return groups

    def entry(self, exit_: fx.Node) -> fx.Node:
        """What the first block reads: the last value of the stream before it that all of it follows from."""
        inside = ancestors(exit_)
        made = [n for n in self.nodes if n in inside and n in self.says and n not in self.body]
        read = [n for n in made if any(user in inside and user in self.body for user in n.users)]
        for node in reversed(made):
            later = token_dependent(self.root.graph, {node})
            if _shape(node) == self.shape and later.issuperset(read):
                return node
        found = f"no value {self.shape} that all of it follows from"
        raise PassError(f"the first layer, up to `{exit_.name}`", found, "a residual stream")


# which cuts are the ends of blocks


def _layers(root: fx.GraphModule, groups: list[_Group]) -> list[list[_Group]]:
    """The groups of each block."""
    numbers = _numbers(root, groups)
    if numbers:
        starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(numbers)) if a != b)]
    else:
        starts = _starts([group.kind for group in groups])
    return [groups[i:j] for i, j in pairwise([*starts, len(groups)])]


def _numbers(root: fx.GraphModule, groups: list[_Group]) -> list[int]:
    """The number that the user's paths give each group's block, where they tell blocks apart; else []."""
    paths = [_number(root, group.working) for group in groups]
    if "" in paths or len({path.rpartition(".")[0] for path in paths}) != 1:
        return []
    numbers = [int(path.rpartition(".")[2]) for path in paths]
    return numbers if numbers == sorted(numbers) and len(set(numbers)) > 1 else []


def _starts(kinds: list[str]) -> list[int]:
    """Where blocks begin, by the smallest period; else at each attention after a feed-forward."""
    count = len(kinds)
    for period in range(1, count):
        if count % period == 0 and kinds == kinds[:period] * (count // period):
            return list(range(0, count, period))
    return [0, *(i + 1 for i, (a, b) in enumerate(pairwise(kinds)) if "f" in a and "a" in b)]


def _exits(layers: list[list[_Group]]) -> list[fx.Node]:
    """The last value of each block.

    After the last block follow norms that are none of its own, before the second may stand what belongs to
    it: what all blocks have in common is theirs.
    """
    runs = [layer[-1].run for layer in layers]
    if len(runs) == 1:
        return [_own(runs[0])]
    # The first block reads a value that may be read again, so nothing of its first group is jumped over.
    clean = runs if len(layers[0]) > 1 else runs[1:]
    length = max(_common_length(clean), 1)
    ends = [run[length - 1] for run in clean]
    return ends if len(clean) == len(runs) else [_last_like(runs[0], clean[-1][:length]), *ends]


def _own(run: list[fx.Node]) -> fx.Node:
    """The last value that the user's paths put into a numbered module; the first where they do not tell."""
    own = [node for node in run if _numbered(str(node.meta.get("path") or ""))]
    return own[-1] if own else run[0]


def _common_length(runs: list[list[fx.Node]]) -> int:
    if len(runs) == 1:
        return runs[0].index(_own(runs[0])) + 1
    columns = zip(*([node.target for node in run] for run in runs), strict=False)
    lengths = [i for i, targets in enumerate(columns) if len(set(map(str, targets))) > 1]
    return lengths[0] if lengths else min(map(len, runs))


def _last_like(run: list[fx.Node], like: list[fx.Node]) -> fx.Node:
    """The end of the last stretch of `run` with the operators of `like`."""
    wanted = [str(node.target) for node in like]
    targets = [str(node.target) for node in run]
    ends = [e for e in range(len(like), len(run) + 1) if targets[e - len(like) : e] == wanted]
    return run[ends[-1] - 1] if ends else run[-1]


# what blocks are made of


def _block(root: fx.GraphModule, index: int, entry: fx.Node, exit_: fx.Node, path: str) -> Block:
    inside, later = ancestors(exit_), token_dependent(root.graph, {entry})
    nodes = tuple(n for n in root.graph.nodes if n in inside and n in later and n is not entry)
    regions = tuple(str(node.target) for node in nodes if node.op == "call_module")
    return Block(index, entry, exit_, nodes, regions, path)


def _says(root: fx.GraphModule) -> set[fx.Node]:
    """What depends on the values of tokens; the region of positions reads their shape alone."""
    found = {placeholder(root.graph)}
    for node in root.graph.nodes:
        region = _region(root, node)
        reads_values = node.target not in READS_SHAPE_ONLY and (region is None or region.kind != "positions")
        if reads_values and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _head(graph: fx.Graph) -> fx.Node | None:
    """The product that gives the logits."""
    node: Any = logits_of(graph)
    while isinstance(node, fx.Node) and node.target is not aten.linear.default:
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        node = tensors[0] if tensors else None
    return node


def _kind(root: fx.GraphModule, node: fx.Node) -> str:
    """`a` for a call of an attention, `f` of a feed-forward or a part of one; '' for anything else."""
    region = _region(root, node)
    if region is None or region.kind == "positions":
        return ""
    return "a" if region.kind == "attention" else "f"


def _loose_kind(node: fx.Node) -> str:
    return "a" if node.target in ATTENTION_CORES else "f"


def _region(root: fx.GraphModule, node: fx.Node) -> Region | None:
    return region_of(root.get_submodule(str(node.target))) if node.op == "call_module" else None


def _shape(node: object) -> list[str]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return [str(size) for size in value.shape] if floating else []  # type: ignore[union-attr]


def _number(root: fx.GraphModule, nodes: Iterable[fx.Node]) -> str:
    """`transformer.h.3` where all of `nodes` stand in one numbered module, '' otherwise."""
    paths = set()
    for node in nodes:
        region = _region(root, node)
        own = region.path if region is not None and region.path else str(node.meta.get("path") or "")
        paths.add(_numbered(own))
    return paths.pop() if len(paths) == 1 else ""


def _numbered(path: str) -> str:
    """The module path up to its first number; '' where it has none."""
    atoms = path.split(".")
    first = next((i for i, atom in enumerate(atoms) if atom.isdigit()), None)
    return ".".join(atoms[: first + 1]) if first is not None else ""
