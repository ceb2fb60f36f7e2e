"""The proof of a lifted layer: its graph against one token at a time through the dense feed-forward.

Copies hide mistakes: with equal experts it does not matter which one a token reaches. So the proof runs the lifted
graph with random, different experts and a random router in fp64, and compares values and gradients with the oracle,
which evaluates the dense region itself with the chosen expert's weights. A second check sees that the weights the
layer really starts with put together the source weights again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from moec.ir import Check, Origin, Program, region_of, regions
from moec.ir.compare import EXACT, GRADIENT_FLOOR, error_of
from moec.ir.expert_oracle import moe_oracle
from moec.ir.graphs import placeholder
from moec.ir.patterns import tensor
from moec.ir.retarget import in_dtype
from moec.plan import LayerSettings

LARGEST = 2**25  # expert parameters of one layer beyond which a proof would not fit in seconds


def prove_experts(before: Program, after: Program) -> list[Check]:
    """Checks for every kind of expert layer that `after` has and `before` has not."""
    checks, seen = [], set[object]()
    for name, module in regions(after.graph, "moe").items():
        if hasattr(before.graph, name) or any(p.is_meta for p in module.parameters()):
            continue
        dense = _dense_of(before, module)
        checks += _origin_checks(before, after, name)
        kind = _kind(module)
        if kind not in seen and sum(p.numel() for p in module.parameters()) <= LARGEST:
            seen.add(kind)
            checks += _behaviour(name, dense, module, _origins_of(after, name))
    return checks


def _dense_of(before: Program, module: fx.GraphModule) -> fx.GraphModule:
    region = region_of(module)
    assert region is not None
    names = (f"branch_{region.index}", f"ffn_{region.index}")
    found = next(before.graph.get_submodule(name) for name in names if hasattr(before.graph, name))
    assert isinstance(found, fx.GraphModule)
    return found


def _kind(module: fx.GraphModule) -> object:
    """Layers with the same graph, settings and shapes are proved once."""
    region = region_of(module)
    assert region is not None
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    return module.code, str(region.settings), shapes


def _origins_of(program: Program, name: str) -> dict[str, Origin]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): o for key, o in program.origins.items() if key.startswith(prefix)}


def _origin_checks(before: Program, after: Program, name: str) -> list[Check]:
    """Reversible weights must restore the very tensors they were made from."""
    worst, where = 0.0, ""
    for leaf, origin in _origins_of(after, name).items():
        if not origin.reversible or origin.source is None:
            continue
        source = before.graph.get_parameter(before.origins.of_source(origin.source)[0])
        restored = origin.restore(after.graph.get_submodule(name).get_parameter(leaf).detach())
        error = error_of(restored, source.detach()) if restored is not None else float("inf")
        if error > worst:
            worst, where = error, f"{name}.{leaf}"
    return [
        Check(f"{name}: weights restore their source", worst, 1e-6, str(torch.get_default_dtype())[6:], where)
    ]


def _behaviour(
    name: str, dense: fx.GraphModule, lifted: fx.GraphModule, origins: dict[str, Origin]
) -> list[Check]:
    module, reference = in_dtype(lifted, torch.float64).eval(), in_dtype(dense, torch.float64).eval()
    settings = LayerSettings(**_settings(lifted))
    x = _randomise(module, reference, settings)
    found_y, balance, z, counts = module(x)
    found = _gradients(found_y, balance, z, module, x)
    answer = _oracle(reference, module, origins, settings, x)
    needed = _gradients(answer.y, answer.balance, answer.z, module, x)
    floor = GRADIENT_FLOOR * max((float(g.abs().max()) for g in needed.values()), default=0.0)
    worst = max(needed, key=lambda key: error_of(found[key], needed[key], floor))
    return [
        Check(f"{name}: values", error_of(found_y.detach(), answer.y.detach()), EXACT),
        Check(f"{name}: gradients", error_of(found[worst], needed[worst], floor), EXACT, worst=worst),
        Check(f"{name}: balance term", error_of(balance.detach(), answer.balance.detach()), EXACT),
        Check(f"{name}: z term", error_of(z.detach(), answer.z.detach()), EXACT),
        Check(f"{name}: counts", error_of(counts.double().cpu(), answer.counts.double()), 0.0),
    ]


def _settings(lifted: fx.GraphModule) -> dict[str, object]:
    region = region_of(lifted)
    assert region is not None
    return {key: value for key, value in region.settings.items() if key in LayerSettings.model_fields}


def _randomise(module: fx.GraphModule, reference: fx.GraphModule, settings: LayerSettings) -> Tensor:
    """Different experts, a router with opinions; returns the input [2, T/2, D] (or [T, D]), a leaf."""
    generator = torch.Generator().manual_seed(3)
    for _, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            value.data = (drawn / max(1.0, value.shape[-1] ** 0.5)).to(value.device).requires_grad_(False)
    _share_the_rest(module, reference)
    for value in module.parameters():
        value.requires_grad_(True)
    shape = tensor(placeholder(reference.graph))
    assert shape is not None
    rows = min(48, 2 * settings.experts + 6)
    lead = (
        [2, rows // 2]
        if shape.dim() == 3
        else [rows]
        if shape.dim() == 2
        else [1] * (shape.dim() - 2) + [rows]
    )
    device = next(module.parameters()).device
    x = torch.randn(*lead, int(shape.shape[-1]), generator=generator, dtype=torch.float64).to(device)
    return x.requires_grad_()


def _share_the_rest(module: fx.GraphModule, reference: fx.GraphModule) -> None:
    """Weights without an expert axis are the same in both."""
    theirs = dict(module.named_parameters())
    for name, value in reference.named_parameters():
        if name in theirs and theirs[name].shape == value.shape:
            value.data = theirs[name].data


def _gradients(y: Tensor, balance: Tensor, z: Tensor, module: fx.GraphModule, x: Tensor) -> dict[str, Tensor]:
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(
        y.device
    )
    leaves = {"x": x, **{n: p for n, p in module.named_parameters() if p.requires_grad}}
    total = (y * weight).sum() + 0.7 * balance + 0.3 * z
    drawn = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {
        n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(leaves.items(), drawn, strict=True)
    }


def _oracle(
    reference: fx.GraphModule,
    module: fx.GraphModule,
    origins: dict[str, Origin],
    settings: LayerSettings,
    x: Tensor,
):  # type: ignore[no-untyped-def]
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
                value = module.get_parameter(leaf)
                dense = value[expert] if origin.how != "split" else _among_zeros(value, origin, expert)
                if origin.how == "split" and origin.dim == 1:
                    dense = dense * settings.experts
                state[leaf] = dense.t() if origin.transposed else dense
        yield state


def _among_zeros(value: Tensor, origin: Origin, expert: int) -> Tensor:
    only = torch.zeros_like(value)
    mask = torch.zeros(value.shape[0], *[1] * (value.dim() - 1), dtype=value.dtype, device=value.device)
    mask[expert] = 1.0
    return origin.joined(only + value * mask)
