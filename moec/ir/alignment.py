"""Two graphs of one lineage, node by node: what was kept, moved, rewired, created, removed, made from what.

    aligned = align(program.stages["name_values"], program.stages["lift_experts"])

Nodes are paired by identity (`moec.ir.identity`), never by name, place or likeness.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from moec.errors import PassError

from .identity import DESCENT, MADE_FROM, Place, identity_of, places


@dataclass(frozen=True)
class Alignment:
    """What became of each node from one graph to another; keys are identities, in the order of the graphs.

    `kept`: its place before and after. Of these, `moved` stand in another region (one is the same while it
    is called the same, or by the same node) and `rewired` stand where they stood, and read other nodes or
    have other options. `created` and `removed` are on one side alone. `ancestors`: a created node → the
    nearest nodes of the graph before that it was made from, through any number of passes; without an entry
    it was made from none.
    """

    kept: Mapping[str, tuple[Place, Place]]
    moved: frozenset[str]
    rewired: frozenset[str]
    created: Mapping[str, Place]
    removed: Mapping[str, Place]
    ancestors: Mapping[str, tuple[str, ...]]

    def status(self, identity: str) -> str:
        """`kept`, `moved`, `rewired`, `created` or `removed`; KeyError for what stands in neither graph."""
        if identity in self.kept:
            changed = ("moved", self.moved), ("rewired", self.rewired)
            return next((word for word, those in changed if identity in those), "kept")
        found = {**dict.fromkeys(self.removed, "removed"), **dict.fromkeys(self.created, "created")}
        return found[identity]


def align(before: fx.GraphModule, after: fx.GraphModule) -> Alignment:
    """Pair the nodes of two graphs of one lineage. Raises `PassError` where a node has no identity of its
    own."""
    old, new = _by_identity(before), _by_identity(after)
    kept = {key: (old[key], place) for key, place in new.items() if key in old}
    calls = _calls(before), _calls(after)
    moved = frozenset(
        key
        for key, (a, b) in kept.items()
        if a.region != b.region and calls[0].get(a.region) != calls[1].get(b.region, "")
    )
    rewired = frozenset(
        key for key, (a, b) in kept.items() if key not in moved and _reads(a.node) != _reads(b.node)
    )
    created = {key: place for key, place in new.items() if key not in old}
    removed = {key: place for key, place in old.items() if key not in new}
    traced = ((key, tuple(dict.fromkeys(_nearest(place.node, old)))) for key, place in created.items())
    ancestors = {key: found for key, found in traced if found}
    return Alignment(kept, moved, rewired, created, removed, ancestors)


def _by_identity(root: fx.GraphModule) -> dict[str, Place]:
    found: dict[str, Place] = {}
    for place in places(root):
        other = found.setdefault(identity_of(place.node), place)
        if other is not place:
            raise PassError(
                f"node {place.node.name}", f"the identity of {other.node.name}", "one of its own",
                "moec.ir.identity.identify settles it after a rewrite",
            )  # fmt: skip
    return found


def _calls(root: fx.GraphModule) -> dict[str, str]:
    """Each region's name → the identity of the node that calls it first."""
    found: dict[str, str] = {}
    for region, node in places(root):
        if node.op == "call_module":
            name = f"{region}.{node.target}" if region else str(node.target)
            found.setdefault(name, identity_of(node))
    return found


class _Read:
    """Stands for a node among arguments, and is spelled by its identity."""

    def __init__(self, node: fx.Node) -> None:
        self.identity = identity_of(node)

    def __repr__(self) -> str:
        return f"<{self.identity}>"


def _read(node: fx.Node) -> Any:
    return _Read(node)


def _reads(node: fx.Node) -> str:
    """Arguments, the nodes among them by identity. Spelled, so that nan equals itself and 0.0 is not -0.0."""
    return repr(fx.node.map_arg((node.args, node.kwargs), _read))


def _nearest(node: fx.Node, old: Mapping[str, Place]) -> Iterator[str]:
    """The nearest identities of `old` that `node` was made from."""
    descent: Mapping[str, tuple[str, ...]] = node.meta.get(DESCENT, {})
    waiting, seen = list(node.meta.get(MADE_FROM, ())), set[str]()
    while waiting:
        key = waiting.pop(0)
        if key in seen:
            continue
        seen.add(key)
        if key in old:
            yield key
        else:
            waiting += descent.get(key, ())
