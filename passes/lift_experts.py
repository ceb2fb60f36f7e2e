"""Put an expert axis under each selected feed-forward.

before:  y = ffn_3(x)            h = gelu(linear(x, up));  y = linear(h, down)
after:   y, … = moe_3(x)         weights, experts = route(router(x))
                                 rows = dispatch(x, experts)
                                 h = gelu(grouped_linear(rows, up[E]))
                                 out = grouped_linear(h, down[E])
                                 y = combine(out, weights)

One transformation for every feed-forward: each `linear` becomes a `grouped_linear` over rows sorted by
expert, every other operator stays what it was. A layer with a residual branch has its branch lifted and
keeps the dense part. Slices (init `split`) multiply their hidden values by the number of experts, since the
weights of the chosen sum to one; their weights are the source's own numbers.

Assumes: the region is closed (one value escapes) and acts on rows.
Contract: exact when the chosen weights sum to one, every expert is a copy and nothing is dropped; exact for
          `split` when all experts are active; otherwise it changes the model.
Source:  DeepSpeed-MoE, sections 3-4.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from moec.ir import Check, Origins, Pass, Program, region_of
from moec.ir.graphs import drop_unused
from moec.ir.identity import made_from
from moec.plan import LayerSettings, Plan

from .build_experts import ExpertLayer, build_experts
from .prove_experts import prove_experts
from .sites import feed_forward_sites, require_feed_forwards, settings_by_site


@dataclass(frozen=True)
class LiftExperts(Pass):
    """See the module. `plan`: says which layers, and what each becomes."""

    plan: Plan

    def contract_for(self, program: Program) -> str:
        settings = settings_by_site(program, self.plan).values()
        return "exact" if all(map(keeps_function, settings)) else "changes-model"

    def requires(self, program: Program) -> None:
        require_feed_forwards(program, self.name)

    def apply(self, program: Program) -> Program:
        made: dict[object, ExpertLayer] = {}
        sites = feed_forward_sites(program)
        for site, settings in settings_by_site(program, self.plan).items():
            _lift(program, sites[site], settings, self.plan, made)
        drop_unused(program.graph)
        return program

    def ensures(self, before: Program, after: Program) -> list[Check]:
        """Each kind of expert layer against one token at a time through the dense feed-forward it came
        from."""
        return prove_experts(before, after)


def keeps_function(settings: LayerSettings) -> bool:
    """Whether a layer with these settings computes, at first, what the dense feed-forward computed."""
    if settings.train_capacity or settings.eval_capacity:
        return False
    if settings.init == "split":
        return (
            settings.top_k == settings.experts
            and settings.gate != "probability"
            and settings.noise != "jitter"
        )
    sums_to_one = settings.gate != "probability" or settings.top_k == settings.experts
    return settings.init == "copy" and sums_to_one


def _lift(
    program: Program, dense_name: str, settings: LayerSettings, plan: Plan, made: dict[object, ExpertLayer]
) -> None:
    index = region_of(program.graph.get_submodule(dense_name)).index  # type: ignore[union-attr]
    name = f"branch_{index}" if settings.residual != "none" else dense_name
    call = next(
        node for node in program.graph.graph.nodes if node.op == "call_module" and node.target == name
    )
    layer = build_experts(program, name, settings, plan, made)
    _replace_call(program, call, layer)
    weights = [
        origin.source for leaf, origin in layer.origins.items() if origin.source and leaf.endswith("weight")
    ]
    program.origins = _origins(program, name, layer)
    program.ledger = program.ledger.update(
        weights, status="rewritten", by="lift_experts", reason=describe(layer.name, settings)
    )


def _replace_call(program: Program, call: fx.Node, layer: ExpertLayer) -> None:
    root, old = program.graph, str(call.target)
    root.add_submodule(layer.name, layer.module)
    with root.graph.inserting_after(call):
        lifted = root.graph.call_module(layer.name, call.args)
    made_from(lifted, call, taking=("path", "source", "placement"))
    with root.graph.inserting_after(lifted):
        y = root.graph.call_function(operator.getitem, (lifted, 0))
    made_from(y, call, taking=("path", "source", "placement", "val"))
    call.replace_all_uses_with(y, propagate_meta=False)
    root.graph.erase_node(call)
    lifted.name, y.name = f"out_{layer.index}", f"m_{layer.index}"
    root.delete_submodule(old)


def _origins(program: Program, old: str, layer: ExpertLayer) -> Origins:
    gone = {name for name in program.origins if name.startswith(f"{old}.")}
    return program.origins.with_({f"{layer.name}.{leaf}": o for leaf, o in layer.origins.items()}, gone)


def describe(name: str, settings: LayerSettings) -> str:
    """The ledger's words for a lifted layer."""
    kept = {"none": "", "sum": ", the dense part added", "learned": ", mixed with the dense part"}[
        settings.residual
    ]
    made = {"copy": "copies", "noise": "noisy copies", "partial": "partly redrawn copies", "split": "slices"}
    how = made.get(settings.init, "fresh")
    return f"{name}: {settings.experts} experts ({how}), top-{settings.top_k}{kept}"
