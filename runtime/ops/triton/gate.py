"""`moec::gate` in two kernels, or, for a batch of many tokens, four.

`_scores` multiplies x with the router in float32 (a long sum of few tokens is cut into parts). `_choose`
takes the largest K of each row one after the other, weighs them, and counts: where a token stands among those
of its block that chose the same expert. A batch of one block gets its table there and then. Otherwise
`_offsets` adds up the blocks' counts for each expert and `_place` writes the table: a counting sort, stable
because a slot's place is computed from those before it and not taken from a counter that programs race for.

What is left to the plain operators: Gumbel noise, and capacities (see `refusal`). On a GPU they read nothing
back to the host either.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moec.runtime.ops.gate import Gated
from moec.runtime.ops.route import check_route
from moec.runtime.ops.router import check_router
from moec.runtime.ops.triton.launch import SIXTEEN_BITS, demand_device, launch, power_of_two, precision

_FEW_TOKENS = 16
_MOST_EXPERTS = 1024


def refusal(x: Tensor, router: Tensor, noise: str, training: bool, factor: float) -> str:
    """Why a call is not one for these kernels; '' when it is. `factor`: the capacity factor that holds."""
    if noise != "none" and training:
        return f"noise '{noise}' while training"
    if factor > 0.0:
        return f"capacity factor {factor}"
    if torch.float64 in (x.dtype, router.dtype):
        return "float64"
    if router.shape[0] > _MOST_EXPERTS:
        return f"{router.shape[0]} experts, more than {_MOST_EXPERTS}"
    return ""


def gate(x: Tensor, router: Tensor, bias: Tensor | None, top_k: int, gate: str) -> Gated:
    """scores f32 [T, E], weights f32 [T, K], experts i64 [T, K], order i64 [N], counts i64 [E]: dropless, as
    `moec::gate` without noise."""
    check_router(x, router)
    demand_device("gate", x)
    parts_STE = _scores_in_parts(x, router)
    scores_TE = parts_STE[0] if parts_STE.shape[0] == 1 else torch.empty_like(parts_STE[0])
    check_route(scores_TE, bias, top_k, gate, "none")
    tokens, experts = scores_TE.shape
    padded = power_of_two(experts, 2)
    height = max(1, min(64, 4096 // padded, power_of_two(tokens)))
    blocks = triton.cdiv(tokens, height)
    made = _Table(x.device, tokens, experts, top_k, blocks)
    launch(
        _choose, (blocks,),
        parts_STE, scores_TE, scores_TE if bias is None else bias, made.weights, made.experts, made.places,
        made.block_counts, made.order, made.counts, tokens, experts, tokens * experts,
        parts_STE.shape[0], top_k, power_of_two(top_k), gate, bias is not None, blocks == 1, height, padded,
        num_warps=8 if height * padded >= 4096 else 4,
    )  # fmt: skip
    if blocks != 1:
        _fill(made, experts, blocks, height * top_k)
    return scores_TE, made.weights, made.experts, made.order, made.counts


class _Table:
    """The results, and what is counted on the way."""

    def __init__(self, device: torch.device, tokens: int, experts: int, top_k: int, blocks: int) -> None:
        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        self.weights = empty(tokens, top_k, dtype=torch.float32)
        self.experts = empty(tokens, top_k, dtype=torch.int64)
        self.order = empty(tokens * top_k, dtype=torch.int64)
        # With no token nothing is launched, and nothing is counted.
        self.counts = torch.zeros(experts, dtype=torch.int64, device=device)
        self.places = empty(tokens, top_k, dtype=torch.int32)
        self.block_counts = empty(blocks, experts, dtype=torch.int32)


def _scores_in_parts(x: Tensor, router: Tensor) -> Tensor:
    """Scores [S, T, E] in S parts to be added: several when a few programs would have to read all of it."""
    (tokens, depth), experts = x.shape, router.shape[0]
    together = x.dtype == router.dtype and x.dtype in SIXTEEN_BITS
    few = tokens <= _FEW_TOKENS
    height = power_of_two(tokens, 16) if few else 64
    width = 16 if few else power_of_two(min(experts, 128 if together else 64), 16)
    step = min(256 if few else 64 if together else 32, power_of_two(depth, 16))
    splits = min(8, triton.cdiv(depth, 2 * step)) if few else 1
    part = triton.cdiv(triton.cdiv(depth, splits), step) * step
    out = torch.empty(splits, tokens, experts, dtype=torch.float32, device=x.device)
    launch(
        _scores, (triton.cdiv(tokens, height), triton.cdiv(experts, width), splits),
        x, router, out, tokens, experts, depth, part, tokens * experts, *x.stride(), *router.stride(),
        not together, precision(torch.float32), min(height, 64), width, step, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


def _fill(made: _Table, experts: int, blocks: int, slots_of_a_block: int) -> None:
    """Write `order` and `counts` from what the blocks counted."""
    few, slots = 8, made.order.shape[0]
    launch(
        _offsets, (triton.cdiv(experts, few),), made.block_counts, made.counts, blocks, experts, 128, few,
        num_warps=4,
    )  # fmt: skip
    padded = power_of_two(experts, 2)
    size = max(16, min(256, 8192 // padded))
    launch(
        _place, (triton.cdiv(slots, size),),
        made.experts, made.places, made.block_counts, made.counts, made.order, slots, experts,
        slots_of_a_block, padded, size, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _scores(
    x, router, out, tokens, experts, depth, part, part_size, x_row, x_column, router_row, router_column,
    WIDEN: tl.constexpr, INPUT: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    expert = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    begin = tl.program_id(2) * part
    rows = x + token.to(tl.int64)[:, None] * x_row
    sums = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for start in range(begin, begin + part, DEPTH):
        k = start + tl.arange(0, DEPTH)
        seen = (token < tokens)[:, None] & (k < depth)[None, :]
        left = tl.load(rows + k[None, :] * x_column, mask=seen, other=0.0)
        places = router + expert[None, :] * router_row + k[:, None] * router_column
        right = tl.load(places, mask=(expert < experts)[None, :] & (k < depth)[:, None], other=0.0)
        if WIDEN:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        sums = tl.dot(left, right, sums, input_precision=INPUT)
    places = out + tl.program_id(2).to(tl.int64) * part_size + token.to(tl.int64)[:, None] * experts
    tl.store(places + expert[None, :], sums, mask=(token < tokens)[:, None] & (expert < experts)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _choose(
    parts, scores_out, bias, weights_out, experts_out, places_out, block_counts, order, counts,
    tokens, experts, part_size,
    SPLITS: tl.constexpr, TOP_K: tl.constexpr, CHOICES: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr,
    ALONE: tl.constexpr, HEIGHT: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    expert = tl.arange(0, EXPERTS)
    choice = tl.arange(0, CHOICES)
    here = token < tokens
    real = (expert < experts)[None, :]
    seen = here[:, None] & real
    places = token.to(tl.int64)[:, None] * experts + expert[None, :]
    scores = tl.zeros((HEIGHT, EXPERTS), tl.float32)
    for split in tl.static_range(SPLITS):
        scores += tl.load(parts + split * part_size + places, mask=seen, other=0.0)
    if SPLITS > 1:
        tl.store(scores_out + places, scores, mask=seen)
    nothing = float("-inf")
    scores = tl.where(real, scores, nothing)
    largest = tl.max(scores, 1)
    powers = tl.exp(scores - largest[:, None])
    total = tl.sum(powers, 1)
    wanted = scores
    if BIAS:
        added = tl.load(bias + expert, mask=expert < experts, other=0.0).to(tl.float32)
        affinity = tl.sigmoid(scores) if GATE == "sigmoid" else powers / total[:, None]
        wanted = affinity + added[None, :]
    # What may be chosen is finite, so that what must not be (a column beyond, one already taken) is less.
    wanted = tl.where(real, tl.maximum(wanted, -3.0e38), nothing)
    taken = tl.zeros((HEIGHT, EXPERTS), tl.int32)
    chosen = tl.full((HEIGHT, CHOICES), nothing, tl.float32)
    chosen_experts = tl.zeros((HEIGHT, CHOICES), tl.int32)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(wanted, 1, tie_break_left=True)
        mine = expert[None, :] == best[:, None]
        score = tl.sum(tl.where(mine, scores, 0.0), 1)
        chosen = tl.where(choice[None, :] == k, score[:, None], chosen)
        chosen_experts = tl.where(choice[None, :] == k, best[:, None], chosen_experts)
        taken += mine.to(tl.int32)
        wanted = tl.where(mine, nothing, wanted)
    if GATE == "probability":
        weights = tl.exp(chosen - largest[:, None]) / total[:, None]
    else:
        if GATE == "sigmoid":
            # log sigmoid(s) = min(s, 0) - log(1 + exp(-|s|))
            chosen = tl.minimum(chosen, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(chosen)))
        rest = tl.exp(chosen - tl.max(chosen, 1)[:, None])
        weights = rest / tl.sum(rest, 1)[:, None]
    slots = token[:, None] * TOP_K + choice[None, :]
    kept = here[:, None] & (choice < TOP_K)[None, :]
    tl.store(weights_out + slots, weights, mask=kept)
    tl.store(experts_out + slots, chosen_experts.to(tl.int64), mask=kept)
    # Which place among those of this block that chose the same expert: a token takes each expert once.
    taken = tl.where(here[:, None], taken, 0)
    before = tl.cumsum(taken, 0) - taken
    count = tl.sum(taken, 0)
    if ALONE:
        before += (tl.cumsum(count, 0) - count)[None, :]
        tl.store(counts + expert, count.to(tl.int64), mask=expert < experts)
    else:
        tl.store(block_counts + tl.program_id(0) * experts + expert, count, mask=expert < experts)
    for k in tl.static_range(TOP_K):
        best = tl.sum(tl.where(choice[None, :] == k, chosen_experts, 0), 1)
        place = tl.sum(tl.where(expert[None, :] == best[:, None], before, 0), 1)
        if ALONE:
            tl.store(order + place, (token * TOP_K + k).to(tl.int64), mask=here)
        else:
            tl.store(places_out + token * TOP_K + k, place, mask=here)


@triton.jit(do_not_specialize=["blocks", "experts"])
def _offsets(block_counts, counts, blocks, experts, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Put in the place of each block's count the sum of those before it; and the sum of all into `counts`."""
    expert = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.int32)
    for start in range(0, blocks, HEIGHT):
        block = start + tl.arange(0, HEIGHT)
        seen = (block < blocks)[:, None] & (expert < experts)[None, :]
        places = block_counts + block[:, None] * experts + expert[None, :]
        count = tl.load(places, mask=seen, other=0)
        tl.store(places, total[None, :] + tl.cumsum(count, 0) - count, mask=seen)
        total += tl.sum(count, 0)
    tl.store(counts + expert, total.to(tl.int64), mask=expert < experts)


@triton.jit(do_not_specialize=["slots", "experts", "slots_of_a_block"])
def _place(
    experts_of, places, block_counts, counts, order, slots, experts, slots_of_a_block,
    EXPERTS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    here = slot < slots
    mine = tl.load(experts_of + slot, mask=here, other=0).to(tl.int32)
    expert = tl.arange(0, EXPERTS)
    count = tl.load(counts + expert, mask=expert < experts, other=0).to(tl.int32)
    start = tl.sum(tl.where(expert[None, :] < mine[:, None], count[None, :], 0), 1)
    before = tl.load(block_counts + slot // slots_of_a_block * experts + mine, mask=here, other=0)
    place = start + before + tl.load(places + slot, mask=here, other=0)
    tl.store(order + place, slot.to(tl.int64), mask=here)
