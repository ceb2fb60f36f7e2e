"""Predictions: numbers for letters, operations in time, and what no schedule may do."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.cost import Cost, Hardware, Link, Operation, Prediction, Sending, predict, symbol
from moec.cost.step.phases import TrainingStep
from moec.cost.timing.schedule import DEVICE, Job, longest, schedule
from moec.errors import CostError, MeshError, PlanError
from moec.ir.mesh import ExpertAxes, Mesh
from moec.runtime.ops.work import NOTHING, Product, Work
from tests.cost.clusters import clusters

B, S = symbol("B"), symbol("S")
MESH = Mesh(2, 2, 2, (("moe_1", ExpertAxes(1, 4)),))
WAIT = "_c10d_functional::wait_tensor"


def compute(name: str = "one", seconds: float = 1.0, after: tuple[int, ...] = ()) -> Operation:
    """Takes so long on `simple()`."""
    work = Work((), seconds, 0)
    return Operation(name, "ffn_0", 0, "aten::gelu", "pointwise", "float32", work, work, after=after)


def send(name: str = "sent", num_bytes: float = 1.0, after: tuple[int, ...] = ()) -> Operation:
    """One message along `tensor`, which has two ranks."""
    sends = (Sending("tensor", "moec.exchange", 1, num_bytes),)
    return Operation(
        name,
        "moe_1",
        1,
        "moec::exchange",
        "collective",
        "float32",
        sends=sends,
        sends_back=sends,
        after=after,
    )


def wait(start: int, name: str = "awaited") -> Operation:
    return Operation(name, "moe_1", 1, WAIT, "collective", "float32", after=(start,))


def simple(**more: object) -> Hardware:
    """A byte is a second, on links and in memory; nothing else takes any time."""
    device = Hardware.shipped("a100").device.model_copy(
        update={
            "bandwidth": 1.0,
            "memory_share": 1.0,
            "launch": 0.0,
            "host": 0.0,
            "cache_bandwidth": None,
            "tiles": (),
            "product_share": 1.0,
            "peak": {"float32": 1.0},
            **more,
        }
    )
    link = Link(latency=0.0, bandwidth=1.0)
    return Hardware(device=device, inside=link, between=link, per_node=2, nodes=2)


def times(prediction: Prediction) -> list[tuple[str, float, float]]:
    return [(step.operation.name, step.begin, step.end) for step in prediction.timeline]


def test_what_is_sent_overlaps_with_what_stands_before_its_end() -> None:
    operations = (compute("a"), send(after=(0,)), compute("b"), wait(1), compute("c", after=(3,)))
    found = predict(Cost(operations, "forward", MESH), simple())
    assert times(found) == [
        ("a", 0, 1),
        ("sent", 1, 2),
        ("b", 1, 2),
        ("awaited", 2, 2),
        ("c", 2, 3),
    ]
    assert (found.seconds, found.communication, found.exposed, found.idle) == (3, 1, 0, 0)


def test_what_is_longer_on_the_way_is_exposed() -> None:
    operations = (compute("a"), send(num_bytes=3, after=(0,)), compute("b"), wait(1), compute("c"))
    found = predict(Cost(operations, "forward", MESH), simple())
    assert (found.seconds, found.communication, found.exposed) == (5, 3, 2)
    assert [step.operation.name for step in found.critical] == ["a", "sent", "awaited", "c"]


def test_a_result_that_is_read_without_a_wait_is_waited_for() -> None:
    operations = (send(num_bytes=3), compute("b", after=(0,)))
    found = predict(Cost(operations, "forward", MESH), simple())
    assert times(found)[1] == ("b", 3, 4)


def test_a_kernel_that_awaits_its_own_collective_holds_the_device() -> None:
    operations = (send(num_bytes=3), compute("b"))
    found = predict(Cost(operations, "forward", MESH), simple())
    assert times(found) == [("sent", 0, 3), ("b", 3, 4)]


def test_inside_and_between_are_links_of_their_own() -> None:
    far = replace(send("far", 4.0), sends=(Sending("data", "moec.exchange", 1, 4.0),))
    operations = (send("near", 4.0), far, send("near again", 4.0), wait(0), wait(1), wait(2))
    found = predict(Cost(operations, "forward", MESH), simple())
    assert times(found)[:3] == [("near", 0, 4), ("far", 0, 4), ("near again", 4, 8)]
    assert found.by("stream") == {"inside": 8, "between": 4, DEVICE: 0}
    assert found.by("axis") == {"tensor": 8, "data": 4}


def test_backward_goes_back_without_overlap_and_the_optimizer_comes_last() -> None:
    last = replace(compute("update", 5), kind="optimizer", region="optimizer", backward=NOTHING)
    operations = (compute("a", 1), send(num_bytes=2, after=(0,)), compute("b", 3), wait(1), last)
    found = predict(Cost(operations, "training", MESH), simple())
    back = [step.operation.name for step in found.timeline if step.direction == "backward"]
    assert back == ["b", "sent", "a"]
    assert found.seconds == (1 + 3) + (3 + 2 + 1) + 5
    assert found.by("direction") == {"forward": 1 + 2 + 3 + 5, "backward": 6}
    assert found.timeline[-1].operation.name == "update"


def test_a_step_in_parts_goes_there_and_back_for_each_and_updates_once() -> None:
    last = replace(compute("update", 5), kind="optimizer", region="optimizer", backward=NOTHING)
    cost = Cost((compute("a", 1), compute("b", 2), last), "training", MESH)
    once, thrice = (predict(replace(cost, step=TrainingStep(parts)), simple()) for parts in (1, 3))
    assert (once.seconds, thrice.seconds) == (2 * 3 + 5, 3 * 2 * 3 + 5)


def test_operations_alone_tell_no_memory() -> None:
    found = predict(Cost((compute(),), "forward", MESH), simple())
    with pytest.raises(CostError, match="operations alone"):
        _ = found.memory


def test_a_slow_host_holds_everything_up_until_the_program_is_captured() -> None:
    operations = tuple(compute(str(index), 1) for index in range(4))
    cost = Cost(operations, "forward", MESH)
    eager = predict(cost, simple(host=2.0))
    assert times(eager)[0] == ("0", 2, 3)
    assert (eager.seconds, eager.idle) == (4 * 2 + 1, 5)
    assert predict(cost, simple(host=0.25)).seconds == 0.25 + 4
    assert predict(cost, simple(host=2.0), captured=True).seconds == 4


def test_a_host_that_reads_how_many_rows_go_waits_for_the_device() -> None:
    """It would have been ahead: after the exchange it starts all over."""
    cost = Cost((compute("a", 9), send(num_bytes=1, after=(0,)), compute("b"), wait(1)), "forward", MESH)
    eager = predict(cost, simple(host=1.0))
    assert times(eager) == [("a", 1, 10), ("sent", 11, 12), ("b", 12, 13), ("awaited", 13, 13)]
    assert [step.operation.name for step in eager.critical] == ["a", "b"]
    assert predict(cost, simple(host=1.0), captured=True).seconds == 9 + 1


def test_views_take_the_host_and_not_the_device() -> None:
    view = replace(compute("view"), kind="view", forward=NOTHING, backward=NOTHING)
    cost = Cost((view, view, compute()), "forward", MESH)
    assert predict(cost, simple(host=2.0)).seconds == 3 * 2 + 1
    assert predict(cost, simple()).seconds == 1


def test_shares_are_of_the_peak_of_the_dtype_and_of_memory() -> None:
    one = replace(compute(), forward=Work((Product(2, 3, 5),), 30, 0))
    other = replace(one, dtype="bfloat16")
    hardware = simple(peak={"float32": 4.0, "bfloat16": 12.0, "int8": 1e6})
    found = predict(Cost((one, other), "forward", MESH), hardware)
    assert (found.flops, found.seconds) == (120, 60)
    assert found.flops_share == pytest.approx((60 / 4 + 60 / 12) / 60)
    assert found.bandwidth_share == 1


def test_what_it_says() -> None:
    operations = (compute("a"), send(num_bytes=3, after=(0,)), wait(1), compute("c"))
    text = str(predict(Cost(operations, "forward", MESH), simple(host=0.5), B=8))
    assert text.startswith("forward on A100-SXM4-40GB, B = 8")
    assert "collective" in text
    assert "only links are at work" in text


def test_a_trace_holds_what_takes_time(tmp_path: Path) -> None:
    operations = (compute("a"), send(num_bytes=3, after=(0,)), wait(1))
    predict(Cost(operations, "forward", MESH), simple()).save_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [(event["name"], event["tid"], event["ts"], event["dur"]) for event in events] == [
        ("a", "device", 0, 1e6),
        ("sent", "inside", 1e6, 3e6),
    ]


def test_what_is_missing_or_does_not_fit_is_refused() -> None:
    work = Work((Product(B, S, 4),), B, 0)
    cost = Cost((replace(compute(), forward=work),), "forward", MESH)
    with pytest.raises(CostError, match="tokens of a sequence"):
        predict(cost, simple(), B=8)
    with pytest.raises(MeshError, match="8, one for each rank"):
        predict(cost, simple(), B=8, S=2, data=4)
    with pytest.raises(PlanError, match="bfloat16"):
        predict(
            replace(cost, operations=(replace(cost.operations[0], dtype="bfloat16"),)), simple(), B=8, S=2
        )
    with pytest.raises(CostError, match="kind"):
        predict(cost, simple(), B=8, S=2).by("kynd")
    assert predict(cost, simple(), B=8, S=2).flops == 2 * 8 * 2 * 4


sizes = st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0])


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Operation, ...]:
    """Operations that compute, send at once, or start and end what they send, in any order that a graph may
    have."""
    made: list[Operation] = []
    open_: list[int] = []
    for index in range(draw(st.integers(1, 14))):
        readable = [at for at in range(index) if at not in open_]
        after = tuple(sorted(draw(st.sets(st.sampled_from(readable), max_size=3)))) if readable else ()
        what = draw(st.sampled_from(["compute", "compute", "start", "end"]))
        if what == "end" and open_:
            made.append(wait(open_.pop(draw(st.integers(0, len(open_) - 1)))))
        elif what == "start":
            axis, seconds = draw(st.sampled_from(["tensor", "data", "expert_4"])), draw(sizes)
            sends = (Sending(axis, "moec.exchange", 1, seconds),)
            made.append(replace(send(str(index), after=after), sends=sends, sends_back=sends))
            open_.append(index)
        else:
            made.append(compute(str(index), draw(sizes), after))
    made += [wait(start) for start in open_]
    return tuple(made)


@given(graphs(), clusters(2), st.sampled_from(["forward", "training"]), st.booleans())
def test_no_schedule_is_longer_than_one_after_the_other_or_shorter_than_its_parts(
    operations: tuple[Operation, ...], hardware: Hardware, phase: str, captured: bool
) -> None:
    cost = Cost(operations, phase, MESH)
    hardware = hardware.model_copy(update={"per_node": 2, "nodes": 2, "cards": None})
    found = predict(cost, hardware, captured=captured)
    streams = found.by("stream")
    host = 0.0 if captured else hardware.device.host * 2 * len(operations)
    assert found.seconds <= (sum(streams.values()) + host) * (1 + 1e-9) + 1e-15
    for seconds in streams.values():
        assert found.seconds >= seconds * (1 - 1e-9)
    assert 0 <= found.exposed <= found.communication * (1 + 1e-9)
    assert found.idle >= -1e-12
    if not captured:
        assert predict(cost, hardware, captured=True).seconds <= found.seconds * (1 + 1e-9)


@given(graphs(), clusters(2))
def test_everything_waits_for_what_it_reads_and_streams_do_one_thing_at_a_time(
    operations: tuple[Operation, ...], hardware: Hardware
) -> None:
    hardware = hardware.model_copy(update={"per_node": 2, "nodes": 2, "cards": None})
    found = predict(Cost(operations, "forward", MESH), hardware)
    ends: dict[int, float] = {}
    for step in found.timeline:
        index = next(i for i, one in enumerate(operations) if one is step.operation)
        ends[index] = max(ends.get(index, 0.0), step.end)
        assert all(step.begin >= ends[before] for before in step.operation.after)
    for stream in {step.stream for step in found.timeline}:
        own = [step for step in found.timeline if step.stream == stream]
        assert all(later.begin >= former.end for former, later in itertools.pairwise(own))
    way = found.critical
    assert way[-1].end == found.seconds
    assert all(later.begin >= former.end for former, later in itertools.pairwise(way))
    if not hardware.device.host:
        assert all(later.begin == former.end for former, later in itertools.pairwise(way))


@given(graphs(), clusters(2))
def test_where_all_is_awaited_at_once_nothing_overlaps(
    operations: tuple[Operation, ...], hardware: Hardware
) -> None:
    hardware = hardware.model_copy(update={"per_node": 2, "nodes": 2, "cards": None})
    at_once = tuple(replace(one, after=()) for one in operations if one.operator != WAIT)
    found = predict(Cost(at_once, "forward", MESH), hardware, captured=True)
    assert found.seconds == pytest.approx(sum(found.by("stream").values()))
    assert found.exposed == pytest.approx(found.communication)


@given(graphs(), clusters(2), st.floats(1.0, 10.0))
def test_faster_hardware_is_never_slower(
    operations: tuple[Operation, ...], hardware: Hardware, factor: float
) -> None:
    hardware = hardware.model_copy(update={"per_node": 2, "nodes": 2, "cards": None})
    cost = Cost(operations, "training", MESH)
    before = predict(cost, hardware).seconds * (1 + 1e-9)
    device = hardware.device
    for update in (
        {"device": device.model_copy(update={"bandwidth": device.bandwidth * factor})},
        {
            "device": device.model_copy(
                update={"host": device.host / factor, "launch": device.launch / factor}
            )
        },
        {"inside": hardware.inside.model_copy(update={"bandwidth": hardware.inside.bandwidth * factor})},
    ):
        assert predict(cost, hardware.model_copy(update=update)).seconds <= before


jobs = st.lists(
    st.builds(Job, st.sampled_from([DEVICE, "inside", "between"]), sizes, sizes, holds=st.booleans()),
    max_size=12,
)


@given(jobs, st.integers(0, 11), sizes)
def test_a_longer_job_makes_nothing_end_earlier(given_: list[Job], which: int, more: float) -> None:
    if which >= len(given_):
        return
    longer = list(given_)
    longer[which] = replace(longer[which], seconds=longer[which].seconds + more)
    for before, after in zip(schedule(given_), schedule(longer), strict=True):
        assert after.end >= before.end
    assert len(longest(schedule(given_))) <= len(given_)


def test_an_empty_program_takes_no_time() -> None:
    found = predict(Cost((), "forward", MESH), simple())
    assert (found.seconds, found.critical, found.flops_share, found.exposed) == (0.0, (), 0.0, 0)
