"""A vocabulary that is dealt out to the ranks of an axis: embedding, loss and logits.

Every rank holds one stretch of ceil(V / ranks) words; the last ranks may hold fewer, or none.

    embedding_part(tokens, weight [V_l,D], num_embeddings, axis, padding_idx=-1) -> [..., D]
        rows of this rank's words, zeros for the words of others: the sum over ranks is the embedding
    cross_entropy_part(logits [N,V_l], targets [N] i64, num_classes, ignore_index, axis) -> [N]
        the loss of every position, whole on every rank, in float32 at least; 0 where the target is ignored.
        Sends three vectors of N, never logits (Megatron-LM, arXiv 1909.08053, section 3)
    gather_vocabulary(logits [..., V_l], num_classes, axis) -> [..., V]
        the logits of all ranks, on all of them

Backward is the exact transpose: what arrives is summed over ranks, since their results may be used in
different ways.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moec.runtime.ops.groups import axis_rank, axis_size
from moec.runtime.ops.registry import define, define_composite, demand, differentiate, wide
from moec.runtime.ops.work import Call, Price, Work, price

c10d = torch.ops._c10d_functional
aten = torch.ops.aten


def stretch(num_words: int, ranks: int, place: int) -> tuple[int, int]:
    """(first word, number of words) of the rank at `place`."""
    longest = -(-num_words // ranks)
    first = min(place * longest, num_words)
    return first, min(longest, num_words - first)


def _own(num_words: int, axis: str) -> tuple[int, int]:
    return stretch(num_words, axis_size(axis), axis_rank(axis))


def _require_words(found: int, num_words: int, axis: str, name: str) -> int:
    """The first word of this rank, whose part must be `found` words long."""
    first, count = _own(num_words, axis)
    demand(found == count, name, f"{found} words of {num_words}", f"{count}, the part of this rank")
    return first


def all_reduced(x: Tensor, axis: str, how: str = "sum") -> Tensor:
    """The sum (or `max`) of `x` over the ranks of the axis."""
    return c10d.wait_tensor(c10d.all_reduce(x.contiguous(), how, axis))


def _require_inside(words: Tensor, num_words: int, name: str) -> None:
    inside = ((words >= 0) & (words < num_words)).all()
    if words.device.type == "cpu":
        demand(bool(inside), name, "words outside the vocabulary", f"0 up to {num_words - 1}")
    else:
        torch._assert_async(inside)  # no rank would notice otherwise: each holds a part


# embedding


def _embedding(
    tokens: Tensor, weight: Tensor, num_embeddings: int, axis: str, padding_idx: int = -1
) -> Tensor:
    first = _require_words(weight.shape[0], num_embeddings, axis, "embedding_part")
    _require_inside(tokens, num_embeddings, "embedding_part")
    if not weight.shape[0]:
        return weight.new_zeros(*tokens.shape, weight.shape[1])
    places, own = _places(tokens, first, weight.shape[0])
    return F.embedding(places, weight).masked_fill_(~own.unsqueeze(-1), 0.0)


def _fake_embedding(
    tokens: Tensor, weight: Tensor, num_embeddings: int, axis: str, padding_idx: int = -1
) -> Tensor:
    return weight.new_empty(*tokens.shape, weight.shape[1])


def _keep_tokens(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, weight, ctx.num_words, ctx.axis, ctx.padding = inputs
    ctx.held = weight.shape[0]
    ctx.save_for_backward(tokens)


def _embedding_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (tokens,) = ctx.saved_tensors
    rows = torch.ops.moec.embedding_part_back(grad, tokens, ctx.held, ctx.num_words, ctx.axis, ctx.padding)
    return None, rows, None, None, None


def _embedding_rows(
    grad: Tensor, tokens: Tensor, held: int, num_embeddings: int, axis: str, padding_idx: int
) -> Tensor:
    """The gradient [V_l,D] of the part: every row of `grad` added to its word's, if the word is here."""
    first, _ = _own(num_embeddings, axis)
    places = tokens - first
    skipped = (places < 0) | (places >= held) | (tokens == padding_idx)
    # One row more than there are words: the row that `padding_idx` leaves out.
    rows = aten.embedding_dense_backward(grad, places.masked_fill(skipped, held), held + 1, held, False)
    return rows[:held].clone()


