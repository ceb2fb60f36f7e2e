"""The attentions and dense feed-forwards of a program, dealt out to ranks; alike ones only once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from moec.ir import regions

from .channels import Sample, find_channels, sample_of
from .deal_channels import Deal, Part, deal
from .local_sizes import Fraction

KINDS = ("attention", "ffn", "branch")


def dense_regions(root: fx.GraphModule) -> dict[str, fx.GraphModule]:
    """The attentions and dense feed-forwards of a root graph, in calling order."""
    return {name: module for name, module in regions(root).items() if name.partition("_")[0] in KINDS}


def deal_regions(root: fx.GraphModule, ranks: int) -> dict[str, Deal | str]:
    """How every dense region is dealt out to `ranks` ranks, by name; the reason where it is not."""
    found: dict[str, Deal | str] = {}
    known: dict[str, tuple[fx.GraphModule, Deal | str]] = {}
    sample = sample_of(root)
    for name, module in dense_regions(root).items():
        key = f"{name.partition('_')[0]} {_description(module)}"
        if key not in known:
            known[key] = module, _dealt(module, sample, ranks)
        found[name] = _moved(known[key][1], known[key][0], module)
    return found


def _dealt(module: fx.GraphModule, sample: Sample, ranks: int) -> Deal | str:
    channels = find_channels(module, sample)
    return channels if isinstance(channels, str) else deal(module, channels, ranks)


def _description(module: fx.GraphModule) -> str:
    """All that dealing depends on: calls, arguments, names and shapes."""
    nodes = module.graph.nodes
    return str([(n.op, n.name, n.target, n.args, n.kwargs, _shape(n.meta.get("val"))) for n in nodes])


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return [_shape(item) for item in value] if isinstance(value, list | tuple) else value


def _moved(found: Deal | str, source: fx.GraphModule, target: fx.GraphModule) -> Deal | str:
    """The same deal, of the nodes of another region that is alike."""
    if isinstance(found, str) or source is target:
        return found
    twin = dict(zip(source.graph.nodes, target.graph.nodes, strict=True))
    arguments = {
        twin[node]: fx.node.map_aggregate(dict(changed), lambda value: _twin(value, twin))
        for node, changed in found.arguments.items()
    }
    parts = tuple(Part(twin[p.user], twin[p.operand], p.dim, p.blocks) for p in found.parts)
    placements = {twin[node]: text for node, text in found.placements.items()}
    return Deal(found.ranks, found.splits, arguments, parts, placements)


def _twin(value: Any, twin: Mapping[fx.Node, fx.Node]) -> Any:
    if isinstance(value, Fraction):
        return Fraction(twin[value.size], value.ranks)
    return twin[value] if isinstance(value, fx.Node) else value
