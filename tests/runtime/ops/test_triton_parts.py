"""Tiles, shapes, and the functions of formulas: the parts that the Triton kernels are made of."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from moec.errors import OperatorError
from moec.runtime.ops.formula import read_formula
from moec.runtime.ops.formula_functions import FUNCTIONS, PRIMITIVES, WORDS
from moec.testing.tolerances import error_of
from tests.runtime.ops.triton_layers import DEVICE

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
import triton.language as tl  # noqa: E402

from moec.runtime.ops.triton import launch, pointwise, shapes, tiles  # noqa: E402


@pytest.mark.parametrize(
    ("counts", "num_rows", "height"),
    [([3, 0, 5, 17, 0], 30, 4), ([0, 0], 3, 16), ([1], 1, 16), ([2, 2, 2], 6, 2), ([7] * 40, 280, 3)],
)  # fmt: skip
def test_tiles(counts: list[int], num_rows: int, height: int) -> None:
    made = tiles.cut(torch.tensor(counts, device=DEVICE), num_rows, height)
    ends = [0, *torch.tensor([*counts, num_rows - sum(counts)]).cumsum(0).tolist()]
    needed = [
        [group, start, min(start + height, end)]
        for group, (begin, end) in enumerate(pairwise(ends))
        for start in range(begin, end, height)
    ]
    found = made.table.t().tolist()
    assert [tile for tile in found if tile[0] >= 0] == needed
    assert all(tile[0] == -1 for tile in found[len(needed) :])


@pytest.mark.parametrize("kind", shapes.KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("memory", [shapes.HOPPER, 99 * 1024])
def test_shapes_fit_what_they_are_for(kind: str, dtype: torch.dtype, memory: int) -> None:
    """No tile is twice what it covers, and what is loaded ahead fits a processor's memory, of a small GPU
    too."""
    products = ((1, 1, 1, 1), (2560, 256, 768, 2), (40, 5000, 33, 3), (4096, 4096, 4096, 1))
    for rows, width, depth, leaves in products:
        leaves = 1 if kind == "outer" else leaves
        shape = shapes.shape_for(kind, dtype, rows, width, depth, leaves, memory)
        for size, needed in ((shape.height, rows), (shape.width, width), (shape.depth, depth)):
            assert 16 <= size < max(32, 2 * needed)
        ahead = max(1, shape.stages - (kind == "outer"))  # one stage of `outer` loads row numbers alone
        assert (shape.height + leaves * shape.width) * shape.depth * dtype.itemsize * ahead <= memory


def test_a_sum_is_cut_until_the_processors_are_busy() -> None:
    assert shapes.splits_for(programs=10**4, depth=4096, step=512, processors=132) == 1
    assert shapes.splits_for(programs=64, depth=64, step=512, processors=132) == 1
    assert shapes.splits_for(programs=64, depth=4096, step=512, processors=132) == 4
    assert shapes.splits_for(programs=64, depth=10**6, step=512, processors=132) == 8


@triton.jit
def _apply(  # type: ignore[no-untyped-def]
    x, y, z, g, out, size, FORWARD: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.arange(0, BLOCK)
    inside = at < size
    v0, v1 = tl.load(x + at, mask=inside, other=1.0), tl.load(y + at, mask=inside, other=1.0)
    v2, grad = tl.load(z + at, mask=inside, other=1.0), tl.load(g + at, mask=inside, other=1.0)
    tl.store(out + at, FORWARD(v0, v1, v2), mask=inside)
    g0, g1, g2, again = BACKWARD(v0, v1, v2, grad)
    tl.store(out + size + at, g0, mask=inside)
    tl.store(out + 2 * size + at, g1, mask=inside)
    tl.store(out + 3 * size + at, g2, mask=inside)
    tl.store(out + 4 * size + at, again, mask=inside)


def formulas() -> Iterator[str]:
    """Every word of the language, and ways to put leaves together."""
    for word in WORDS:
        function = FUNCTIONS[word]
        values = ["a", "b"][: function.arguments - function.numbers]
        numbers = ["3" if word == "pow" else "0.25"] * function.numbers
        inside = "a * a + 0.5" if word in ("log", "sqrt", "rsqrt", "reciprocal") else "a"
        yield f"lambda {', '.join(values)}: {word}({', '.join([inside, *values[1:], *numbers])})"
    yield "lambda a: -a * a / (a * a + 2) - 3 * a + 1"
    yield "lambda a, b, c: silu(a) * b + c * a - 0.5"
    yield "lambda a: 2 - a - 1"


@pytest.mark.parametrize("text", list(formulas()))
def test_formulas(text: str) -> None:
    """Both functions of a formula against fp64, where derivatives are torch's own."""
    formula = read_formula(text)
    inputs = [
        torch.randn(4, 33, generator=torch.Generator().manual_seed(7)).to(DEVICE)[row] for row in range(4)
    ]
    out = torch.empty(5, 33, device=DEVICE)
    made = pointwise.pointwise(formula)
    launch.launch(_apply, (1,), *inputs, out, 33, made.forward, made.backward, 64)
    leaves = [value.double().requires_grad_() for value in inputs[: len(formula.leaves)]]
    needed = formula.apply(leaves)
    gradients = torch.autograd.grad(needed, leaves, inputs[3].double())
    spare = [torch.zeros_like(needed)] * (3 - len(leaves))
    for found, wanted in zip(out, (needed, *gradients, *spare, needed), strict=True):
        assert error_of(found, wanted, floor=1.0) < 1e-5


def test_every_primitive_has_a_spelling() -> None:
    assert set(pointwise.WORDS) == set(PRIMITIVES)


def test_the_functions_of_a_formula_are_made_once_and_can_be_read() -> None:
    formula = read_formula("lambda gate, up: silu(gate) * up")
    assert pointwise.pointwise(formula) is pointwise.pointwise(read_formula(str(formula)))
    forward, backward = pointwise.source_of(formula)
    assert forward.splitlines()[:2] == ["@triton.jit", "def f(v0, v1, v2):"]
    assert backward.splitlines()[-1] == "    return t9, t4, v0 * 0.0, t2"


def test_a_formula_of_too_many_leaves_is_refused() -> None:
    with pytest.raises(OperatorError, match="4 different up products are read"):
        pointwise.pointwise(read_formula("lambda a, b, c, d: a * b * c * d"))
