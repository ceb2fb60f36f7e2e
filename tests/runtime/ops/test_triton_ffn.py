"""The Triton kernels of a layer of experts against the definition in fp64, forward and backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import moec.runtime.ops
from moec.runtime.ops import moe_ffn as plain
from moec.runtime.ops import reference
from moec.runtime.ops.formula import read_formula
from tests.runtime.ops.triton_layers import DEVICE, PACKED, SWIGLU, Layer, assert_close, kernels

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
from moec.runtime.ops.triton import launch, moe_ffn  # noqa: E402
from moec.runtime.ops.triton.shapes import Shape, instead  # noqa: E402

GELU = "lambda h: gelu(h)"
THREE = "lambda a, b, c: relu(a) * b + c"
LAYERS = {
    "odd sizes": Layer(bias=True),
    "one token": Layer(tokens=1, width=19, experts=9, top_k=4, bias=True, dense=True),
    "one of one": Layer(tokens=1, width=70, hidden=131, experts=3, top_k=1, formula=GELU, dense=True),
    "more experts than tokens": Layer(tokens=3, experts=17, top_k=3, formula=GELU),
    "everything on one expert": Layer(tokens=37, experts=4, top_k=1, crowd=True, bias=True),
    "one expert": Layer(tokens=5, experts=1, top_k=1),
    "top-1, tall, mixed": Layer(tokens=83, width=33, experts=2, top_k=1, bias=True, dense=True, mix=True),
    "top-3, tall": Layer(tokens=70, width=17, hidden=37, experts=3, top_k=3, answer=5),
    "packed halves": Layer(tokens=21, formula=PACKED.format(11), packed=2, bias=True),
    "packed in turns": Layer(formula="lambda h: silu(h[..., ::2]) * h[..., 1::2]", packed=2, answer=17),
    "partly unread": Layer(formula="lambda h: tanh(h[..., 2:13])", packed=2, bias=True),
    "three products": Layer(formula=THREE, bias=True, tokens=19),
    "dropped": Layer(tokens=29, factor=0.5, bias=True, dense=True),
    "dropped, top-1": Layer(tokens=29, factor=0.4, top_k=1, bias=True, dense=True, mix=True),
    "dropped, few tokens": Layer(tokens=9, factor=0.4, bias=True),
    "several columns": Layer(tokens=34, width=66, hidden=67, experts=2, answer=130),
}  # fmt: skip
# Everything in float32, and the two narrow ones by turns: they take other tiles, and the same way.
RUNS = [(name, torch.float32) for name in LAYERS]
RUNS += [(name, (torch.bfloat16, torch.float16)[place % 2]) for place, name in enumerate(LAYERS)]


def needed_of(layer: Layer) -> dict[str, Tensor]:
    """y and all gradients by the definition: one slot at a time, fp64, torch's own derivatives."""
    inputs = layer.inputs()
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [leaf(f"{name}.{place}", item) for place, item in enumerate(value)]
        if isinstance(value, Tensor) and value.is_floating_point():
            leaves[name] = value.requires_grad_()
        return value

    inputs = {name: leaf(name, value) for name, value in inputs.items()}
    read = read_formula(layer.formula)
    y = reference.moe_ffn(**inputs | {"formula": lambda *ups: read.apply(ups)})
    gradients = torch.autograd.grad(y, list(leaves.values()), layer.gradient(), materialize_grads=True)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.parametrize(("name", "dtype"), RUNS)
