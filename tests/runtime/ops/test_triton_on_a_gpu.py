"""What can be known of the Triton kernels on a GPU without one: they compile for it, well, and never wait for
it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

import moec
from examples.gpt import GPT, GPTConfig
from tests.runtime.ops.triton_layers import Layer

pytest.importorskip("triton", reason="Triton has no build for this platform")
from moec.runtime.ops.triton import moe_ffn, register
from moec.runtime.ops.triton.gate import gate
from moec.runtime.ops.triton.launch import compile_only

GROUPED = {"_up", "_scatter", "_pull_back", "_outer"}


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """Every kernel, compiled for an H100 in a process of its own: this one may have chosen the
    interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.runtime.ops.compile_for_hopper"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_and_nothing_is_spilled(compiled: list[dict[str, Any]]) -> None:
    names = {kernel["name"] for kernel in compiled}
    expected = {
        "_scores",
        "_choose",
        "_offsets",
        "_place",
        "_cut",
        "_combine",
        "_decode_up",
        "_decode_down",
        "_sums",
    }
    assert names == GROUPED | expected
    assert {kernel["name"]: kernel["spilled"] for kernel in compiled if kernel["spilled"]} == {}
    assert max(kernel["shared"] for kernel in compiled) <= 227 * 1024


def test_products_use_the_tensor_cores_and_load_ahead(compiled: list[dict[str, Any]]) -> None:
    grouped = [kernel for kernel in compiled if kernel["name"] in GROUPED]
    assert all(kernel["wgmma"] and kernel["ahead"] for kernel in grouped), grouped
    one, few = (
        [kernel for kernel in compiled if kernel["name"].startswith("_decode") and kernel["mma"] == wanted]
        for wanted in (False, True)
    )
    assert [len(one), len(few)] == [2, 2]
    assert all(kernel["wide"] for kernel in one)
    assert all(kernel["ahead"] for kernel in few)


class Waits(TorchDispatchMode):
    """Refuses what makes the host wait for the device: a value read back, a copy to the host, a size that
    depends on values."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "bincount",
        "equal",
        "is_nonzero",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not name.startswith(self.FORBIDDEN), f"the host waits for {func}"
        device = (kwargs or {}).get("device")
        assert name != "_to_copy" or device is None or torch.device(device).type != "cpu", f"copied by {func}"
        return func(*args, **(kwargs or {}))


def on_meta(layer: Layer) -> dict[str, Any]:
    """The layer's inputs without values: whatever reads one fails."""

    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(item) for item in value]
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    return {name: convert(value) for name, value in layer.rounded(layer.inputs()).items()}


def paths() -> Iterator[tuple[str, Layer]]:
    yield "one token", Layer(tokens=1, top_k=1, bias=True)
    yield "few tokens", Layer(tokens=9, bias=True, dense=True, mix=True)
    yield "many tokens", Layer(tokens=70, experts=3, bias=True, dense=True)


@pytest.mark.parametrize(("name", "layer"), list(paths()))
def test_the_host_never_waits(name: str, layer: Layer) -> None:
    """The host's part of gate and layer, forward and backward, runs on tensors that have no values."""
    inputs = on_meta(layer)
    with Waits(), compile_only() as started:
        gate(
            inputs["x"], torch.empty(layer.experts, layer.width, device="meta"), None, layer.top_k, "sigmoid"
        )
        moe_ffn.forward(**inputs, save=False)
        y, ups = moe_ffn.forward(**inputs, save=True)
        inputs.pop("dense"), inputs.pop("mix")
        moe_ffn.backward(y, **inputs, ups=ups, needed=[True] * 4)
    assert len(started) > 10


def test_the_plain_gate_does_not_wait_either() -> None:
    """Noise and capacities go to the plain operators, which must not stop a graph from being captured."""
    x, router = torch.empty(9, 5, device="meta"), torch.empty(4, 5, device="meta")
    with Waits():
        found = register._gate(x, router, None, 2, "normalized", "rsample", 1.25, 1.25, 4, True, True)
    assert [tuple(value.shape) for value in found] == [(9, 4), (9, 2), (9, 2), (18,), (4,)]


def test_waiting_is_seen() -> None:
    with Waits(), pytest.raises(AssertionError, match="the host waits for"):
        torch.ones(3).sum().item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(3, device="meta").tolist()


def test_a_step_of_a_decoder_waits_nowhere_between_the_operators() -> None:
    """The rest of the path: attention, caches, positions. (`moec::` operators: see above.)"""
    model = GPT(GPTConfig(vocab=31, seq=32, layers=2, width=16, heads=2, dropout=0.0))
    plan = {"moe": {"layers": "1::2", "experts": 4, "residual": "learned", "init": "fresh"}}
    decoder = moec.compile(model, plan=plan, verify="off").fused().decoder(32)
    called = {str(node.target) for part in decoder.program.graph.modules() if isinstance(part, fx.GraphModule)
              for node in part.graph.nodes}  # fmt: skip
    assert {"moec.gate.default", "moec.moe_ffn.default"} <= called
    cache, rows = decoder.new_cache(2, 32), torch.zeros(2, dtype=torch.int64)
    with Waits():
        logits = decoder.step(rows[:, None], rows, rows[:, None], cache, 32)
    assert logits.shape == (2, 1, 31)
