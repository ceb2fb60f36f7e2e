"""Identities of nodes, which outlive rewrites.

A node is the same for as long as it is the same call: with other arguments, under another name, in another
region, in a fork. Three keys of `node.meta` say so:

    id         unique in the life of a program: "12-3f9a20c1.3" is the fourth node born in its twelfth step
    made_from  ids of the nodes that a rewrite made this one from, when it was born
    descent    where those came from in turn: id → ids, for nodes that are gone by now

A pass moves a node by copying it whole (`graph.node_copy`, `dict(node.meta)`), and says of a node that it
puts in the place of others that it is `made_from` them. What came of that is settled after the pass by
`identify`, and never by the pass: a node that stood there before has the identity it had, a copy has that of
a node that is gone, a second copy is made from it, and so is a node whose operator is another one now.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

from torch import fx

from moec.errors import PassError

from .graphs import graph_modules
from .region import region_of

ID, MADE_FROM, DESCENT = "id", "made_from", "descent"
_OWN = (ID, MADE_FROM, DESCENT)
PLACE_KEYS = ("path", "source")


class Place(NamedTuple):
    """A node and the dotted name of the region it stands in, '' for the root."""

    region: str
    node: fx.Node


def places(root: fx.GraphModule) -> Iterator[Place]:
    """Every node of `root` and of its regions, in order."""
    for region, module in graph_modules(root):
        for node in module.graph.nodes:
            yield Place(region, node)


def identity_of(node: fx.Node) -> str:
    """The identity of a node; `PassError` where `identify` never saw it."""
    found = node.meta.get(ID)
    if found is None:
        raise PassError(
            f"node {node.name}", "no identity", "a node of a program: capture, load and the runner identify"
        )
    return str(found)


def made_from(made: fx.Node, *sources: fx.Node, taking: Collection[str] = PLACE_KEYS) -> fx.Node:
    """Say of `made` that it was made from `sources`, whose identities it remembers; returns it.

    `taking`: what it takes of the first one's meta, in the place of its own; unless something else is asked
    for, the place in the user's model. A source without an identity was made in the same pass: what that was
    made from counts instead.
    """
    first = sources[0].meta
    lines = [_lines(source) for source in sources]
    ids = tuple(dict.fromkeys(id_ for own, _ in lines for id_ in own))
    descent = {id_: above for _, known in lines for id_, above in known.items()}
    made.meta = {key: first[key] for key in taking if key in first} | _born(ids, descent)
    return made


def take_facts(node: fx.Node, other: fx.Node) -> None:
    """Let everything that is said of the value of `other` be said of that of `node`, but who it is."""
    own = {key: node.meta[key] for key in _OWN if key in node.meta}
    node.meta = dict(other.meta)
    _put(node, own)


def _lines(source: fx.Node) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """What a node made from `source` is made from, and where that came from."""
    above, descent = source.meta.get(MADE_FROM, ()), dict(source.meta.get(DESCENT, {}))
    if ID not in source.meta:
        return above, descent
    own = source.meta[ID]
    return (own,), descent | ({own: above} if above else {})


def _born(ids: tuple[str, ...], descent: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    return ({MADE_FROM: ids} if ids else {}) | ({DESCENT: descent} if descent else {})


@dataclass(frozen=True)
class Identities:
    """Who stood in a graph, and as what, before a pass rewrote that very graph.

    `held`: each node → the identity it had and what it was born with. `stood`: identity → its operator, its
    region and its name.
    """

    held: Mapping[fx.Node, dict[str, Any]]
    stood: Mapping[str, tuple[object, str, str]]

    def step(self, number: int, what: object = "") -> str:
        """A name for the step that does `what` to these nodes: what branches off elsewhere has another."""
        return _step(number, [*self.stood, repr(what)])


def identities(root: fx.GraphModule) -> Identities:
    """The identities of all nodes of `root` that have one."""
    known = [place for place in places(root) if ID in place.node.meta]
    held = {node: {key: node.meta[key] for key in _OWN if key in node.meta} for _, node in known}
    stood = {node.meta[ID]: (_operator(root, region, node), region, node.name) for region, node in known}
    return Identities(held, stood)


def _step(number: int, said: Iterable[str]) -> str:
    digest = blake2b("\n".join(said).encode(), digest_size=4)
    return f"{number}-{digest.hexdigest()}"


def identified(root: fx.GraphModule, number: int) -> None:
    """Give an identity to nodes of `root` that have none: those of a graph that was captured, read or made by
    hand, in step `number`. Graphs that read alike get the same ones, all others have none in common."""
    if any(ID not in place.node.meta for place in places(root)):
        said = (f"{region} {node.name} {node.op} {node.target} {node.args}" for region, node in places(root))
        identify(root, _step(number, said))


def _operator(root: fx.GraphModule, region: str, node: fx.Node) -> object:
    """What makes a node another one when it changes: the operator, or the kind of the region it calls."""
    if node.op != "call_module":
        return node.target if node.op.startswith("call_") else node.op
    called = root.get_submodule(f"{region}.{node.target}" if region else str(node.target))
    record = region_of(called)
    return node.op, str(node.target) if record is None else record.kind


def identify(root: fx.GraphModule, step: str | int, before: Identities | None = None) -> None:
    """Give every node of `root` and its regions an identity of its own.

    `step` names the births: `Identities.step` makes names that are unique in a lineage. `before`: who stood
    in this graph when the pass began. Of several nodes with one identity the one that stood there keeps it,
    else one at the same place and of the same name, else the first; none whose operator is another.
    """
    before = before or Identities({}, {})
    claims: dict[str, list[Place]] = {}
    born: list[fx.Node] = []
    for place in places(root):
        node = place.node
        if node in before.held:
            _put(node, before.held[node])
        if ID in node.meta:
            claims.setdefault(node.meta[ID], []).append(place)
        else:
            born.append(node)
    for claimed, claimants in claims.items():
        born += _others(root, before, claimed, claimants)
    _name(born, step, set(claims))


def _put(node: fx.Node, own: Mapping[str, Any]) -> None:
    """Change whatever else says who `node` is."""
    for key in _OWN:
        node.meta.pop(key, None)
    node.meta.update(own)


def _others(root: fx.GraphModule, before: Identities, claimed: str, claimants: list[Place]) -> list[fx.Node]:
    """All but the one that keeps the identity, as made from it."""
    operator, *where = before.stood.get(claimed, (None, "", ""))
    able = [p for p in claimants if not where[1] or _operator(root, *p) == operator]

    def likeness(place: Place) -> tuple[bool, bool]:
        return place.node in before.held, [place.region, place.node.name] == where

    keeper = max(able, key=likeness, default=None)
    others = [place.node for place in claimants if place is not keeper]
    for node in others:
        ids, descent = _lines(node)
        _put(node, _born(ids, descent))
    return others


def _name(born: list[fx.Node], step: str | int, taken: set[str]) -> None:
    number = 0
    for node in born:
        while f"{step}.{number}" in taken:
            number += 1
        node.meta[ID] = f"{step}.{number}"
        number += 1
