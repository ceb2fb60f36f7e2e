"""When a teacher falls silent, against a plain table of all steps; and what a resumed run knows of it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import PlanError
from moec.plan import Distill
from moec.runtime.distillation.stages import Ending, Stages


@dataclass(frozen=True)
class Run:
    """Settings of a run, and what each evaluation finds."""

    distill: Distill
    steps: int
    eval_every: int
    losses: tuple[float, ...]

    def loss_after(self, step: int) -> float | None:
        """The held-out loss after `step` steps, where it is measured."""
        return self.losses[step // self.eval_every - 1] if step % self.eval_every == 0 else None


@st.composite
def runs(draw: st.DrawFn) -> Run:
    steps = draw(st.integers(1, 40))
    distill = Distill(
        stop=draw(st.sampled_from((0.0, 0.01, 0.25, 0.5, 0.7, 0.99, 1.0)) | st.floats(0, 1)),
        stop_step=draw(st.none() | st.integers(0, steps)),
        patience=draw(st.none() | st.integers(1, 4)),
    )
    every = draw(st.integers(1, 6))
    number = steps // every
    values = st.sampled_from((1.0, 2.0, 3.0, math.inf, math.nan)) | st.floats(0, 10)
    return Run(distill, steps, every, tuple(draw(st.lists(values, min_size=number, max_size=number))))


def table(run: Run) -> list[bool]:
    """For each step whether the teacher speaks: the definition, step by step."""
    told: list[bool] = []
    seen: list[float] = []
    silent = False
    for step in range(run.steps):
        at = run.distill.stop_step
        # a step is taught while at least half of it lies before the fraction (a tie goes to the even number)
        in_time = step < run.distill.stop * run.steps - 0.5 or (
            step == run.distill.stop * run.steps - 0.5 and step % 2 == 1
        )
        told.append(in_time and (at is None or step < at) and not silent)
        loss = run.loss_after(step + 1)
        if loss is not None:
            seen.append(loss)
            silent = silent or waited(seen) == run.distill.patience
    return told


def waited(losses: list[float]) -> int:
    """The evaluations since the last one that was below all before it."""
    best = [i for i, loss in enumerate(losses) if all(loss < other for other in losses[:i] if other == other)]
    best = [i for i in best if losses[i] < math.inf]
    return len(losses) - 1 - best[-1] if best else len(losses)


def take(stages: Stages, run: Run, first: int, last: int) -> list[bool]:
    """Go through some steps; for each, whether the teacher speaks."""
    told = []
    for step in range(first, last):
        told.append(stages.teaches(step))
        loss = run.loss_after(step + 1)
        if loss is not None:
            stages.observe(step + 1, loss)
    return told


@given(runs())
def test_stages_are_those_of_the_table(run: Run) -> None:
    stages = Stages(run.distill, run.steps)
    expected = table(run)
    assert take(stages, run, 0, run.steps) == expected
    # once silent, always silent; and `last` is the number of steps that it spoke in
    assert expected == sorted(expected, reverse=True)
    assert min(stages.last, run.steps) == sum(expected)
    ending = stages.ending(run.steps)
    assert (ending is None) == all(expected)
    assert ending is None or ending.step == sum(expected)


@given(runs(), st.data())
def test_a_resumed_run_has_the_same_stages(run: Run, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, run.steps), "stopped after")
    first = Stages(run.distill, run.steps)
    told = take(first, run, 0, cut)
    second = Stages(run.distill, run.steps)
    second.restore(json.loads(json.dumps(first.record(), allow_nan=False)), cut)
    told += take(second, run, cut, run.steps)
    assert told == table(run)
    take(first, run, cut, run.steps)
    assert second.record() == first.record()
    assert second.ending(run.steps) == first.ending(run.steps)


@given(runs(), st.integers(1, 60), st.data())
def test_another_number_of_steps_leaves_what_happened(run: Run, steps: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, min(run.steps, steps)), "stopped after")
    first = Stages(run.distill, run.steps)
    told = take(first, run, 0, cut)
    if run.distill.stop_step is not None and run.distill.stop_step > steps:
        return
    second = Stages(run.distill, steps)
    planned = second.last
    second.restore(first.record(), cut)
    given_up = first.record()["setting"] == "patience"
    if not all(told) or given_up:
        assert not any(second.teaches(step) for step in range(cut, steps))
        assert second.last == first.last
    else:
        assert [second.teaches(step) for step in range(cut, steps)] == [
            step < planned for step in range(cut, steps)
        ]
        assert second.last == max(planned, cut)


@pytest.mark.parametrize(
    ("how", "ending"),
    [
        ({"stop": 0.7}, Ending(7, "stop = 0.7")),
        ({"stop": 0.0}, Ending(0, "stop = 0.0")),
        ({"stop": 0.25}, Ending(2, "stop = 0.25")),  # 2.5 steps: the even one
        ({"stop": 0.35}, Ending(4, "stop = 0.35")),  # 3.5
        ({"stop": 0.7, "stop_step": 3}, Ending(3, "stop_step = 3")),
        ({"stop": 0.7, "stop_step": 8}, Ending(7, "stop = 0.7")),
        ({"stop_step": 10}, None),
        ({}, None),
    ],
)
def test_how_a_teacher_falls_silent(how: dict[str, float], ending: Ending | None) -> None:
    stages = Stages(Distill(**how), 10)
    assert stages.ending(10) == ending
    if ending is not None and ending.step:
        assert stages.ending(ending.step - 1) is None
        assert stages.ending(ending.step) == ending


def test_patience_counts_from_the_lowest_loss() -> None:
    stages = Stages(Distill(patience=2, stop=0.9), 100)
    for step, loss in ((10, 3.0), (20, 3.1), (30, 2.9), (40, 2.95), (50, 2.9)):
        assert stages.teaches(step)
        stages.observe(step, loss)
    assert not stages.teaches(50)
    assert stages.ending(60) == Ending(50, "patience = 2")
    stages.observe(60, 0.1)  # what comes later changes nothing
    assert stages.last == 50


def test_a_stop_beyond_the_run_is_refused() -> None:
    with pytest.raises(PlanError, match="stop_step = 11 in a run of 10 steps") as caught:
        Stages(Distill(stop_step=11), 10)
    assert caught.value.where == "distill.stop_step"
