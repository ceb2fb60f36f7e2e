"""One spelling of products, norms and activations: every way of writing becomes the one way."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moec.capture import capture
from moec.errors import PassError
from moec.ir import Pass, Program
from moec.passes.drop_noops import DropNoops
from moec.passes.functionalize_writes import FunctionalizeWrites
from moec.passes.merge_equal_values import MergeEqualValues
from moec.passes.normalize_views import NormalizeViews
from moec.passes.runner import Runner
from moec.passes.spell_activations import SpellActivations
from moec.passes.spell_linears import SpellLinears
from moec.passes.spell_norms import SpellNorms

aten = torch.ops.aten
D = 8


class Around(nn.Module):
    """tokens → embedding → what is tested → head."""

    def __init__(self, inside: Callable[[Around, Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, D), nn.Linear(D, 7)
        self.w, self.v = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.randn(D))
        self.inside = inside

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.inside(self, self.table(tokens)))


def after(inside: Callable[[Around, Tensor], Tensor], *passes: Pass) -> Program:
    """The program after `passes`, each proved exact in fp64, gradients included."""
    program = capture(Around(inside).double())
    return Runner(verify="full").run(program, [FunctionalizeWrites(), DropNoops(), NormalizeViews(), *passes])


def count(program: Program, target: object) -> int:
    """How often the graph calls `target`."""
    return sum(node.target is target for node in program.graph.graph.nodes)


# linear

LINEARS: dict[str, Callable[[Around, Tensor], Tensor]] = {
    "functional": lambda m, x: F.linear(x, m.w, m.v),
    "matmul": lambda m, x: x @ m.w + m.v,
    "matmul of t": lambda m, x: x @ m.w.t() + m.v,
    "transpose": lambda m, x: torch.matmul(x, m.w.transpose(0, 1)),
    "permute": lambda m, x: torch.matmul(x, m.w.permute(1, 0)),
    "numpy T": lambda m, x: x @ m.w.T,
    "addmm": lambda m, x: torch.addmm(m.v, x.view(-1, D), m.w).view(x.shape),
    "mm": lambda m, x: torch.mm(x.reshape(-1, D), m.w).reshape(*x.shape[:-1], D),
    "einsum": lambda m, x: torch.einsum("bsd,de->bse", x, m.w),
    "einsum turned": lambda m, x: torch.einsum("...d,ed->...e", x, m.w),
}


@pytest.mark.parametrize("name", LINEARS)
def test_every_product_with_a_weight_is_linear(name: str) -> None:
    program = after(LINEARS[name], SpellLinears())
    assert count(program, aten.linear.default) == 2
    others = (
        aten.matmul.default,
        aten.mm.default,
        aten.addmm.default,
        aten.einsum.default,
        aten.reshape.default,
    )
    assert not any(count(program, target) for target in others)


def test_a_scaled_addmm_is_not_taken_for_linear() -> None:
    program = after(lambda m, x: torch.addmm(m.v, x.view(-1, D), m.w, alpha=2).view(x.shape), SpellLinears())
    assert count(program, aten.addmm.default) == 1


def test_a_bias_that_is_also_read_elsewhere_stays_a_sum() -> None:
    def inside(m: Around, x: Tensor) -> Tensor:
        y = x @ m.w
        return (y + m.v) * y

    assert count(after(inside, SpellLinears()), aten.add.Tensor) == 1


# norms

NORMS: dict[str, tuple[object, Callable[[Around, Tensor], Tensor]]] = {
    "rms": (
        aten.rms_norm.default,
        lambda m, x: m.v * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    ),
    "rms by root": (
        aten.rms_norm.default,
        lambda m, x: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6),
    ),
    "rms one plus": (
        aten.rms_norm.default,
        lambda m, x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1.0 + m.v),
    ),
    "layer": (
        aten.layer_norm.default,
        lambda m, x: (x - x.mean(-1, keepdim=True))
        / torch.sqrt((x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True) + 1e-5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_norms_by_hand_are_spelled(name: str) -> None:
    target, inside = NORMS[name]
    program = after(inside, SpellNorms())
    assert count(program, target) == 1
    assert count(program, aten.rsqrt.default) == count(program, aten.sqrt.default) == 0


def test_a_mean_over_the_sequence_is_no_norm() -> None:
    program = after(lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6), SpellNorms())
    assert count(program, aten.rms_norm.default) == 0


# activations

ACTIVATIONS: dict[str, tuple[object, Callable[[Tensor], Tensor]]] = {
    "gpt2": (
        aten.gelu.default,
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3)))),
    ),
    "gelu by erf": (aten.gelu.default, lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))),
    "silu": (aten.silu.default, lambda x: x * torch.sigmoid(x)),
    "silu divided": (aten.silu.default, lambda x: x / (1 + torch.exp(-x))),
    "sigmoid": (aten.sigmoid.default, lambda x: 1 / (1 + torch.exp(-x))),
    "mish": (aten.mish.default, lambda x: x * torch.tanh(F.softplus(x))),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_written_out_are_spelled(name: str) -> None:
    target, function = ACTIVATIONS[name]
    program = after(lambda m, x: function(F.linear(x, m.w)), SpellActivations())
    assert count(program, target) == 1
    assert len(program.graph.graph.nodes) <= 10


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.sigmoid(1.702 * x),  # the quick gelu is a function of its own
        lambda x: 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x.pow(3)))),  # a constant cut short
        lambda x: x.clamp(min=-1e-3),  # almost a relu
        lambda x: x * x,
    ],
)
def test_functions_that_are_near_an_activation_stay(function: Callable[[Tensor], Tensor]) -> None:
    program = after(lambda m, x: function(F.linear(x, m.w)), SpellActivations())
    named = (aten.gelu.default, aten.silu.default, aten.relu.default, aten.sigmoid.default)
    assert not any(count(program, t) for t in named[:3])


def test_steps_that_are_read_elsewhere_stay() -> None:
    def inside(m: Around, x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        return x * s + s.sum(-1, keepdim=True)

    assert count(after(inside, SpellActivations()), aten.silu.default) == 0


# the small ones


def test_writes_become_values() -> None:
    def inside(m: Around, x: Tensor) -> Tensor:
        y = x * 2
        y += m.v
        y.mul_(3.0)
        return y

    program = after(inside)
    assert not any(
        str(n.target).split(".")[1].endswith("_")
        for n in program.graph.graph.nodes
        if n.op == "call_function"
    )


def test_a_write_through_a_view_is_refused() -> None:
    def inside(m: Around, x: Tensor) -> Tensor:
        y = x * 2
        y[:, :, 0].zero_()
        return y

    with pytest.raises(PassError, match="writes through a view"):
        after(inside)


def test_a_write_to_what_a_view_still_shows_is_refused() -> None:
    def inside(m: Around, x: Tensor) -> Tensor:
        y = x * 2
        half = y[..., : D // 2]
        y += m.v
        return torch.cat([half, half], -1)

    with pytest.raises(PassError, match="writes through a view"):
        after(inside)


def test_equal_tables_are_made_once_and_dropouts_stay_apart() -> None:
    def inside(m: Around, x: Tensor) -> Tensor:
        def table() -> Tensor:
            return torch.arange(x.shape[1]).double()[:, None].cos()

        return F.dropout(x * table(), 0.5, m.training) + F.dropout(x * table(), 0.5, m.training)

    program = after(inside, MergeEqualValues())
    assert count(program, aten.cos.default) == 1
    assert count(program, aten.dropout.default) == 2
