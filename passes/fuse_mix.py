"""Let an expert layer add the dense feed-forward beside it to its answer.

before:  f_3 = self.ffn_3(n)
         m_3, balance_3, … = self.moe_3(n)
         y_3 = self.mix_3(n, m_3, f_3)                   # or  y_3 = f_3 + m_3
after:   f_3 = self.ffn_3(n)
         c_3 = self.mix_3(n)
         y_3, balance_3, … = self.moe_3(n, f_3, c_3)     # or  self.moe_3(n, f_3)

`moec.moe_ffn` takes the dense values, and their shares if there are any, and writes each token's answer once.
`mix_3` keeps its weights, and gives the shares alone.

Assumes: `fuse_moe_ffn` before it; residual layers as `branch_experts` writes them.
Contract: exact.
Source:  DeepSpeed-MoE, section 4.1.1, Residual-MoE.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

import moec.runtime.ops  # noqa: F401 - registers torch.ops.moec
from moec.ir import Check, Pass, Program, region_of, regions
from moec.ir.graphs import drop_unused, output, placeholder
from moec.ir.identity import made_from
from moec.ir.patterns import arguments_of, is_call, tensor

from .fusion_notes import DeclinedError, note_fusions
from .prove_fusion import prove_fusion

aten = torch.ops.aten
MOE_FFN = torch.ops.moec.moe_ffn.default


@dataclass(frozen=True)
class FuseMix(Pass):
    """See the module."""

    def apply(self, program: Program) -> Program:
        findings = []
        for name, module in regions(program.graph, "moe").items():
            region = region_of(module)
            assert region is not None
            if region.settings.get("residual", "none") == "none" or _is_folded(module):
                continue
            try:
                findings.append((name, _fold(program.graph, name, region.index)))
            except DeclinedError as reason:
                findings.append((name, f"the dense feed-forward is added outside: {reason}"))
        program.graph.recompile()
        note_fusions(program, self.name, findings)
        return program

    def ensures(self, before: Program, after: Program) -> list[Check]:
        """Every result and gradient, in both modes."""
        return prove_fusion(before, after)


@dataclass(frozen=True)
class Site:
    """One residual layer in the root graph: the `call` of the experts, the `dense` value, and the `sum` of
    the two, which is a mix region's call or an addition."""

    call: fx.Node
    experts: fx.Node
    dense: fx.Node
    sum: fx.Node


def _fold(root: fx.GraphModule, name: str, index: int) -> str:
    """Fold the sum into the layer `name`, and say so; raises `DeclinedError`."""
    module = root.get_submodule(name)
    assert isinstance(module, fx.GraphModule)
    fused = _fused_layer(module)
    site = _site(root, name, index)
    learned = site.sum.op == "call_module"
    mix = root.get_submodule(str(site.sum.target)) if learned else None
    if isinstance(mix, fx.GraphModule):
        _require_mix(root, mix, site)
    _require_order(site)
    shares = _shares(root, mix, site, index) if isinstance(mix, fx.GraphModule) else None
    _take(module, fused, ["dense", *(["mix"] if learned else [])])
    _move(root, site, shares)
    return f"the dense feed-forward is {'mixed' if learned else 'added'} in by moec.moe_ffn"


def _is_folded(module: fx.GraphModule) -> bool:
    """Whether the layer adds the dense values already."""
    return any(is_call(node, MOE_FFN) and arguments_of(node)[7] is not None for node in module.graph.nodes)


def _fused_layer(module: fx.GraphModule) -> fx.Node:
    """The `moe_ffn` whose rows, in their first shape, are all the layer's answer."""
    found = [node for node in module.graph.nodes if is_call(node, MOE_FFN)]
    if len(found) != 1:
        raise DeclinedError("its products are not in one operator")
    results: Any = output(module.graph).args[0]
    y = results[0] if isinstance(results, tuple | list) else results
    shaped = y is found[0] or (is_call(y, aten.view_as.default, aten.unflatten.int) and y.args[0] is found[0])
    if not shaped or len(found[0].users) != 1:
        raise DeclinedError("its answer is computed with, or travels, inside the layer")
    return found[0]


def _site(root: fx.GraphModule, name: str, index: int) -> Site:
    calls = [node for node in root.graph.nodes if node.op == "call_module" and node.target == name]
    if len(calls) != 1:
        raise DeclinedError(f"the layer is called {len(calls)} times")
    call = calls[0]
    module = cast(fx.GraphModule, root.get_submodule(name))
    alone = not isinstance(output(module.graph).args[0], tuple | list)
    experts = call if alone else next(
        (u for u in call.users if u.target is operator.getitem and u.args[1] == 0), None
    )  # fmt: skip
    readers = [] if experts is None else list(experts.users)
    if experts is None or len(readers) != 1:
        raise DeclinedError("its answer is read more than once")
    end = readers[0]
    if is_call(end, aten.add.Tensor) and len(end.args) == 2 and not end.kwargs:
        other = end.args[0] if end.args[1] is experts else end.args[1]
        if _kind(root, other) == ("ffn", index):
            return Site(call, experts, other, end)
    if _kind(root, end) == ("mix", index) and len(end.args) == 3 and end.args[1] is experts:
        return Site(call, experts, end.args[2], end)
    raise DeclinedError(f"its answer goes to `{end.name}`")


