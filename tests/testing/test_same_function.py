"""`assert_same_function` accepts what is the same and names the first tensor that is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from moec.testing import NAMED, assert_same_function, error_of, tolerance_of
from moec.testing.parts.decoder import Decoder


def _model(
    name: str = "gemma_like", dtype: torch.dtype = torch.float64
) -> tuple[Decoder, tuple[Tensor, ...]]:
    recipe = NAMED[name]
    return recipe.build(1, dtype), (recipe.tokens(),)


class _Halved(nn.Module):
    """Two linear maps added up; `split` is how a weight is divided between them."""

    def __init__(self, weight: Tensor, split: float) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(weight * split), nn.Parameter(weight * (1 - split))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.left + x @ self.right


def test_a_copy_is_the_same_function_and_no_grad_is_left_behind() -> None:
    model, inputs = _model()
    twin = copy.deepcopy(model)
    assert_same_function(model, twin, inputs)
    assert all(p.grad is None for m in (model, twin) for p in m.parameters())


def test_dropout_draws_alike_on_both_sides() -> None:
    model, inputs = _model("opt_like")
    assert_same_function(model.train(), copy.deepcopy(model).train(), inputs)
    with pytest.raises(AssertionError, match=r"^output: error"):
        assert_same_function(model, copy.deepcopy(model).eval(), inputs)


def test_a_changed_weight_is_an_output_error_with_place_and_values() -> None:
    model, inputs = _model()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_parameter("last_norm.weight").view(-1)[0] += 1e-6
    with pytest.raises(
        AssertionError, match=r"^output: error .* relative to scale, allowed 1e-10; found .* at \["
    ):
        assert_same_function(model, twin, inputs)


class _Detached(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.detach()
        return super().forward(x) - self.bias + bias


def test_a_detached_gradient_is_caught_by_name() -> None:
    linear, x = nn.Linear(5, 3, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    twin = _Detached(5, 3, dtype=torch.float64)
    twin.load_state_dict(linear.state_dict())
    assert_same_function(linear, twin, (x,), gradients=False)
    with pytest.raises(AssertionError, match=r"^gradient of bias: error"):
        assert_same_function(linear, twin, (x,))


def test_gradients_of_inputs_are_compared() -> None:
    x = torch.randn(4, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"^gradient of input 0"):
        assert_same_function(lambda v: v * v, lambda v: v * v.detach(), (x,))


def test_names_map_and_add_up() -> None:
    weight, x = torch.randn(5, 3, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    whole, parts = _Halved(weight, 1.0), _Halved(weight, 0.25)
    with pytest.raises(AssertionError, match="no gradient of right"):
        assert_same_function(whole, _Only(weight), (x,), names={"only": "left"})
    assert_same_function(_Only(weight), parts, (x,), names=lambda grads: {"only": grads["left"]})
    with pytest.raises(AssertionError, match="gradient of only"):
        assert_same_function(_Only(weight), parts, (x,), names={"left": "only", "right": "only"})


class _Only(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.only = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.only


@dataclass
class _Pair:
    first: Tensor
    second: list[Tensor | None]


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        (lambda x: _Pair(x, [x + 1, None]), r"output\.second\[0\]"),
        (lambda x: _Pair(x.unsqueeze(0), [x, None]), r"output\.first: shape \[1, 3\]"),
        (lambda x: _Pair(x.float(), [x, None]), r"output\.first: torch.float32"),
        (lambda x: _Pair(x * float("nan"), [x, None]), r"output\.first: error inf"),
        (lambda x: _Pair(x, []), r"no output\.second\[0\]"),
    ],
)
def test_tensors_inside_structures_are_found_and_named(broken: Callable[..., object], name: str) -> None:
    x = torch.randn(3, dtype=torch.float64)
    with pytest.raises(AssertionError, match=name):
        assert_same_function(lambda v: _Pair(v, [v, None]), broken, (x,))


def test_error_is_relative_to_scale() -> None:
    needed = torch.tensor([1000.0, 1e-9], dtype=torch.float64)
    assert error_of(needed + torch.tensor([0.0, 1e-3]), needed) == pytest.approx(1e-6)
    assert error_of(needed, needed, floor=1e9) == 0.0
    assert error_of(needed * float("nan"), needed) == float("inf")
    infinite = torch.tensor([float("inf"), 2.0])
    assert error_of(infinite, infinite) == 0.0
    assert error_of(-infinite, infinite) == float("inf")
    assert error_of(torch.zeros(2), torch.zeros(3)) == float("inf")
    assert tolerance_of(torch.int64) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_table_leaves_room_for_reassociation(dtype: torch.dtype) -> None:
    """The same network with its sums in another order: rounding differs, and stays within the table."""
    model, inputs = _model("nano_gpt", dtype)
    turned = copy.deepcopy(model)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for block in turned.get_submodule("blocks").children():
            fc, proj = block.get_parameter("mlp.c_fc.weight"), block.get_parameter("mlp.c_proj.weight")
            fc.copy_(fc[order].clone())
            proj.copy_(proj[:, order].clone())
    assert_same_function(model.eval(), turned.eval(), (*inputs, *inputs), gradients=False)
