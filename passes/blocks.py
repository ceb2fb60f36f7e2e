"""The layers of a program, found by dataflow: what stands between two values that everything goes through.

Between two cuts of the residual stream (`residual_stream.py`) stand attentions (a), feed-forwards (f), both
(a parallel residual) or neither (a norm). Blocks are the pieces that repeat: those under one number of the
user's module list where the model has one and its paths say so, else the smallest period of the kinds
(`a f a f` → `a f`), else a block begins at each attention that follows a feed-forward.

    x_b ─ n ─ attention ─ + ─ n ─ ffn ─ + ─ … ─ +       what blocks read and give: x_b, x_0b, x_1b, …
     └───────────────────┘└────────────┘
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from torch import fx

from moec.ir.dependence import token_dependent

from .residual_stream import Group, Stream, ancestors, region_called


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
    stream = Stream(root)
    layers = _layers(root, stream.groups())
    exits = _exits(layers)
    entries = [stream.entry(exits[0]), *exits[:-1]]
    return [
        _block(root, index, entry, exit_, _number(root, layer[0].working))
        for index, (entry, exit_, layer) in enumerate(zip(entries, exits, layers, strict=True))
    ]


# which cuts are the ends of blocks


def _layers(root: fx.GraphModule, groups: list[Group]) -> list[list[Group]]:
    """The groups of each block."""
    numbers = _numbers(root, groups)
    if numbers:
        starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(numbers)) if a != b)]
    else:
        starts = _starts([group.kind for group in groups])
    return [groups[i:j] for i, j in pairwise([*starts, len(groups)])]


def _numbers(root: fx.GraphModule, groups: list[Group]) -> list[int]:
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


def _exits(layers: list[list[Group]]) -> list[fx.Node]:
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


def _number(root: fx.GraphModule, nodes: Iterable[fx.Node]) -> str:
    """`transformer.h.3` where all of `nodes` stand in one numbered module, '' otherwise."""
    paths = set()
    for node in nodes:
        region = region_called(root, node)
        own = region.path if region is not None and region.path else str(node.meta.get("path") or "")
        paths.add(_numbered(own))
    return paths.pop() if len(paths) == 1 else ""


def _numbered(path: str) -> str:
    """The module path up to its first number; '' where it has none."""
    atoms = path.split(".")
    first = next((i for i, atom in enumerate(atoms) if atom.isdigit()), None)
    return ".".join(atoms[: first + 1]) if first is not None else ""
