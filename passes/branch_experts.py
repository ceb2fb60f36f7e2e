"""Give a feed-forward a second branch beside it, for experts to grow in: the residual layer.

before:  y = ffn_3(x)
after:   f = ffn_3(x);  b = branch_3(x);  y = f + b                      residual = "sum"
         f = ffn_3(x);  b = branch_3(x);  y = mix_3(x, b, f)             residual = "learned"

`mix_3` weighs the branches by softmax(linear(x)), experts first. The branch starts as the feed-forward
itself and shares its weights until `lift_experts` gives it an expert axis.

Assumes: stage *structured*.
Contract: `learned` is exact (the two weights sum to one over equal branches); `sum` changes the model.
Source:  DeepSpeed-MoE, section 4.1.1, Residual-MoE; the learned mix is that of its released code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from moec.ir import Check, Origin, Pass, Program, Region, region_of
from moec.ir.graphs import fork, place, root_module
from moec.ir.identity import made_from
from moec.ir.patterns import tensor
from moec.plan import LayerSettings, Plan

from .prove_branches import prove_branches
from .sites import feed_forward_sites, require_feed_forwards, settings_by_site

aten = torch.ops.aten
FACTS = ("path", "source", "val", "placement")  # of the dense value, true of the branch and of both together


@dataclass(frozen=True)
class BranchExperts(Pass):
    """See the module. `plan`: says which layers, and how they mix."""

    plan: Plan

    def contract_for(self, program: Program) -> str:
        kinds = {settings.residual for settings in settings_by_site(program, self.plan).values()}
        return "changes-model" if "sum" in kinds else "exact"

    def requires(self, program: Program) -> None:
        require_feed_forwards(program, self.name)

    def ensures(self, before: Program, after: Program) -> list[Check]:
        """The two branches with different weights, put together by hand."""
        return prove_branches(before, after)

    def apply(self, program: Program) -> Program:
        for site, settings in settings_by_site(program, self.plan).items():
            if settings.residual != "none":
                _branch(program, feed_forward_sites(program)[site], settings, self.plan)
        program.graph.recompile()
        return program


def _branch(program: Program, name: str, settings: LayerSettings, plan: Plan) -> None:
    root = program.graph
    call = next(node for node in root.graph.nodes if node.op == "call_module" and node.target == name)
    dense = root.get_submodule(name)
    assert isinstance(dense, fx.GraphModule)
    region = region_of(dense)
    assert region is not None
    assert isinstance(call.args[0], fx.Node)
    branch = _add_branch(program, dense, name, region)
    with root.graph.inserting_after(call):
        beside = root.graph.call_module(branch, call.args)
    made_from(beside, call, taking=FACTS)
    mixed = _mix(program, beside, call, region, settings, plan)
    call.replace_all_uses_with(mixed, delete_user_cb=lambda user: user is not mixed, propagate_meta=False)
    call.name, beside.name, mixed.name = f"f_{region.index}", f"b_{region.index}", f"y_{region.index}"


def _add_branch(program: Program, dense: fx.GraphModule, name: str, region: Region) -> str:
    """A second region over the same weights."""
    copied, branch = fork(dense), replace(region, kind="branch")
    copied.meta["region"] = branch
    program.graph.add_submodule(branch.name, copied)
    rows = {f"{branch.name}.{leaf}": program.origins[f"{name}.{leaf}"] for leaf, _ in _weights(dense)}
    program.origins = program.origins.with_(rows)
    return branch.name


def _weights(module: nn.Module) -> list[tuple[str, Tensor]]:
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return [(name, value) for name, value in named]


def _mix(
    program: Program, branch: fx.Node, dense: fx.Node, region: Region, settings: LayerSettings, plan: Plan
) -> fx.Node:
    graph = program.graph.graph
    x = dense.args[0]
    assert isinstance(x, fx.Node)
    if settings.residual == "sum":
        with graph.inserting_after(branch):
            mixed = graph.call_function(aten.add.Tensor, (dense, branch))
        return made_from(mixed, dense, taking=FACTS)
    name = f"mix_{region.index}"
    module = _mix_region(x, Region("mix", region.index, region.path, region.source), settings, plan)
    program.graph.add_submodule(name, module)
    rows = {f"{name}.{leaf}": Origin(None) for leaf, _ in _weights(module)}
    program.origins = program.origins.with_(rows)
    with graph.inserting_after(branch):
        mixed = graph.call_module(name, (x, branch, dense))
    return made_from(mixed, dense, taking=FACTS)


def _mix_region(x: fx.Node, region: Region, settings: LayerSettings, plan: Plan) -> fx.GraphModule:
    """`c = softmax(linear(x)); y = experts * c[..., :1] + dense * c[..., 1:]`."""
    value = tensor(x)
    assert value is not None
    assert plan.moe is not None
    owner, graph = root_module(), fx.Graph()
    generator = torch.Generator().manual_seed(seed_of(plan.moe.seed, region.index, "mix"))
    weight = torch.randn(2, int(value.shape[-1]), generator=generator) * settings.router_std
    where: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
    place(owner, "coefficient.weight", nn.Parameter(weight.to(**where)))
    place(owner, "coefficient.bias", nn.Parameter(torch.zeros(2, **where)))
    x_, experts, dense = (graph.placeholder(name) for name in ("x", "experts", "dense"))
    h = graph.call_function(
        aten.linear.default, (x_, graph.get_attr("coefficient.weight"), graph.get_attr("coefficient.bias"))
    )
    c = graph.call_function(aten.softmax.int, (h, -1))
    first = graph.call_function(aten.slice.Tensor, (c, -1, 0, 1))
    second = graph.call_function(aten.slice.Tensor, (c, -1, 1, 2))
    parts = [graph.call_function(aten.mul.Tensor, pair) for pair in ((experts, first), (dense, second))]
    total = graph.call_function(aten.add.Tensor, tuple(parts))
    graph.output(total)
    named = (h, c, first, second, *parts, total)
    for node, name in zip(named, ("h", "c", "c_experts", "c_dense", "e", "d", "y"), strict=True):
        node.name = name
    module = fx.GraphModule(owner, graph)
    module.meta["region"] = region
    return module


def seed_of(seed: int, index: int, what: str) -> int:
    """A seed for one tensor of one layer, so that layers may be made in any order."""
    return seed * 1_000_003 + index * 8_191 + sum(map(ord, what)) * 17
