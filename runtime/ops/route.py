"""`moec::route`: choose experts for each token, and weigh them.

    route(scores [T,E], bias [E]?, top_k, gate, noise, training) -> weights [T,K], experts [T,K] i64

Affinity is softmax(scores), or sigmoid(scores) for the gate `sigmoid`. Selection takes the largest `top_k` of
affinity + bias; the bias never touches the weights (DeepSeek-V3, auxiliary-loss-free balancing).

    probability        w = p                            DeepSpeed's top-1 gate; does not sum to one
    normalized         w = p / sum of chosen p
    straight-through   forward as normalized, held constant; backward through p / stop_gradient(p)
    sigmoid            w = s / sum of chosen s

**Ties go to the lower expert index**, on every device: `argmax` gives the first maximum, the sort is stable.
Without a bias the raw scores are compared, not the affinities, so rounding in softmax or sigmoid (underflow
to 0, saturation at 1) cannot create or reorder ties, and a choice does not depend on the rest of the batch.

Weights come in float32 for float32, bfloat16 and float16 scores and in float64 for float64 scores.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moec.errors import nearest
from moec.runtime.ops.draws import gumbel_like
from moec.runtime.ops.overhear import tell
from moec.runtime.ops.registry import define, demand, differentiate, wide

GATES = ("probability", "normalized", "straight-through", "sigmoid")
NOISES = ("none", "rsample")


def check_route(scores: Tensor, bias: Tensor | None, top_k: int, gate: str, noise: str) -> None:
    """Raise an `OperatorError` for arguments that `moec::route` cannot mean anything by."""
    demand(scores.dim() == 2, "route", f"scores with {scores.dim()} dimensions", "scores [T, E]")
    demand(scores.is_floating_point(), "route", f"scores of {scores.dtype}", "floating-point scores")
    experts = scores.shape[1]
    demand(1 <= top_k <= experts, "route", f"top_k {top_k} with {experts} experts", "1 <= top_k <= experts")
    _demand_word("gate", gate, GATES)
    _demand_word("noise", noise, NOISES)
    shaped = bias is None or (bias.dim() == 1 and bias.shape[0] == experts)
    demand(shaped, "route", f"bias {[] if bias is None else list(bias.shape)}", f"bias [{experts}]")


def _demand_word(what: str, word: str, words: tuple[str, ...]) -> None:
    if word not in words:  # looking for the nearest one takes longer than routing a token does
        demand(False, "route", f"{what} '{word}'", f"one of {', '.join(words)}", nearest(word, words))


def _route(
    scores: Tensor, bias: Tensor | None, top_k: int, gate: str, noise: str, training: bool
) -> tuple[Tensor, Tensor]:
    check_route(scores, bias, top_k, gate, noise)
    scores_TE = scores.to(wide(scores.dtype))
    tell(scores_TE, gate)
    noisy_TE = scores_TE + gumbel_like(scores_TE) if noise == "rsample" and training else scores_TE
    experts_TK = _largest(_selection(noisy_TE, bias, gate), top_k)
    return _weigh(scores_TE, experts_TK, gate), experts_TK


def _selection(scores_TE: Tensor, bias: Tensor | None, gate: str) -> Tensor:
    if bias is None:
        return scores_TE
    affinity_TE = scores_TE.sigmoid() if gate == "sigmoid" else scores_TE.softmax(-1)
    return affinity_TE + bias.to(affinity_TE.dtype)


def _largest(selection_TE: Tensor, top_k: int) -> Tensor:
    if top_k == 1:
        return selection_TE.argmax(-1, keepdim=True)
    order_TE = torch.sort(selection_TE, dim=-1, descending=True, stable=True).indices
    return order_TE[:, :top_k].contiguous()


def _weigh(scores_TE: Tensor, experts_TK: Tensor, gate: str) -> Tensor:
    if gate == "probability":
        return scores_TE.softmax(-1).gather(1, experts_TK)
    chosen_TK = scores_TE.gather(1, experts_TK)
    # A ratio of affinities is a softmax of their logarithms: no 0/0 when every chosen affinity underflows.
    return (F.logsigmoid(chosen_TK) if gate == "sigmoid" else chosen_TK).softmax(-1)


def _fake(
    scores: Tensor, bias: Tensor | None, top_k: int, gate: str, noise: str, training: bool
) -> tuple[Tensor, Tensor]:
    check_route(scores, bias, top_k, gate, noise)
    shape = (scores.shape[0], top_k)
    return scores.new_empty(shape, dtype=wide(scores.dtype)), scores.new_empty(shape, dtype=torch.int64)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], *output)
    ctx.gate = inputs[3]


def _backward(ctx: Any, grad_TK: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    scores, weights_TK, experts_TK = ctx.saved_tensors
    return route_backward(scores, weights_TK, experts_TK, grad_TK, ctx.gate), *[None] * 5


def route_backward(scores: Tensor, weights: Tensor, experts: Tensor, grad: Tensor, gate: str) -> Tensor:
    """The gradient of `scores` [T,E] for `grad` [T,K] at the weights that `gate` gave `experts`."""
    through = _through_softmax if gate in ("probability", "straight-through") else _through_chosen
    return through(scores.to(weights.dtype), weights, experts, grad, gate).to(scores.dtype)


def _through_softmax(scores_TE: Tensor, w_TK: Tensor, experts_TK: Tensor, grad_TK: Tensor, _: str) -> Tensor:
    # Both w = p and w = c * p / stop_gradient(p) have dw_k / ds_j = w_k * (delta_kj - p_j).
    pull_TK = w_TK * grad_TK
    spread_TE = -scores_TE.softmax(-1) * pull_TK.sum(-1, keepdim=True)
    return spread_TE.scatter_add(1, experts_TK, pull_TK)


def _through_chosen(
    scores_TE: Tensor, w_TK: Tensor, experts_TK: Tensor, grad_TK: Tensor, gate: str
) -> Tensor:
    pull_TK = w_TK * grad_TK
    pull_TK = pull_TK - w_TK * pull_TK.sum(-1, keepdim=True)
    if gate == "sigmoid":
        pull_TK = pull_TK * torch.sigmoid(-scores_TE.gather(1, experts_TK))
    return torch.zeros_like(scores_TE).scatter(1, experts_TK, pull_TK)


define(
    "route(Tensor scores, Tensor? bias, int top_k, str gate, str noise, bool training) -> (Tensor, Tensor)",
    _route,
    _fake,
    random=True,
)
differentiate("route", _setup, _backward)
