"""The sparse program in other surroundings: compiled by inductor, in bf16, under autocast."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

import moec
from moec.testing import DecoderRecipe, tolerance_of
from moec.testing.parts.feed_forward import FeedForwardRecipe
from moec.testing.same_function import compare, compare_gradients

RECIPE = DecoderRecipe(num_layers=2, ffn=FeedForwardRecipe(hidden=16, gating="fused", activation="silu"))
PLAN: dict[str, Any] = {
    "moe": {
        "layers": "1", "experts": 4, "top_k": 2, "residual": "learned", "init": "noise", "init_noise": 0.5,
        "router_std": 1.0, "capacity_factor": 1.0, "z_loss": 0.001,
    }
}  # fmt: skip


def _run(program: moec.Program, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradient of every parameter."""
    program.zero_grad()
    loss = program.loss(tokens)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in program.named_parameters() if p.grad is not None}


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_without_graph_breaks() -> None:
    """`fullgraph=True` raises at a break. Forward, backward, and a second shape with the same graph."""
    model = RECIPE.build(0)
    eager = moec.compile(model, PLAN, verify="off").eval()
    compiled = moec.compile(model, PLAN, verify="off", backend="inductor").eval()
    for shape in ((2, 9), (3, 5)):
        tokens = RECIPE.tokens(1, *shape)
        loss, gradients = _run(eager, tokens)
        found, found_gradients = _run(compiled, tokens)
        compare({"loss": found}, {"loss": loss}, tolerance_of(torch.float32))
        compare_gradients(found_gradients, gradients, tolerance_of(torch.float32))
        compare({"logits": compiled(tokens)}, {"logits": eager(tokens)}, tolerance_of(torch.float32))


@pytest.mark.parametrize("built", [torch.float32, torch.bfloat16])
def test_a_plan_in_bf16(built: torch.dtype) -> None:
    """Close to fp32 from the same weights; the router stays in fp32; the loss has gradients everywhere."""
    wide = moec.compile(RECIPE.build(0, built).float(), PLAN, verify="off").eval()
    narrow = moec.compile(RECIPE.build(0, built), {**PLAN, "compile": {"dtype": "bf16"}}).eval()
    assert all(c.verdict in ("proved", "measured") for c in narrow.certificates)
    dtypes = {name: value.dtype for name, value in narrow.graph.named_parameters()}
    assert dtypes.pop("moe_1.router.weight") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    tokens = RECIPE.tokens(1, 2, 9)
    with torch.no_grad():
        logits, (experts, wide_experts) = narrow(tokens), (_choices(p, tokens) for p in (narrow, wide))
        compare({"logits": logits.float()}, {"logits": wide(tokens)}, tolerance_of(torch.bfloat16))
    assert logits.dtype == torch.bfloat16
    assert torch.equal(experts, wide_experts)
    loss, gradients = _run(narrow, tokens)
    assert loss.dtype == torch.float32
    assert set(gradients) == {name for name, _ in narrow.named_parameters()}


def _choices(program: moec.Program, tokens: Tensor) -> Tensor:
    """Experts chosen in layer 1, i64 [T, K]."""
    seen: list[Tensor] = []

    class _Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.moec.route.default:
                seen.append(out[1])
            return out

    with _Watch():
        program(tokens)
    assert len(seen) == 1
    return seen[0]


def test_autocast_leaves_the_router_in_float32() -> None:
    program = moec.compile(RECIPE.build(0), PLAN, verify="off").eval()
    tokens = RECIPE.tokens(1, 2, 9)
    seen: dict[str, torch.dtype] = {}

    class _Watch(torch.fx.Interpreter):
        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            return _Watch(self.module.get_submodule(str(target))).run(*args)  # type: ignore[arg-type]

        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                seen[n.name] = value.dtype
            return value

    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        _Watch(program.graph).run(tokens)
        logits = program(tokens)
    assert seen["scores"] == torch.float32
    assert seen["weights"] == torch.float32
    assert logits.dtype == torch.bfloat16, "autocast did nothing"
    with torch.no_grad():
        compare({"logits": logits.float()}, {"logits": program(tokens)}, tolerance_of(torch.bfloat16))