def test_forward_and_backward(name: str, dtype: torch.dtype) -> None:
    """Through `torch.ops.moec.moe_ffn` and autograd, with the kernels registered, as a program calls them."""
    layer = replace(LAYERS[name], dtype=dtype)
    needed, inputs = needed_of(layer), layer.rounded(layer.inputs())
    leaves = {name: t for name, t in _floating(inputs) if t is not None}
    for tensor in leaves.values():
        tensor.requires_grad_()
    with kernels():
        y = torch.ops.moec.moe_ffn(**inputs)
        grad = layer.gradient().to(DEVICE, y.dtype)
        gradients = torch.autograd.grad(y, list(leaves.values()), grad, materialize_grads=True)
        with torch.no_grad():
            without = torch.ops.moec.moe_ffn(**inputs)
    assert_close(y, needed["y"], dtype, "y")
    assert_close(without, needed["y"], dtype, "y without a backward")
    for name, gradient in zip(leaves, gradients, strict=True):
        assert_close(gradient, needed[name], dtype, f"gradient of {name}")


def _floating(inputs: dict[str, Any]) -> list[tuple[str, Any]]:
    flat = [
        (f"{name}.{place}" if isinstance(value, list) else name, item)
        for name, value in inputs.items()
        for place, item in enumerate(value if isinstance(value, list) else [value])
    ]
    return [(name, v) for name, v in flat if isinstance(v, Tensor) and v.is_floating_point()]


