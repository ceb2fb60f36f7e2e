"""The proof of lifted layers: one token at a time through the dense feed-forwards they came from.

Copies hide mistakes: with equal experts it does not matter which one a token reaches. So every proof
runs on random, different experts and random routers, in fp64, and compares values and gradients with the
oracle, which evaluates the dense region itself with the chosen expert's weights. Three proofs: each kind
of layer by itself; the whole program, against the graph before with the oracle in place of the
feed-forwards (which sees a layer that was put in the wrong place, or reads the wrong value); and that the
weights a layer really starts with put together the source weights again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx

from moec.ir import Check, Origin, Program, Region, region_of, regions
from moec.ir.compare import EXACT, error_of, gradients_of, worst_gradient
from moec.ir.expert_oracle import OracleAnswer, moe_oracle
from moec.ir.graphs import placeholder
from moec.ir.patterns import tensor
from moec.ir.retarget import in_dtype
from moec.plan import LayerSettings

from .by_hand import Pair, StandIn, randomise, region_in


def prove_experts(before: Program, after: Program) -> list[Check]:
    """Checks for the expert layers that `after` has and `before` has not."""
    lifted = {n: m for n, m in regions(after.graph, "moe").items() if not hasattr(before.graph, n)}
    if any(p.is_meta for p in after.parameters()):
        return []
    checks, seen = [], set[object]()
    for name, module in lifted.items():
        checks += [_router_check(name, module), *_origin_checks(before, after, name)]
        kind = _kind(module)
        if kind not in seen:
            seen.add(kind)
            checks += _layer_checks(name, _dense_of(before, module), module, _origins_of(after, name))
    if lifted:
        checks += _program_checks(before, after, lifted)
    return checks


def _dense_of(before: Program, module: fx.GraphModule) -> fx.GraphModule:
    found = before.graph.get_submodule(_dense_name(before, module))
    assert isinstance(found, fx.GraphModule)
    return found


def _dense_name(before: Program, module: fx.GraphModule) -> str:
    """The feed-forward that a layer must have come from, by the number both carry."""
    index = _region(module).index
    return next(name for name in (f"branch_{index}", f"ffn_{index}") if hasattr(before.graph, name))


def _region(module: fx.GraphModule) -> Region:
    region = region_of(module)
    assert region is not None
    return region


def _kind(module: fx.GraphModule) -> object:
    """Layers with the same graph, settings and shapes are proved once."""
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    return module.code, str(_region(module).settings), shapes


def _origins_of(program: Program, name: str) -> dict[str, Origin]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): o for key, o in program.origins.items() if key.startswith(prefix)}


def _settings(lifted: fx.GraphModule) -> LayerSettings:
    known = {k: v for k, v in _region(lifted).settings.items() if k in LayerSettings.model_fields}
    return LayerSettings(**known)


# what is there


def _router_check(name: str, module: fx.GraphModule) -> Check:
    """Scores are computed in fp32 at least: a narrower router sends tokens elsewhere."""
    weight = module.get_parameter("router.weight")
    scores = (tensor(node) for node in module.graph.nodes if node.name == "scores")
    values = [weight, *(value for value in scores if value is not None)]
    narrow = [v.dtype for v in values if v.dtype.itemsize < 4 or not v.is_floating_point()]
    return Check(
        f"{name}: the router's precision", float(len(narrow)), 0.0, "float32", f"{name}.router.weight"
    )


def _origin_checks(before: Program, after: Program, name: str) -> list[Check]:
    """Reversible weights must restore, bit for bit, the very tensors they were made from."""
    worst, where = 0.0, ""
    used = _weights_used(before, after, name)
    for leaf, origin in _origins_of(after, name).items():
        if not origin.reversible or origin.source is None:
            continue
        source = before.graph.get_parameter(before.origins.of_source(origin.source)[0]).detach()
        restored = origin.restore(after.graph.get_submodule(name).get_parameter(leaf).detach())
        error = error_of(restored, source) if restored is not None else float("inf")
        error = error if origin.source in used else float("inf")
        if error > worst:
            worst, where = error, f"{name}.{leaf}"
    return [Check(f"{name}: weights restore their source", worst, 0.0, _dtype_of(after, name), where)]


def _weights_used(before: Program, after: Program, name: str) -> set[str]:
    """The user's names of the weights of the feed-forward that `name` must have come from."""
    module = after.graph.get_submodule(name)
    assert isinstance(module, fx.GraphModule)
    dense = _origins_of(before, _dense_name(before, module))
    return {origin.source for origin in dense.values() if origin.source is not None}