def _kind(root: fx.GraphModule, node: Any) -> tuple[str, int] | None:
    """Kind and layer of the region that a node calls."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    region = region_of(root.get_submodule(str(node.target)))
    return None if region is None else (region.kind, region.index)


def _require_mix(root: fx.GraphModule, mix: fx.GraphModule, site: Site) -> None:
    """Refuse a mix that is not `experts * c[..., :1] + dense * c[..., 1:2]`."""
    end: Any = output(mix.graph).args[0]
    halves: Any = end.args if is_call(end, aten.add.Tensor) else ()
    values = [node for node in mix.graph.nodes if node.op == "placeholder"]
    if len(values) != 3 or len(halves) != 2 or not all(is_call(h, aten.mul.Tensor) for h in halves):
        raise DeclinedError("its mix is another one")
    shares = [half.args[1] for half in halves]
    read = [half.args[0] for half in halves]
    sliced = all(is_call(share, aten.slice.Tensor) for share in shares)
    picked = [_bounds(share) for share in shares] if sliced else []
    if (
        read != values[1:]
        or picked != [(-1, 0, 1, 1), (-1, 1, 2, 1)]
        or shares[0].args[0] is not shares[1].args[0]
    ):
        raise DeclinedError("its mix is another one")
    if site.sum.args[0] is not site.call.args[0]:
        raise DeclinedError("its mix reads another value than its experts")
    if sum(node.target == site.sum.target for node in root.graph.nodes if node.op == "call_module") != 1:
        raise DeclinedError("its mix is called more than once")


def _bounds(share: fx.Node) -> tuple[Any, ...]:
    _, dim, start, end, step = arguments_of(share)
    return dim, start or 0, end, step


def _require_order(site: Site) -> None:
    """Refuse when something before the sum needs what the layer gives, other than the sum."""
    late = {site.sum}
    for node in _after(site.sum):
        late.add(node)
    for value in [site.call, *site.call.users]:
        for user in value.users:
            if user not in late and user not in site.call.users:
                raise DeclinedError(f"`{user.name}` needs the layer before the dense feed-forward is done")


def _after(node: fx.Node) -> Iterator[fx.Node]:
    found = False
    for other in node.graph.nodes:
        if found:
            yield other
        found = found or other is node


def _shares(root: fx.GraphModule, mix: fx.GraphModule, site: Site, index: int) -> fx.Node:
    """Let the mix region give its shares alone; the new call of it."""
    end = output(mix.graph)
    total: Any = end.args[0]
    shares = total.args[0].args[1].args[0]
    end.args = (shares,)
    values = [node for node in mix.graph.nodes if node.op == "placeholder"]
    drop_unused(mix)
    for value in values[1:]:
        mix.graph.erase_node(value)
    mix.recompile()
    with root.graph.inserting_before(site.sum):
        call = root.graph.call_module(str(site.sum.target), site.sum.args[:1])
    made_from(call, site.sum)
    call.name = root.graph._graph_namespace.create_name(f"c_{index}", None)
    return call


def _take(module: fx.GraphModule, fused: fx.Node, names: list[str]) -> None:
    """Give the layer the inputs `names`, flattened to rows where `x` is, and its operator with them."""
    graph = module.graph
    value = tensor(placeholder(graph))
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    rows = []
    for name in names:
        with graph.inserting_after(last):
            last = graph.placeholder(name)
        rows.append(last)
    if value is not None and value.dim() > 2:
        with graph.inserting_before(fused):
            rows = [graph.call_function(aten.flatten.using_ints, (node, 0, -2)) for node in rows]
        for node, name in zip(rows, names, strict=True):
            made_from(node, fused)
            node.name = graph._graph_namespace.create_name(f"{name}_rows", None)
    fused.args = (*fused.args[:7], *rows)
    module.recompile()


def _move(root: fx.GraphModule, site: Site, shares: fx.Node | None) -> None:
    """Call the layer where the sum was, with what it adds; its answer is the sum."""
    results = list(site.call.users) if site.experts is not site.call else []
    for node in (site.call, *results):
        site.sum.prepend(node)
    site.call.args = (*site.call.args, site.dense, *([] if shares is None else [shares]))
    name = site.sum.name
    site.sum.replace_all_uses_with(site.experts, propagate_meta=False)
    root.graph.erase_node(site.sum)
    site.experts.name = name
