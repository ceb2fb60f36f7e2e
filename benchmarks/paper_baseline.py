"""The paper's baseline: a decoder in plain, eager PyTorch, with experts by one-hot tables.

What it does is what the paper says of it (section 5.4) and what was the custom of its day: attention in five
steps over a cache that is concatenated anew for every token; gates that make masks of tokens × experts, a
table of tokens × experts × slots, two sparse einsums with it; an exchange of all slots of all experts, empty
or not, among all ranks; then the local experts one after the other, on all slots that arrived. Every number
is read off the shapes of that code (`eager_trace.py`); none is fitted.

Legend: T tokens of one tensor group, D model, F hidden, E experts, C slots of an expert, R ranks of the
expert axis, B rows, H heads of this rank, L positions with the new one, d a head's width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.eager_trace import EagerTrace, joined
from benchmarks.paper_models import VOCABULARY, Place, Served
from moec.cost import Cost, Operation
from moec.ir.mesh import ExpertAxes, Mesh

LEAST_SLOTS = 4  # the paper's minimal capacity of an expert


def slots(tokens: int, experts: int) -> int:
    """C: with capacity factor 1."""
    return max(math.ceil(tokens / experts), LEAST_SLOTS)


def one_hot_gate(logits_TE: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The table [T, E, C] of a top-1 gate with capacity, and where it is not zero.

    Random token selection and the balance term as in the paper's training code, which the baseline runs.
    """
    gates_TE = logits_TE.softmax(1)
    mask_TE = F.one_hot(gates_TE.argmax(1), gates_TE.shape[1])
    (gates_TE.mean(0) * mask_TE.float().mean(0)).sum()
    chance_TE = mask_TE * torch.rand(mask_TE.shape, device=mask_TE.device)
    kept_CE = chance_TE.topk(capacity, dim=0).indices
    mask_TE = mask_TE * torch.zeros_like(mask_TE).scatter(0, kept_CE, 1)
    place_TE = mask_TE.cumsum(0) - 1
    place_T = (place_TE * mask_TE).sum(1)
    slot_TC = F.one_hot(place_T, capacity).float()
    table_TEC = torch.einsum("te,tc->tec", gates_TE * mask_TE.float(), slot_TC)
    return table_TEC, table_TEC.bool()


@dataclass(frozen=True)
class Sizes:
    """The sizes of one rank: see the legend. `axis`: of ranks that exchange rows; `tensor`: that share."""

    rows: int
    positions: int
    width: int
    heads: int
    experts: int
    axis: str
    ranks: int
    tensor: int

    def weight(self, *shape: int) -> Tensor:
        """A weight in half precision."""
        return torch.empty(shape, dtype=torch.float16, device="meta")


