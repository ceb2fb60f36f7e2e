"""One spelling of attention: products, masks and repeated heads, however written; near misses stay."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moec.passes.group_heads import GroupHeads
from moec.passes.spell_attention import SpellAttention
from moec.passes.spell_linears import SpellLinears
from moec.passes.spell_masks import SpellMasks
from moec.passes.spell_products import SpellProducts
from tests.passes.test_spellings import Around, after, count

aten = torch.ops.aten
D, H = 8, 2


def heads(x: Tensor) -> Tensor:
    """[B, S, D] → [B, H, S, D/H]."""
    return x.unflatten(-1, [H, D // H]).transpose(1, 2)


def joined(y: Tensor) -> Tensor:
    """[B, H, S, D/H] → [B, S, D]."""
    return y.transpose(1, 2).flatten(-2)


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


@pytest.mark.parametrize("name", ATTENTIONS)
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
