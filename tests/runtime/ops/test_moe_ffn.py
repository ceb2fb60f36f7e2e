"""`moec::moe_ffn` against one token at a time, in float64: values and every gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from moec.errors import OperatorError
from moec.runtime.ops import moe_ffn, moe_ffn_gradient, reference
from moec.testing.same_function import assert_same_function
from tests.runtime.ops.cases import Case, cases

ops = torch.ops.moec


@dataclass(frozen=True)
class Inner:
    """What stands between the products: the formula, the same as a function, and the widths of its ups."""

    formula: str
    function: Callable[..., Tensor]
    ups: tuple[int, ...]


def _split(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


def _interleaved(h: Tensor) -> Tensor:
    gate, up = h[..., ::2], h[..., 1::2]
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


INNERS = (
    Inner("lambda h: gelu(h)", F.gelu, (1,)),
    Inner("lambda h: pow(relu(h), 2)", lambda h: F.relu(h) ** 2, (1,)),
    Inner("lambda gate, up: silu(gate) * up", lambda gate, up: F.silu(gate) * up, (1, 1)),
    Inner("lambda a, b, c: tanh(a) * b - c / 3.0", lambda a, b, c: torch.tanh(a) * b - c / 3.0, (1, 1, 1)),
    Inner("lambda h: silu(h[..., :5]) * h[..., 5:]", _split, (2,)),
    Inner(
        "lambda h: (h[..., 1::2] + 1) * h[..., ::2] * sigmoid(1.702 * h[..., ::2])", _interleaved, (2,)
    ),
)  # fmt: skip
WIDTH = 5
DENSE = ("none", "sum", "mix")


def layer(
    case: Case, inner: Inner, dense: str
) -> tuple[list[Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    """Inputs of one layer, and the reference and the operator as functions of them."""
    weights, _, order, counts = case.routed()
    shapes = [
        *[(case.experts, n * WIDTH, case.depth) for n in inner.ups],
        (case.experts, case.depth + 1, WIDTH),
    ]
    matrices = [case.draw(*shape, salt=20 + i) for i, shape in enumerate(shapes)]
    biases = (
        [case.draw(*shape[:2], salt=30 + i) for i, shape in enumerate(shapes)] if case.linear_bias else []
    )
    extra = [case.draw(case.tokens, case.depth + 1, salt=40)] if dense != "none" else []
    extra += [case.draw(case.tokens, 2, salt=41).softmax(-1)] if dense == "mix" else []

    def run(call: Callable[..., Tensor], formula: object, *inputs: Tensor) -> Tensor:
        x, weights, *rest = inputs
        found, rest = rest[: len(shapes)], rest[len(shapes) :]
        given, rest = rest[: len(biases)], rest[len(biases) :]
        return call(x, weights, order, counts, found, given or [None] * len(shapes), formula, *rest)

    inputs = [case.x(), weights, *matrices, *biases, *extra]
    return (
        inputs,
        lambda *tensors: run(reference.moe_ffn, inner.function, *tensors),
        lambda *tensors: run(ops.moe_ffn, inner.formula, *tensors),
    )


@contextmanager
def kernels_of_any_device() -> Iterator[None]:
    """Inside, the kernels that devices without their own have are those of the CPU."""
    library = torch.library.Library("moec", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # they take another's place
        # By name, when they are called: a test may break one.
        library.impl("moe_ffn_forward", lambda *a: moe_ffn.forward(*a), "CPU", allow_override=True)
        library.impl("moe_ffn_backward", lambda *a: moe_ffn.backward(*a), "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


@pytest.fixture(params=["the CPU's", "any device's"])
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    with kernels_of_any_device() if request.param == "any device's" else nullcontext():
        yield


@pytest.mark.usefixtures("_kernels")
@given(cases(), st.sampled_from(INNERS), st.sampled_from(DENSE))
def test_against_the_reference(case: Case, inner: Inner, dense: str) -> None:
    inputs, needed, found = layer(case, inner, dense)
    assert_same_function(needed, found, inputs)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("inner", INNERS, ids=lambda inner: inner.formula)
@pytest.mark.parametrize("dense", DENSE)
def test_crowded(inner: Inner, dense: str) -> None:
    """One token; more experts than tokens; all tokens at one expert; some dropped."""
    for case in (
        Case(tokens=1, top_k=1), Case(tokens=3, experts=9), Case(crowd="one expert", top_k=1),
        Case(crowd="one expert", factor=0.5), Case(tokens=1, experts=1, top_k=1, linear_bias=False),
    ):  # fmt: skip
        inputs, needed, found = layer(case, inner, dense)
        assert_same_function(needed, found, inputs)


@pytest.mark.parametrize("inner", INNERS, ids=lambda inner: inner.formula)
def test_opcheck(inner: Inner) -> None:
    weights, _, order, counts = Case().routed()
    case, shapes = Case(), [*[(5, n * WIDTH, 7) for n in inner.ups], (5, 8, WIDTH)]
    matrices = [case.draw(*shape, salt=i).requires_grad_() for i, shape in enumerate(shapes)]
    biases = [None, *(case.draw(*shape[:2]).requires_grad_() for shape in shapes[1:])]
    x, weights = case.x().requires_grad_(), weights.requires_grad_()
    dense, mix = case.draw(13, 8).requires_grad_(), case.draw(13, 2).requires_grad_()
    inputs = (x, weights, order, counts, matrices, biases, inner.formula)
    opcheck(ops.moe_ffn.default, (*inputs, dense, mix))
    opcheck(ops.moe_ffn_forward.default, (*inputs, dense, mix, True))
    with torch.no_grad():
        ups = ops.moe_ffn_forward(*inputs, None, None, True)[1]
        grad = case.draw(13, 8)
        opcheck(ops.moe_ffn_backward.default, (grad, *inputs, ups, [True, True, True, True]))
        opcheck(ops.moe_ffn_backward.default, (grad, *inputs, ups, [False, True, False, False]))


@pytest.mark.usefixtures("_kernels")
def test_only_what_is_wanted() -> None:
    """Gradients of frozen weights are not computed, and those that remain do not change."""
    inputs, _, found = layer(Case(), INNERS[2], "mix")
    wanted = [tensor.clone().requires_grad_() for tensor in inputs]
    found(*wanted).square().sum().backward()
    for place in range(len(inputs)):
        alone = [tensor.clone().requires_grad_(place == i) for i, tensor in enumerate(inputs)]
        found(*alone).square().sum().backward()
        assert torch.equal(alone[place].grad, wanted[place].grad)  # type: ignore[arg-type]
        assert all(tensor.grad is None for i, tensor in enumerate(alone) if i != place)


def test_saves_the_up_products_and_nothing_wider() -> None:
    """What autograd keeps: inputs, and one [N, F] an up product."""
    kept: list[Tensor] = []
    inputs, _, found = layer(Case(top_k=3), INNERS[2], "none")
    leaves = [tensor.requires_grad_() for tensor in inputs]

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found(*leaves)
    known = {tensor.data_ptr() for tensor in leaves}
    made = [tensor for tensor in kept if tensor.data_ptr() not in known and tensor.is_floating_point()]
    assert [tuple(tensor.shape) for tensor in made] == [(39, WIDTH), (39, WIDTH)]
    with torch.no_grad():
        weights, _, order, counts = Case().routed()
        case = Case()
        matrices = [case.weight(), case.weight().mT.contiguous()]
        ups = ops.moe_ffn_forward(
            case.x(), weights, order, counts, matrices, [None, None], "lambda h: gelu(h)", None, None, False
        )[1]
    assert ups == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Products in the autocast dtype, as `grouped_linear` has them."""
    case = Case(dtype=torch.float32)
    inputs, _, found = layer(case, INNERS[0], "none")
    with torch.autocast("cpu", dtype):
        y = found(*inputs)
        inputs, _, found = layer(case, INNERS[0], "mix")
        mixed = found(*inputs)
    assert (y.dtype, mixed.dtype) == (dtype, torch.float32)


