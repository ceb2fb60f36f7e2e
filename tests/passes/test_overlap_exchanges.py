"""The order of things in a partitioned residual layer: rows travel while the dense feed-forward computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

import moec
from examples.gpt import GPT, GPTConfig
from moec.ir import region_of
from moec.local_program import LocalProgram

EXCHANGE = torch.ops.moec.exchange.default
WAIT = torch.ops._c10d_functional.wait_tensor.default


def rank_of(parallel: dict[str, Any], residual: str = "learned") -> LocalProgram:
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab=31, seq=16, layers=2, width=24, heads=4, dropout=0.0))
    moe = {"layers": "-1:", "experts": 8, "residual": residual, "balance": "bias"}
    plan = {"moe": moe, "parallel": parallel}
    return moec.compile(model, plan, world=8, verify="off").partition(0)


def order_of(local: LocalProgram) -> list[str]:
    """Exchanges begun and awaited, and calls of regions, as they run."""
    seen: list[str] = []

    def walk(module: fx.GraphModule) -> None:
        for node in module.graph.nodes:
            if node.op == "call_module":
                region = module.get_submodule(str(node.target))
                assert isinstance(region, fx.GraphModule)
                found = region_of(region)
                assert found is not None
                seen.append(found.name)
                walk(region)
            elif node.target is EXCHANGE:
                seen.append("begin")
            elif node.target is WAIT and "i64" not in str(node.meta["val"].dtype).replace("int64", "i64"):
                seen.append("await")

    walk(local.graph)
    return seen


@pytest.mark.parametrize("residual", ["learned", "sum"])
def test_the_dense_feed_forward_runs_while_the_rows_travel(residual: str) -> None:
    order = order_of(rank_of({"expert": 8}, residual))
    start = order.index("dispatch_1")
    needed = ["dispatch_1", "begin", "ffn_1", "moe_1", "await", "begin", "await"]
    assert order[start : start + len(needed)] == needed


def test_two_steps_end_with_one_under_way() -> None:
    order = order_of(rank_of({"expert": 8, "node": 4}))
    start = order.index("dispatch_1")
    needed = ["dispatch_1", "begin", "await", "begin", "ffn_1", "moe_1", "await"]
    assert order[start : start + len(needed)] == needed


@pytest.mark.parametrize(
    ("parallel", "residual"), [({"expert": 8}, "none"), ({"expert": 1}, "learned")], ids=str
)
def test_a_layer_with_nothing_to_hide_behind_stays_one(parallel: dict[str, Any], residual: str) -> None:
    assert not any(name.startswith("dispatch") for name in order_of(rank_of(parallel, residual)))


def test_weights_of_the_first_half_keep_their_names() -> None:
    local = rank_of({"expert": 8})
    names = dict(local.named_parameters())
    assert "moe_1.router.weight" in names
    assert list(local.moe_biases()) == ["moe_1"]
    assert set(local.placements()) == set(names)