def _fake_rows(
    grad: Tensor, tokens: Tensor, held: int, num_embeddings: int, axis: str, padding_idx: int
) -> Tensor:
    return grad.new_empty(held, grad.shape[-1])


# loss


def _check_loss(logits: Tensor, targets: Tensor) -> None:
    fits = logits.dim() == 2 and targets.shape == logits.shape[:1]
    found = f"logits {list(logits.shape)}, targets {list(targets.shape)}"
    demand(fits, "cross_entropy_part", found, "[N, V_l] and [N]")


def _losses(
    logits: Tensor, targets: Tensor, num_classes: int, ignore_index: int, axis: str
) -> tuple[Tensor, Tensor]:
    """Loss and log of the sum of exponentials of every position, [N] each."""
    _check_loss(logits, targets)
    first = _require_words(logits.shape[1], num_classes, axis, "cross_entropy_part")
    kept_N = targets != ignore_index
    _require_inside(targets[kept_N], num_classes, "cross_entropy_part")
    logits_NV = logits.to(wide(logits.dtype))
    largest_N = all_reduced(_largest(logits_NV), axis, "max")
    sums_N = all_reduced((logits_NV - largest_N.unsqueeze(1)).exp_().sum(1), axis)
    total_N = sums_N.log() + largest_N
    chosen_N = all_reduced(_chosen(logits_NV, targets, first), axis)
    return torch.where(kept_N, total_N - chosen_N, 0.0), total_N


def _largest(logits_NV: Tensor) -> Tensor:
    return logits_NV.amax(1) if logits_NV.shape[1] else logits_NV.new_full(logits_NV.shape[:1], -torch.inf)


def _chosen(logits_NV: Tensor, targets_N: Tensor, first: int) -> Tensor:
    """The logit of the target where it is a word of this rank, 0 elsewhere."""
    if not logits_NV.shape[1]:
        return logits_NV.new_zeros(logits_NV.shape[0])
    places_N, own_N = _places(targets_N, first, logits_NV.shape[1])
    return torch.where(own_N, logits_NV.gather(1, places_N.unsqueeze(1)).squeeze(1), 0.0)


def _places(targets_N: Tensor, first: int, held: int) -> tuple[Tensor, Tensor]:
    """Where each target lies among this rank's words (0 for those of others), and whether it does."""
    own_N = (targets_N >= first) & (targets_N < first + held)
    return torch.where(own_N, targets_N - first, 0), own_N


def _fake_losses(
    logits: Tensor, targets: Tensor, num_classes: int, ignore_index: int, axis: str
) -> tuple[Tensor, Tensor]:
    _check_loss(logits, targets)
    made = logits.new_empty(logits.shape[0], dtype=wide(logits.dtype))
    return made, torch.empty_like(made)


