"""One spelling per operator: every way something is written becomes the one way, and near misses stay."""

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
from moec.passes.group_heads import GroupHeads
from moec.passes.merge_equal_values import MergeEqualValues
from moec.passes.normalize_views import NormalizeViews
from moec.passes.runner import Runner
from moec.passes.spell_activations import SpellActivations
from moec.passes.spell_attention import SpellAttention
from moec.passes.spell_linears import SpellLinears
from moec.passes.spell_masks import SpellMasks
from moec.passes.spell_norms import SpellNorms
from moec.passes.spell_products import SpellProducts

aten = torch.ops.aten
D, H = 8, 2


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


def heads(x: Tensor) -> Tensor:
    """[B, S, D] → [B, H, S, D/H]."""
    return x.unflatten(-1, [H, D // H]).transpose(1, 2)


def joined(y: Tensor) -> Tensor:
    """[B, H, S, D/H] → [B, S, D]."""
    return y.transpose(1, 2).flatten(-2)


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


@pytest.mark.parametrize("name", ["rms", "rms by root", "rms one plus"])
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


@pytest.mark.parametrize("name", ["gpt2", "gelu by erf", "silu", "sigmoid", "mish"])
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


# attention


def _hidden(s: Tensor, value: float = -math.inf) -> Tensor:
    keep = torch.ones(s.shape[-1], s.shape[-1], dtype=torch.bool).tril()
    return s.masked_fill(~keep, value)


def _added(s: Tensor) -> Tensor:
    return s + torch.full((s.shape[-1], s.shape[-1]), -1e30, dtype=s.dtype).triu(1)


def _chosen(s: Tensor) -> Tensor:
    i = torch.arange(s.shape[-1])
    return torch.where(i[None, :] <= i[:, None], s, -math.inf)


ATTENTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "masked_fill": lambda q: torch.softmax(_hidden(q @ q.transpose(-2, -1) / 2.0), -1) @ q,
    "finite": lambda q: torch.softmax(_hidden(q @ q.mT * 0.5, -1e30), -1) @ q,
    "added": lambda q: F.softmax(_added((q / 2.0) @ q.transpose(2, 3)), dim=-1) @ q,
    "where": lambda q: torch.matmul(torch.softmax(_chosen(q @ q.transpose(-1, -2) * 0.3), -1), q),
    "einsum": lambda q: torch.einsum(
        "bhqk,bhkd->bhqd", torch.softmax(_hidden(torch.einsum("bhqd,bhkd->bhqk", q, q)), -1), q
    ),
    "bmm": lambda q: torch.bmm(
        torch.softmax(_hidden(torch.bmm(q.flatten(0, 1), q.flatten(0, 1).transpose(1, 2))), -1),
        q.flatten(0, 1),
    ).unflatten(0, [-1, H]),
}


@pytest.mark.parametrize("name", ["masked_fill", "finite", "added", "where", "einsum"])
def test_attention_written_out_is_causal_attention(name: str) -> None:
    program = after(
        lambda m, x: joined(ATTENTIONS[name](heads(x))),
        SpellLinears(),
        SpellProducts(),
        SpellAttention(),
        SpellMasks(),
    )
    (core,) = (n for n in program.graph.graph.nodes if n.target is aten.scaled_dot_product_attention.default)
    assert core.args[3:] == (None, 0.0, True)
    assert count(program, aten.softmax.int) == 0
    assert count(program, aten.arange.default) == 0


def test_a_soft_cap_stays() -> None:
    def inside(m: Around, x: Tensor) -> Tensor:
        q = heads(x)
        return joined(torch.softmax(_hidden(torch.tanh(q @ q.mT / 5.0) * 5.0), -1) @ q)

    program = after(inside, SpellProducts(), SpellAttention(), SpellMasks())
    assert count(program, aten.softmax.int) == 1


def test_a_mask_that_hides_little_is_no_mask() -> None:
    def inside(m: Around, x: Tensor) -> Tensor:
        q = heads(x)
        return joined(torch.softmax(_hidden(q @ q.mT, -2.0), -1) @ q)

    program = after(inside, SpellProducts(), SpellAttention(), SpellMasks())
    assert count(program, aten.scaled_dot_product_attention.default) == 0


# masks


def _window(size: int) -> Callable[[Tensor], Tensor]:
    def mask(i: Tensor) -> Tensor:
        return (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - size)

    return mask


MASKS: dict[str, tuple[bool, Callable[[Tensor], Tensor]]] = {
    "comparison": (True, lambda i: i[None, :] <= i[:, None]),
    "turned": (True, lambda i: i[:, None] >= i[None, :]),
    "not above": (True, lambda i: ~(i[None, :] > i[:, None])),
    "tril": (True, lambda i: torch.ones(i.shape[0], i.shape[0], dtype=torch.bool).tril()),
    "triu": (True, lambda i: torch.ones(i.shape[0], i.shape[0]).triu(1) == 0),
    "strict": (True, lambda i: i[None, :] < i[:, None] + 1),
    "and always": (True, lambda i: (i[None, :] <= i[:, None]) & (i[None, :] >= 0)),
    "additive": (True, lambda i: torch.where(i[None, :] <= i[:, None], 0.0, -1e30).double()),
    "window": (False, _window(3)),
    "one further": (False, lambda i: i[None, :] <= i[:, None] + 1),
    "everything": (False, lambda i: (i[None, :] >= 0) & (i[:, None] >= 0)),
    "parity": (False, lambda i: (i[None, :] <= i[:, None]) & ((i[None, :] + i[:, None]) % 2 == 0)),
    "faint": (False, lambda i: torch.where(i[None, :] <= i[:, None], 0.0, -3.0).double()),
}


@pytest.mark.parametrize("name", MASKS)
def test_causal_masks_and_no_others_are_causal_attention(name: str) -> None:
    causal, mask = MASKS[name]

    def inside(m: Around, x: Tensor) -> Tensor:
        i, q = torch.arange(x.shape[1]), heads(x)
        return joined(F.scaled_dot_product_attention(q, q, q, attn_mask=mask(i)))

    program = after(inside, SpellMasks())
    (core,) = (n for n in program.graph.graph.nodes if n.target is aten.scaled_dot_product_attention.default)
    assert (len(core.args) > 5 and core.args[5] is True) == causal


# grouped heads


@pytest.mark.parametrize("how", ["expand", "repeat_interleave"])
def test_repeated_heads_are_grouped(how: str) -> None:
    def repeat(k: Tensor) -> Tensor:
        if how == "repeat_interleave":
            return k.repeat_interleave(2, dim=1)
        return k[:, :, None].expand(-1, -1, 2, -1, -1).reshape(k.shape[0], 4, k.shape[2], k.shape[3])

    def inside(m: Around, x: Tensor) -> Tensor:
        q, k = x.unflatten(-1, [4, 2]).transpose(1, 2), x[..., :4].unflatten(-1, [2, 2]).transpose(1, 2)
        return joined(F.scaled_dot_product_attention(q, repeat(k), repeat(k), is_causal=True))

    program = after(inside, GroupHeads())
    (core,) = (n for n in program.graph.graph.nodes if n.target is aten.scaled_dot_product_attention.default)
    assert core.kwargs["enable_gqa"] is True
    assert core.args[1].meta["val"].shape[1] == 2


def test_heads_repeated_in_another_order_stay() -> None:
    def inside(m: Around, x: Tensor) -> Tensor:
        q, k = x.unflatten(-1, [4, 2]).transpose(1, 2), x[..., :4].unflatten(-1, [2, 2]).transpose(1, 2)
        return joined(F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), k.repeat(1, 2, 1, 1)))

    program = after(inside, GroupHeads())
    (core,) = (n for n in program.graph.graph.nodes if n.target is aten.scaled_dot_product_attention.default)
    assert "enable_gqa" not in core.kwargs


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