def attention_operations(sizes: Sizes, layer: int) -> list[Operation]:
    """Norm, attention over the cache and residual sum of one layer."""
    D, t = sizes.width, sizes.tensor
    qkv, bias = sizes.weight(3 * D // t, D), sizes.weight(3 * D // t)
    out, norm, shift = sizes.weight(D, D // t), sizes.weight(D), sizes.weight(D)
    past = sizes.weight(2, sizes.rows, sizes.heads // t, sizes.positions - 1, D // sizes.heads)
    hidden_BLL = torch.empty((sizes.rows, 1, 1, sizes.positions), dtype=torch.bool, device="meta")
    x_BD = sizes.weight(sizes.rows, D)
    trace = EagerTrace(f"attention_{layer}", layer, [qkv, bias, out, norm, shift])
    with trace:
        mixed = F.linear(F.layer_norm(x_BD, (D,), norm, shift), qkv, bias)
        q, k, v = mixed.view(sizes.rows, 1, 3 * sizes.heads // t, -1).transpose(1, 2).chunk(3, 1)
        keys, values = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        scores = torch.matmul(q, keys.transpose(2, 3)).float() * (D // sizes.heads) ** -0.5
        shares = scores.masked_fill(hidden_BLL, -10000.0).softmax(-1).half()
        y_BD = F.linear(torch.matmul(shares, values).transpose(1, 2).reshape(sizes.rows, -1), out)
    _sum(trace, sizes, y_BD)
    with trace:
        x_BD + (y_BD + shift)
    return trace.operations


def feed_forward_operations(sizes: Sizes, layer: int) -> list[Operation]:
    """Norm, a dense feed-forward shared by the tensor group, and residual sum."""
    D, width = sizes.width, 4 * sizes.width // sizes.tensor
    up, down, bias = sizes.weight(width, D), sizes.weight(D, width), sizes.weight(width)
    x_BD, norm, shift = sizes.weight(sizes.rows, D), sizes.weight(D), sizes.weight(D)
    trace = EagerTrace(f"ffn_{layer}", layer, [up, down, bias, norm, shift])
    with trace:
        h_BF = F.gelu(F.linear(F.layer_norm(x_BD, (D,), norm, shift), up, bias))
        y_BD = F.linear(h_BF, down)
    _sum(trace, sizes, y_BD)
    with trace:
        x_BD + (y_BD + shift)
    return trace.operations


def expert_operations(sizes: Sizes, layer: int) -> list[Operation]:
    """Norm, gate, table, exchange, the local experts one by one, and back."""
    D, E, R = sizes.width, sizes.experts, sizes.ranks
    capacity = slots(sizes.rows, E)
    router, up, down = sizes.weight(E, D), sizes.weight(4 * D, D), sizes.weight(D, 4 * D)
    up_bias, norm, shift = sizes.weight(4 * D), sizes.weight(D), sizes.weight(D)
    x_TD = sizes.weight(sizes.rows, D)
    trace = EagerTrace(f"moe_{layer}", layer, [router, up, down, up_bias, norm, shift])
    with trace:
        n_TD = F.layer_norm(x_TD, (D,), norm, shift)
        table_TEC, used_TEC = one_hot_gate(F.linear(n_TD.float(), router.float()), capacity)
        slots_ECD = torch.einsum("tec,td->ecd", used_TEC.half(), n_TD)
    _exchange(trace, sizes, slots_ECD)
    with trace:
        arrived = slots_ECD.view(R, E // R, capacity, D)
        parts = [part.reshape(-1, D) for part in arrived.unbind(1)]
        outs = [F.linear(F.gelu(F.linear(part, up, up_bias)), down, shift) for part in parts]
        out_ECD = torch.cat(outs, 0)
    _exchange(trace, sizes, out_ECD)
    with trace:
        x_TD + torch.einsum("tec,ecd->td", table_TEC.half(), out_ECD.view(E, capacity, D))
    return trace.operations


def _sum(trace: EagerTrace, sizes: Sizes, value: Tensor) -> None:
    t, whole = sizes.tensor, value.numel() * value.itemsize
    trace.send("tensor", t, "all_reduce", 2 * (t - 1) * whole / t, 2 * (t - 1))


def _exchange(trace: EagerTrace, sizes: Sizes, value: Tensor) -> None:
    others, whole = sizes.ranks - 1, value.numel() * value.itemsize
    trace.send(sizes.axis, sizes.ranks, "all_to_all_single", whole * others / sizes.ranks, others)


def ends(sizes: Sizes) -> tuple[list[Operation], list[Operation]]:
    """(the embeddings, the last norm with the head and the choice of the next token)."""
    D, words = sizes.width, math.ceil(VOCABULARY / sizes.tensor)
    table, places = sizes.weight(words, D), sizes.weight(2048, D)
    tokens_B = torch.empty(sizes.rows, dtype=torch.int64, device="meta")
    norm, shift, x_BD = sizes.weight(D), sizes.weight(D), sizes.weight(sizes.rows, D)
    first, last = EagerTrace("", None), EagerTrace("", None, [table])
    with first:
        table[tokens_B] + places[tokens_B]
    _sum(first, sizes, x_BD)
    with last:
        logits_BV = F.linear(F.layer_norm(x_BD, (D,), norm, shift), table)
        logits_BV.float().softmax(-1).argmax(-1)
    return first.operations, last.operations


def baseline_cost(served: Served, place: Place, rows: int, positions: int) -> Cost:
    """One step of every layer of a model on one rank: `rows` sequences of a tensor group, each with
    `positions` positions, the new one among them. Amounts are numbers, there are no letters."""
    mesh, axis = _mesh(served, place)
    sizes = Sizes(
        rows, positions, served.width, served.heads, served.experts, axis, place.expert, served.tensor
    )
    first, last = ends(sizes)
    layers = [_layer(sizes, layer, served.experts > 0 and layer % 2 == 1) for layer in range(served.layers)]
    return Cost(joined([first, *layers, last]), "decode", mesh)


def _mesh(served: Served, place: Place) -> tuple[Mesh, str]:
    """(the ranks, the axis that rows travel along); the baseline cannot slice an expert."""
    if not served.experts:
        return Mesh(place.world // served.tensor, served.tensor), ""
    axes = ExpertAxes(place.world // place.expert, place.expert)
    layers = tuple((f"moe_{layer}", axes) for layer in range(1, served.layers, 2))
    return Mesh(place.world // served.tensor, served.tensor, place.node, layers), axes.expert_axis


def _layer(sizes: Sizes, layer: int, sparse: bool) -> list[Operation]:
    attention = attention_operations(sizes, layer)
    after = (expert_operations if sparse else feed_forward_operations)(sizes, layer)
    return list(joined([attention, after]))