def _keep_losses(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, ctx.num_classes, ctx.ignore_index, ctx.axis = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.mark_non_differentiable(output[1])


def _losses_back(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    logits, targets, total_N = ctx.saved_tensors
    rest = (ctx.num_classes, ctx.ignore_index, ctx.axis)
    return torch.ops.moec.cross_entropy_part_back(grad_N, logits, targets, total_N, *rest), *[None] * 4


def _logits_gradient(
    grad: Tensor, logits: Tensor, targets: Tensor, total: Tensor, num_classes: int, ignore_index: int,
    axis: str,
) -> Tensor:  # fmt: skip
    """(softmax - one hot) times the sum over ranks of what arrived, for this rank's words."""
    grad_N1 = torch.where(targets != ignore_index, all_reduced(grad, axis), 0.0).unsqueeze(1)
    first, _ = _own(num_classes, axis)
    shares_NV = (logits.to(total.dtype) - total.unsqueeze(1)).exp_()
    if logits.shape[1]:
        places_N, own_N = _places(targets, first, logits.shape[1])
        shares_NV.scatter_add_(1, places_N.unsqueeze(1), -own_N.to(total.dtype).unsqueeze(1))
    return shares_NV.mul_(grad_N1).to(logits.dtype)


def _fake_logits_gradient(
    grad: Tensor, logits: Tensor, targets: Tensor, total: Tensor, num_classes: int, ignore_index: int,
    axis: str,
) -> Tensor:  # fmt: skip
    return torch.empty_like(logits)


def _cross_entropy(logits: Tensor, targets: Tensor, num_classes: int, ignore_index: int, axis: str) -> Tensor:
    losses, _ = torch.ops.moec.cross_entropy_part_totals(logits, targets, num_classes, ignore_index, axis)
    return losses


# logits


def _gather(logits: Tensor, num_classes: int, axis: str) -> Tensor:
    _require_words(logits.shape[-1], num_classes, axis, "gather_vocabulary")
    ranks = axis_size(axis)
    longest = stretch(num_classes, ranks, 0)[1]
    padded = F.pad(logits, (0, longest - logits.shape[-1])).contiguous()
    gathered = c10d.wait_tensor(c10d.all_gather_into_tensor(padded.flatten(), ranks, axis))
    return gathered.view(ranks, *padded.shape).movedim(0, -2).flatten(-2)[..., :num_classes].contiguous()


def _fake_gather(logits: Tensor, num_classes: int, axis: str) -> Tensor:
    return logits.new_empty(*logits.shape[:-1], num_classes)


def _keep_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, _, ctx.axis = inputs
    ctx.held = logits.shape[-1]


def _gather_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.moec.sum_vocabulary(grad, ctx.held, ctx.axis), None, None


def _sum_part(x: Tensor, held: int, axis: str) -> Tensor:
    """This rank's words of the sum of `x` [..., V] over the ranks: what `gather_vocabulary` is transposed."""
    ranks, num_words = axis_size(axis), x.shape[-1]
    longest = stretch(num_words, ranks, 0)[1]
    padded = F.pad(x, (0, ranks * longest - num_words)).unflatten(-1, (ranks, longest)).movedim(-2, 0)
    own = c10d.wait_tensor(c10d.reduce_scatter_tensor(padded.contiguous().flatten(), "sum", ranks, axis))
    return own.view(padded.shape[1:])[..., :held].clone()


def _fake_sum_part(x: Tensor, held: int, axis: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], held)


_LOSS = "Tensor logits, Tensor targets, int num_classes, int ignore_index, str axis"
define(
    "embedding_part(Tensor tokens, Tensor weight, int num_embeddings, str axis, int padding_idx=-1) "
    "-> Tensor",
    _embedding, _fake_embedding,
)  # fmt: skip
define(
    "embedding_part_back(Tensor grad, Tensor tokens, SymInt held, int num_embeddings, str axis, "
    "int padding_idx) -> Tensor",
    _embedding_rows, _fake_rows,
)  # fmt: skip
define(f"cross_entropy_part_totals({_LOSS}) -> (Tensor, Tensor)", _losses, _fake_losses)
define(
    "cross_entropy_part_back(Tensor grad, Tensor logits, Tensor targets, Tensor total, int num_classes, "
    "int ignore_index, str axis) -> Tensor",
    _logits_gradient, _fake_logits_gradient,
)  # fmt: skip
define_composite(f"cross_entropy_part({_LOSS}) -> Tensor", _cross_entropy)
define("gather_vocabulary(Tensor logits, int num_classes, str axis) -> Tensor", _gather, _fake_gather)
define("sum_vocabulary(Tensor x, SymInt held, str axis) -> Tensor", _sum_part, _fake_sum_part)
differentiate("embedding_part", _keep_tokens, _embedding_back)
differentiate("cross_entropy_part_totals", _keep_losses, _losses_back)
differentiate("gather_vocabulary", _keep_gather, _gather_back)


def _embedding_price(call: Call) -> Price:
    """Rows are looked up, and those of others' words zeroed; the gradient of the part is written whole."""
    out, tokens = call.result_bytes(), call.bytes("tokens")
    forward = Work((), 2 * out + tokens, 2 * out, 2)
    if not call.needs_grad("weight"):
        return Price(forward)
    return Price(forward, Work((), out + tokens, 2 * call.bytes("weight") + out, 2))


price("embedding_part", _embedding_price)