def test_compiles() -> None:
    """The operator stands in a compiled graph, forward and backward."""
    inputs, needed, found = layer(Case(), INNERS[2], "mix")
    compiled = torch.compile(found, backend="aot_eager", fullgraph=True)
    assert_same_function(needed, compiled, inputs)


BREAKS: dict[str, Any] = {
    "_kept": lambda order, counts: torch.ones_like(order, dtype=torch.bool),
    "_kept_weights": lambda weights, order, counts: weights.reshape(-1)[order] * 0 + 1,
    "_bias_dots": lambda *_: 0.0,
    "_by_slot": lambda dots, weights, order, counts: dots.view(weights.shape),
    "mixed": lambda sums, dense, mix: sums * mix[:, 1:] + dense * mix[:, :1],
    "_to_mix": lambda grad, weights, dots, dense, mix: torch.zeros_like(mix),
    "_to_dense": lambda grad, mix: grad,
    "_to_weights": lambda dots, mix: dots,
    "sum_rows": lambda rows, order, top_k: rows.view(-1, top_k, rows.shape[1]).sum(1),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_kernel_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, needed, found = layer(Case(factor=0.7, crowd="one expert"), INNERS[2], "mix")
    with kernels_of_any_device():
        assert_same_function(needed, found, inputs)
        owner = moe_ffn_gradient if hasattr(moe_ffn_gradient, name) else moe_ffn
        monkeypatch.setattr(owner, name, BREAKS[name])
        with pytest.raises(AssertionError):
            assert_same_function(needed, found, inputs)


def broken(case: Case, **changes: object) -> None:
    weights, _, order, counts = case.routed()
    arguments: dict[str, object] = {
        "x": case.x(), "weights": weights, "order": order, "counts": counts,
        "matrices": [case.weight(), case.weight().mT], "biases": [None, None], "formula": "lambda h: gelu(h)",
    }  # fmt: skip
    ops.moe_ffn(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"formula": "lambda gate, up: silu(gate) * up"}, "2 matrices and 2 biases for lambda gate, up"),
        ({"formula": "lambda h: h[..., :4]"}, "a formula of width 4"),
        ({"formula": "lambda h: h[..., 9:] * h[..., :2]"}, "parts of one width|width"),
        ({"biases": [None]}, "1 biases"),
        ({"x": Case().x().float()}, "matrix 0 of torch.float64"),
        ({"mix": torch.ones(13, 2)}, "mix without dense"),
        ({"dense": torch.ones(12, 7)}, r"dense \[12, 7\]"),
    ],
)
def test_refuses(changes: dict[str, object], says: str) -> None:
    with pytest.raises(OperatorError, match=says):
        broken(Case(), **changes)


