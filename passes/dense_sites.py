"""What of the dense part can be dealt out to the ranks of a tensor group, and why the rest cannot.

A site is an attention, a feed-forward, an embedding of the tokens or the head. A weight that several sites
read (tied embeddings, shared layers) is cut in one way for all of them, or for none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx

from moec.ir.graphs import attribute, named_weights, weight_of
from moec.ir.mesh import TENSOR
from moec.ir.patterns import is_call, tensor
from moec.ir.placement import Split

from .carry_ids import MixedError, aten
from .channels import arguments_of, matrix_of
from .deal_channels import Deal
from .deal_regions import deal_regions
from .vocabulary_sites import embeddings, head, require_plain


@dataclass(frozen=True)
class Site:
    """Something that can be dealt out: `splits` by structural name of the weight, and what to print beside
    which node of its own."""

    name: str
    splits: Mapping[str, Split]
    said: Mapping[fx.Node, str] = field(default_factory=dict)


def dense_sites(root: fx.GraphModule, ranks: int) -> tuple[list[Site], dict[str, str]]:
    """The sites that can be dealt out to `ranks` ranks, and the others by name, with the reason."""
    found: list[Site] = []
    refused: dict[str, str] = {}
    for name, site in _candidates(root, ranks):
        if isinstance(site, Site):
            found.append(site)
        else:
            refused[name] = site
    refused |= _at_odds(root, found)
    return [site for site in found if site.name not in refused], refused


def _candidates(root: fx.GraphModule, ranks: int) -> Iterator[tuple[str, Site | str]]:
    for name, found in deal_regions(root, ranks).items():
        yield name, _region_site(name, found)
    for node in embeddings(root):
        yield node.name, _embedding_site(root, node, ranks)
    yield "the head", _head_site(root, ranks)


def _region_site(name: str, found: Deal | str) -> Site | str:
    if isinstance(found, str):
        return found
    return Site(name, {f"{name}.{leaf}": split for leaf, split in found.splits.items()}, found.placements)


def _embedding_site(root: fx.GraphModule, node: fx.Node, ranks: int) -> Site | str:
    try:
        require_plain(root, node)
    except MixedError as mixed:
        return str(mixed)
    weight = node.args[0]
    assert isinstance(weight, fx.Node)
    splits = {str(weight.target): _by_words(root, weight, 0, ranks)}
    return Site(node.name, splits, {node: f"sum over {TENSOR}"})


def _head_site(root: fx.GraphModule, ranks: int) -> Site | str:
    try:
        product, tail = head(root)
    except MixedError as mixed:
        return str(mixed)
    matrix, turned = matrix_of(root, product)
    splits = {str(matrix.target): _by_words(root, matrix, int(turned), ranks)}
    bias = arguments_of(product, lambda n: n).get("bias")
    if bias is not None:
        splits[str(bias.target)] = _by_words(root, bias, 0, ranks)
    logits = tensor(product)
    assert logits is not None
    return Site("the head", splits, dict.fromkeys([product, *tail], f"dim {logits.dim() - 1} over {TENSOR}"))


def _by_words(root: fx.GraphModule, weight: fx.Node, dim: int, ranks: int) -> Split:
    value = weight_of(root, weight)
    assert value is not None
    return Split(dim, TENSOR, ranks, (int(value.shape[dim]),))


# weights that several read


def _at_odds(root: fx.GraphModule, sites: list[Site]) -> dict[str, str]:
    """The sites that cannot have their weights as they need them, with the reason."""
    claims: dict[int, list[tuple[str, str, Split | None]]] = {}
    for name, value in named_weights(root):
        claims.setdefault(id(value), []).extend(_claims(root, name, value, sites))
    refused: dict[str, str] = {}
    while True:
        more: dict[str, str] = {}
        for claim in claims.values():
            wanted = {None if site in refused else split for site, _, split in claim}
            if len(wanted) > 1:
                reason = f"its weight {claim[0][1]} is needed in another way elsewhere"
                more |= {site: reason for site, _, split in claim if split is not None}
        if not more.keys() - refused.keys():
            return refused
        refused = more | refused


def _claims(
    root: fx.GraphModule, name: str, value: Tensor, sites: list[Site]
) -> Iterator[tuple[str, str, Split | None]]:
    """(site, weight, how it needs the weight cut) of all that read the weight of this name."""
    owners = [site for site in sites if name in site.splits]
    for site in owners:
        yield site.name, name, site.splits[name]
    if not owners or _reads_otherwise(root, name, {node for site in owners for node in site.said}):
        yield "", name, None


def _reads_otherwise(root: fx.GraphModule, name: str, known: set[fx.Node]) -> bool:
    """Whether the root graph reads a weight at a node that belongs to no site."""
    for node in root.graph.nodes:
        if node.op == "get_attr" and node.target == name:
            for user in node.users:
                readers = list(user.users) if is_call(user, aten.t.default) else [user]
                if not known.issuperset(readers):
                    return True
    return False


def whole_shape(root: fx.GraphModule, name: str) -> tuple[int, ...]:
    """The shape of a weight of `root`."""
    value = attribute(root, name)
    assert isinstance(value, Tensor)
    return tuple(value.shape)