def _dtype_of(program: Program, name: str) -> str:
    found = [
        p.dtype for leaf, p in program.graph.get_submodule(name).named_parameters() if "router" not in leaf
    ]
    return str(found[0] if found else torch.float32).removeprefix("torch.")


# one layer


def _layer_checks(
    name: str, dense: fx.GraphModule, lifted: fx.GraphModule, origins: dict[str, Origin]
) -> list[Check]:
    table: dict[int, Tensor] = {}  # a learned slope, say, is one leaf of both
    module, reference = (in_dtype(m, torch.float64, table).eval() for m in (lifted, dense))
    settings = _settings(lifted)
    randomise(module)
    x = _input(reference, settings, next(module.parameters()).device)
    found_y, balance, z, counts = module(x)
    answer = _oracle(reference, module, origins, settings, x)
    leaves = {"x": x, **dict(module.named_parameters())}
    found = gradients_of({"y": found_y, "balance": balance, "z": z}, leaves)
    needed = gradients_of({"y": answer.y, "balance": answer.balance, "z": answer.z}, leaves)
    error, worst = worst_gradient(needed, found)
    return [
        Check(f"{name}: values", error_of(found_y.detach(), answer.y.detach()), EXACT),
        Check(f"{name}: gradients", error, EXACT, worst=worst),
        Check(f"{name}: balance term", error_of(balance.detach(), answer.balance.detach()), EXACT),
        Check(f"{name}: z term", error_of(z.detach(), answer.z.detach()), EXACT),
        Check(f"{name}: counts", error_of(counts.double().cpu(), answer.counts.double()), 0.0),
    ]


def _input(reference: fx.GraphModule, settings: LayerSettings, device: torch.device) -> Tensor:
    """A random leaf of the region's rank: [2, T/2, D], or [T, D]."""
    shape = tensor(placeholder(reference.graph))
    assert shape is not None
    rows = min(48, 2 * settings.experts + 6)
    lead = {1: [], 2: [rows], 3: [2, rows // 2]}.get(shape.dim(), [1] * (shape.dim() - 2) + [rows])
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(*lead, int(shape.shape[-1]), generator=generator, dtype=torch.float64)
    return x.to(device).requires_grad_()


def _oracle(
    reference: fx.GraphModule,
    module: fx.GraphModule,
    origins: dict[str, Origin],
    settings: LayerSettings,
    x: Tensor,
) -> OracleAnswer:
    bias = getattr(module, "bias", None)
    return moe_oracle(
        reference, list(_expert_states(module, origins, settings)), x, module.get_parameter("router.weight"),
        top_k=settings.top_k, gate=settings.gate, bias=bias if isinstance(bias, Tensor) else None,
        capacity_factor=settings.eval_capacity, min_capacity=settings.min_capacity,
        router_input=x.detach() if settings.gate == "straight-through" else None,
    )  # fmt: skip


def _expert_states(
    module: fx.GraphModule, origins: dict[str, Origin], settings: LayerSettings
) -> Iterator[dict[str, Tensor]]:
    """Expert e's weights under the dense region's names; a slice is put back among zeros at its place."""
    for expert in range(settings.experts):
        state = {}
        for leaf, origin in origins.items():
            if origin.experts:
                dense = _expert_weight(module.get_parameter(leaf), origin, expert)
                state[leaf] = dense.t() if origin.transposed else dense
        yield state


def _expert_weight(value: Tensor, origin: Origin, expert: int) -> Tensor:
    """Expert `expert` as a dense weight [out, in]: a slice stands for the whole, so its down product is
    multiplied."""
    if origin.how != "split":
        return value[expert]
    mask = torch.zeros(value.shape[0], *[1] * (value.dim() - 1), dtype=value.dtype, device=value.device)
    mask[expert] = 1.0
    dense = origin.joined(value * mask)
    return dense * origin.experts if origin.dim == 1 else dense


# the whole program


def _program_checks(before: Program, after: Program, lifted: Mapping[str, fx.GraphModule]) -> list[Check]:
    """The program with random experts, against the graph before with the oracle in place of its
    feed-forwards."""
    pair = Pair.of(before, after)
    stand_ins = {}
    for name in lifted:
        module = region_in(pair.after, name)
        randomise(module)
        stand_ins[_dense_name(before, module)] = _stand_in(module, _origins_of(after, name))
    return pair.checks("experts by hand", stand_ins)


def _stand_in(module: fx.GraphModule, origins: dict[str, Origin]) -> StandIn:
    return lambda dense, x: _oracle(dense, module, origins, _settings(module), x).y