@given(cases(), st.sampled_from(("none", "rsample")), st.booleans(), st.booleans())
def test_gate(case: Case, noise: str, training: bool, random: bool) -> None:
    """All five results, and the gradients through scores and weights."""
    case = replace(case, tokens=max(case.tokens, 2))
    options = (case.bias(), case.top_k, case.gate, noise, case.factor, 0.7, 1, random, training)

    def run(call: Callable[..., tuple[Tensor, ...]], x: Tensor, router: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(case.seed)
        return call(x, router, *options)

    inputs = [case.x(), case.draw(case.experts, case.depth, salt=8)]
    assert_same_function(lambda *t: run(reference.gate, *t), lambda *t: run(ops.gate, *t), inputs)


@pytest.mark.parametrize("training", [True, False])
def test_opcheck_gate(training: bool) -> None:
    case = Case(dtype=torch.float32)
    x, router = case.x().requires_grad_(), case.draw(5, 7).requires_grad_()
    opcheck(ops.gate.default, (x, router, None, 2, "normalized", "none", 1.0, 0.0, 1, False, training))
    scores, weights, experts, *_ = ops.gate(
        x, router, None, 2, "sigmoid", "none", 1.0, 0.0, 1, False, training
    )
    saved = [tensor.detach() for tensor in (x, router, scores, weights, experts)]
    opcheck(ops.gate_backward.default, (None, weights.detach(), *saved, "sigmoid"))
    opcheck(ops.gate_backward.default, (scores.detach(), None, *saved, "sigmoid"))
