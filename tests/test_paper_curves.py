"""The paper's curves: what docs/paper.md says is the record, and the record is made as it is said to be."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.eager_trace import EagerTrace
from benchmarks.paper_baseline import Sizes, baseline_cost, expert_operations, one_hot_gate, slots
from benchmarks.paper_curves import RESULTS, key
from benchmarks.paper_deepspeed import deepspeed_cost
from benchmarks.paper_memory import cache_of, weights_of
from benchmarks.paper_models import SERVED, Place, Served, compiled, repeated, total_parameters
from benchmarks.paper_points import POINTS, cluster, host_seconds, starts, step
from benchmarks.paper_tables import rounded, tables
from moec.cost import Cost

DOCS = Path(__file__).parents[1] / "docs" / "paper.md"
TINY = Served("tiny", 10, 64, 4, experts=4, last_two=4)  # repeated: 6 layers, the second pair three times


@cache
def tiny_decoder(layers: int) -> Cost:
    return compiled(TINY, Place(4, 4), layers).cost("decode")


def closed_form(model: Served) -> int:
    """All parameters, from widths alone: written out here, and nowhere else."""
    D, V = model.width, 50257
    attention, norms, feed_forward = 4 * D * D + 4 * D, 4 * D, 8 * D * D + 5 * D
    sparse = model.layers // 2 if model.experts else 0
    dense = model.layers - sparse
    experts = sparse * model.experts * (feed_forward + D)
    return V * D + 2048 * D + 2 * D + model.layers * (attention + norms) + dense * feed_forward + experts


def test_totals_of_the_record_are_those_of_the_widths_and_of_the_paper() -> None:
    totals = json.loads(RESULTS.read_text())["totals"]
    assert totals.keys() == SERVED.keys()
    for name, found in totals.items():
        assert found == closed_form(SERVED[name]), name
    for name in ("24B+MoE-128", "1.3B+MoE-128", "6.7B", "175B", "47B+MoE-128", "8B+MoE-128"):
        assert abs(totals[name] / printed(SERVED[name].total) - 1) < 0.01, name


def printed(total: str) -> float:
    return float(total[:-1]) * {"M": 1e6, "B": 1e9, "T": 1e12}[total[-1]]


def test_a_total_of_short_programs_is_that_of_the_whole_one() -> None:
    assert total_parameters(TINY) == compiled(TINY).num_parameters() == closed_form(TINY)


def test_repeated_layers_cost_what_the_whole_program_does() -> None:
    """Operation by operator, with what it reads: 6 layers, the second pair three times, are 10 layers."""
    folded, whole = repeated(tiny_decoder(6), 3), tiny_decoder(10)
    assert len(folded.operations) == len(whole.operations)
    assert [one.kind for one in folded.operations].count("attention") == TINY.layers
    for one, other in zip(folded.operations, whole.operations, strict=True):
        assert (one.operator, one.forward, one.sends) == (other.operator, other.forward, other.sends)
        assert (one.after, one.weights) == (other.after, other.weights)


def test_layers_that_differ_are_not_repeated() -> None:
    first, *rest = tiny_decoder(6).operations
    spoilt = [
        replace(one, operator="aten::relu") if one.region == "attention_0" else one for one in (first, *rest)
    ]
    with pytest.raises(ValueError, match="other operations"):
        repeated(replace(tiny_decoder(6), operations=tuple(spoilt)), 2)


def test_the_traced_gate_and_einsums_do_what_torch_counts() -> None:
    """A written-out one-hot layer under torch's own counter, and the same traced."""
    T, E, C, D = 8, 16, 4, 32
    x_TD, router = (torch.empty(shape, device="meta") for shape in ((T, D), (E, D)))

    def layer() -> None:
        table_TEC, used_TEC = one_hot_gate(x_TD @ router.T, C)
        slots_ECD = torch.einsum("tec,td->ecd", used_TEC.float(), x_TD)
        torch.einsum("tec,ecd->td", table_TEC, slots_ECD)

    with FlopCounterMode(display=False) as counter:
        layer()
    trace = EagerTrace("moe_1", 1)
    with trace:
        layer()
    traced = sum(one.forward.flops for one in trace.operations)
    # The paper's S · E · M · c for each of the two einsums, two operations each, and the router.
    assert traced == counter.get_total_flops() == 2 * (2 * T * E * C * D) + 2 * T * E * D


def test_the_baseline_exchanges_and_multiplies_all_slots() -> None:
    D, E, R = 64, 16, 4
    sizes = Sizes(8, 32, D, 4, E, "expert_4", R, 1)
    operations = expert_operations(sizes, 1)
    (there, back) = [one.sends[0] for one in operations if one.sends]
    assert there == back
    assert there.bytes == 2 * E * slots(8, E) * D * (R - 1) / R
    rows = R * slots(8, E)  # of every local expert, whoever sent them, used or not
    experts = [p for one in operations for p in one.forward.products if 4 * D in (p.n, p.k)]
    assert len(experts) == 2 * E // R
    assert {p.m for p in experts} == {rows}


def test_the_traced_layer_reads_each_of_its_weights_once() -> None:
    sizes = Sizes(8, 32, 64, 4, 16, "expert_4", 4, 1)
    read = sum(one.weights for one in expert_operations(sizes, 1))
    # Up and down, with their biases, of 4 local experts; the norm; the router, which is first made float32.
    assert read == 2 * (4 * (8 * 64 * 64 + 5 * 64) + 2 * 64 + 16 * 64)


def test_deepspeed_reads_every_local_expert_and_sends_all_slots() -> None:
    cost = deepspeed_cost(TINY, tiny_decoder(6), 8)
    ups = [one for one in cost.operations if one.name == "moe_1.up"]
    assert len(ups) == TINY.experts // 4
    sent = [one.sends[0].bytes for one in cost.operations if one.operator == "deepspeed::all_to_all_single"]
    assert sent == [2 * TINY.experts * slots(8, TINY.experts) * TINY.width * 3 / 4] * 6
    assert all(one.after == ((i - 1,) if i else ()) for i, one in enumerate(cost.operations))


def test_weights_and_cache_are_those_of_the_program() -> None:
    program, cost = compiled(TINY, Place(4, 4), 6), tiny_decoder(6)
    held = dict(program.partition(0).named_parameters()).values()
    assert weights_of(cost) == sum(weight.numel() * weight.itemsize for weight in held)
    assert cache_of(replace(TINY, layers=6)) == cost.number(cost.memory.cache, B=8, L=256, n=1, m=1)


def test_an_eager_baseline_takes_at_least_what_its_host_does() -> None:
    cost = baseline_cost(TINY, Place(4, 4), 8, 256)
    eager, captured = (step(cost, cluster(4), captured=captured).seconds for captured in (False, True))
    assert captured < starts(cost) * host_seconds() <= eager
    assert cluster(4).device.host == host_seconds()


def test_the_page_shows_the_record() -> None:
    record, text = json.loads(RESULTS.read_text()), DOCS.read_text()
    assert record["points"].keys() == {key(point) for point in POINTS}
    for name, table in tables(record).items():
        assert table in text, name


def test_totals_are_rounded_as_the_paper_prints_them() -> None:
    assert rounded(1_046_920_000_000, "1046.9B") == "1046.9B"
    assert rounded(354_871_296, "350M") == "355M"