def test_the_kernels_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered, a call starts kernels; without them `moe_ffn` would pass the test above by itself."""
    started = []
    real = launch.launch

    def counted(kernel: Any, *arguments: Any, **options: Any) -> None:
        started.append(kernel.fn.__name__)
        real(kernel, *arguments, **options)

    for module in ("decode", "down", "gradients", "outer", "tiles", "up"):
        monkeypatch.setattr(f"moec.runtime.ops.triton.{module}.launch", counted)
    layer = Layer(tokens=3, bias=True)
    inputs = layer.rounded(layer.inputs())
    _, ups = moe_ffn.forward(**inputs, save=True)
    moe_ffn.forward(**inputs, save=False)
    inputs.pop("dense"), inputs.pop("mix")
    moe_ffn.backward(layer.gradient().float().to(DEVICE), **inputs, ups=ups, needed=[True] * 4)
    forward = ["_cut", "_up", "_scatter", "_combine", "_decode_up", "_decode_down", "_combine"]
    backward = ["_cut", "_pull_back", "_scatter", "_combine", *["_outer"] * 3, *["_sums"] * 3]
    assert started == [*forward, *backward]


@pytest.mark.parametrize("needed", [(True, False, False, False), (False, True, False, False), (False,) * 4])
def test_gradients_that_are_not_needed_have_no_elements(needed: tuple[bool, ...]) -> None:
    layer = Layer(bias=True)
    inputs = layer.rounded(layer.inputs())
    _, ups = moe_ffn.forward(**inputs, save=True)
    inputs.pop("dense"), inputs.pop("mix")
    found = moe_ffn.backward(layer.gradient().float().to(DEVICE), **inputs, ups=ups, needed=needed)
    flat = (found[0], found[1], found[2][0], found[3][0])
    assert [tensor.numel() > 0 for tensor in flat] == list(needed)


def test_no_token() -> None:
    layer = Layer(bias=True, dense=True)
    inputs = layer.rounded(layer.inputs())
    inputs |= {name: inputs[name][:0] for name in ("x", "weights", "order", "dense")}
    inputs["counts"] = torch.zeros_like(inputs["counts"])
    y, ups = moe_ffn.forward(**inputs, save=True)
    assert y.shape == (0, 7)
    inputs.pop("dense"), inputs.pop("mix")
    to_x, _, to_matrices, to_biases = moe_ffn.backward(y, **inputs, ups=ups, needed=[True] * 4)
    assert to_x.shape == (0, 7)
    assert not any(gradient.any() for gradient in (*to_matrices, *to_biases))


@pytest.mark.parametrize("shape", [Shape(32, 16, 16, 4, 2, group=2), Shape(128, 64, 32, 4, 1)])
@pytest.mark.parametrize("several", [False, True])
def test_tiles_of_another_shape(shape: Shape, several: bool) -> None:
    """Whatever stands in the table, products that share a table of tiles agree on their height."""
    layer = Layer(tokens=70, width=33, hidden=37, experts=2, top_k=2)
    inputs = layer.rounded(layer.inputs())
    with instead("rows", torch.float32, several, shape):
        y, ups = moe_ffn.forward(**inputs, save=True)
        inputs.pop("dense"), inputs.pop("mix")
        to_x, *_ = moe_ffn.backward(y, **inputs, ups=ups, needed=[True] * 4)
    needed, needed_ups = plain.forward(**inputs, dense=None, mix=None, save=True)
    needed_x, *_ = plain.backward(y, **inputs, ups=needed_ups, needed=[True] * 4)
    assert_close(y, needed.double(), torch.float32, "y")
    assert_close(to_x, needed_x.double(), torch.float32, "gradient of x")


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_token_may_choose_an_expert_twice(tokens: int) -> None:
    """Then an expert has more rows than there are tokens: several tiles of them, of a few tokens too."""
    layer = Layer(tokens=tokens, experts=3, top_k=3, bias=True)
    inputs = layer.rounded(layer.inputs())
    inputs["order"] = torch.randperm(3 * tokens).to(DEVICE)
    inputs["counts"] = torch.tensor([0, 3 * tokens - 1, 0], device=DEVICE)
    y, _ = moe_ffn.forward(**inputs, save=False)
    needed, _ = plain.forward(**inputs, save=False)
    assert_close(y, needed.double(), torch.float32, "y")


def test_the_same_bits_every_time() -> None:
    """No sum depends on which program is first."""
    layer = Layer(tokens=40, experts=3, top_k=3, bias=True)
    inputs = layer.rounded(layer.inputs())
    first, ups = moe_ffn.forward(**inputs, save=True)
    again, _ = moe_ffn.forward(**inputs, save=True)
    assert torch.equal(first, again)
    inputs.pop("dense"), inputs.pop("mix")
    runs = [
        moe_ffn.backward(layer.gradient().float().to(DEVICE), **inputs, ups=ups, needed=[True] * 4)
        for _ in range(2)
    ]
    for left, right in zip(*([run[0], run[1], *run[2], *run[3]] for run in runs), strict=True):
        assert torch.equal(left, right)


def test_what_is_kept_for_the_backward_are_the_up_products_alone() -> None:
    layer = Layer(tokens=21, formula=PACKED.format(11), packed=2)
    inputs = layer.rounded(layer.inputs())
    _, ups = moe_ffn.forward(**inputs, save=True)
    assert [tuple(up.shape) for up in ups] == [(42, 22)]
    _, kept = plain.forward(**inputs, save=True)
    assert_close(ups[0], kept[0].double(), torch.float32, "up products")


@pytest.mark.parametrize(
    ("formula", "dtype", "reason"),
    [
        (SWIGLU, torch.float64, "torch.float64"),
        ("lambda h: h[..., :6] * h[..., 5:11]", torch.float32, "slices of one up product that overlap"),
        ("lambda a, b, c, d: a * b * c * d", torch.float32, "4 different up products are read"),
        (SWIGLU, torch.bfloat16, ""),
    ],
)
def test_what_is_left_to_the_plain_operators_has_a_reason(
    formula: str, dtype: torch.dtype, reason: str
) -> None:
    ups = len(read_formula(formula).parameters)
    matrices = [torch.empty(2, 11, 7, dtype=dtype)] * ups + [torch.empty(2, 7, 6, dtype=dtype)]
    found = moe_ffn.refusal(torch.empty(3, 7, dtype=dtype), matrices, formula)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


def test_tensors_that_no_kernel_can_read_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer()
    inputs = layer.rounded(layer.inputs())
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    inputs = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    inputs["matrices"] = [matrix.cpu() for matrix in inputs["matrices"]]
    with pytest.raises(moec.errors.OperatorError, match="a CUDA tensor, or TRITON_INTERPRET=1"):
        moe_ffn.forward(**inputs, save=False)
