"""A text in time: prompts once, then step after step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moec.cost import Cost, Operation, symbol
from moec.cost.timing.generation import predict_generation
from moec.errors import CostError
from moec.ir.mesh import Mesh
from moec.runtime.ops.work import Work
from tests.cost.timing.test_predict import simple

# One byte, that is one second, for each new token of a row, and one for every two positions of the cache.
READ = symbol("B") * (symbol("n") + symbol("L") / 2)
STEP = Operation("step", "", None, "aten::gelu", "pointwise", "float32", Work((), READ, 0))
DECODE = Cost((STEP,), "decode", Mesh(data=2))


def test_a_prompt_and_the_steps_after_it() -> None:
    found = predict_generation(DECODE, simple(), prompt=5, tokens=3, B=2)
    assert (found.prefill.seconds, found.step.seconds) == (2 * (5 + 4), 2 * (1 + 4))
    assert found.seconds == 18 + 2 * 10
    assert found.throughput == 3 * (2 * 2) / 38
    assert str(found).startswith("38 s for 3 tokens of 4 rows")


def test_room_may_be_more() -> None:
    assert predict_generation(DECODE, simple(), prompt=5, tokens=1, B=1, L=100).seconds == 55


def test_what_is_no_generation_is_refused() -> None:
    with pytest.raises(CostError, match="decode"):
        predict_generation(replace(DECODE, phase="forward"), simple(), prompt=1, tokens=1, B=1)
    with pytest.raises(CostError, match="one or more"):
        predict_generation(DECODE, simple(), prompt=1, tokens=0, B=1)
    with pytest.raises(CostError, match="sequences of one rank"):
        predict_generation(DECODE, simple(), prompt=1, tokens=1)
