"""A batch under load: no wrong token, and no more memory than at the start."""

from __future__ import annotations

import gc
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import DataError
from moec.runtime.generation.batch import Batch
from moec.runtime.generation.rows import Event, Row
from moec.runtime.generation.sampling import Sampling
from tests.runtime.generation.load import Load, bytes_of_tensors, requests, run
from tests.runtime.generation.recomputing import Hashed, Recomputing, written

VOCABULARY, LENGTH = 11, 60
MODEL = Hashed(VOCABULARY)


def batch_of(rows: int, chunk: int | None = None, length: int = LENGTH) -> Batch:
    return Batch(Recomputing(MODEL, VOCABULARY, LENGTH), rows, length, chunk=chunk)


def assert_as_alone(load: Load) -> None:
    """Every text is what its row writes alone, up to where it was cancelled."""
    for text in load.texts:
        whole = written(MODEL, text.prompt, text.most, sampling=text.sampling, row=text.row)
        cancelled = text.ended == "cancelled"
        assert text.new == whole[: text.cancel_at if cancelled else None]
        assert text.ended in ("cancelled", "length")


@pytest.mark.parametrize("chunk", [None, 4])
def test_two_hundred_texts(chunk: int | None) -> None:
    """Of random lengths, coming over time, some cancelled, some too long: no wrong token."""
    load = run(batch_of(rows=8, chunk=chunk), requests(200, VOCABULARY, LENGTH, seed=1), seed=1)
    assert load.refused >= 10
    assert sum(text.ended == "cancelled" for text in load.texts) >= 20
    assert load.most_at_once > 8, "some have to wait"
    assert_as_alone(load)


def test_load_leaves_nothing_behind() -> None:
    """After two hundred texts and after four hundred: the same cache, the same tensors, no more objects."""
    batch = batch_of(rows=8, chunk=4)
    held = [tensor.data_ptr() for tensor in batch.cache.tensors], batch.cache.num_bytes()
    tracemalloc.start()
    used = [memory_after(batch, seed) for seed in range(3)]
    tracemalloc.stop()
    assert ([tensor.data_ptr() for tensor in batch.cache.tensors], batch.cache.num_bytes()) == held
    assert used[2][0] == used[1][0]
    assert used[2][1] < used[1][1] + 8_000
    assert not [thing for thing in gc.get_objects() if type(thing) is Row]


def memory_after(batch: Batch, seed: int) -> tuple[int, int]:
    """Bytes of all tensors there are, and of all that Python allocated, after two hundred texts."""
    run(batch, requests(200, VOCABULARY, LENGTH, seed), seed)
    assert isinstance(batch.decoding, Recomputing)
    batch.decoding.shapes.clear()  # what the oracle remembers
    return bytes_of_tensors(), tracemalloc.get_traced_memory()[0]


@given(
    rows=st.integers(1, 5), chunk=st.none() | st.integers(1, 7), count=st.integers(1, 12),
    seed=st.integers(0, 10_000),
)  # fmt: skip
def test_any_schedule(rows: int, chunk: int | None, count: int, seed: int) -> None:
    assert_as_alone(run(batch_of(rows, chunk, 20), requests(count, VOCABULARY, 20, seed), seed))


def test_a_long_prompt_does_not_hold_up_the_others() -> None:
    """Read in chunks, it leaves room for a token of each running text in every step."""
    batch = batch_of(rows=3, chunk=5)
    short = batch.add([1], 20)
    batch.step()
    batch.add([2] * 30, 3)
    for _ in range(5):
        assert [event.id for event in batch.step()] == [short]
    assert sorted(event.id for event in batch.step()) == [short, short + 1]


def test_a_text_whose_prompt_is_being_read_can_be_cancelled() -> None:
    batch = batch_of(rows=4, chunk=2)
    names = [batch.add([3] * size, 4) for size in (5, 9, 7, 3)]
    batch.step()
    assert batch.cancel(names[2])
    events = list[Event]()
    while len(batch):
        events += batch.step()
    for name, size in zip(names, (5, 9, 7, 3), strict=True):
        new = [event.token for event in events if event.id == name]
        assert new == ([] if name == names[2] else written(MODEL, [3] * size, 4))


def test_an_unknown_text_cannot_be_cancelled() -> None:
    batch = batch_of(rows=1)
    assert not batch.cancel(0)
    assert batch.step() == []


def test_a_repetition_penalty_is_a_rows_own() -> None:
    batch, penalized = batch_of(rows=2), Sampling(repetition_penalty=3.0)
    batch.add([1, 2], 12, sampling=penalized)
    batch.add([1, 2], 12)
    events = [event for _ in range(12) for event in batch.step()]
    for name, sampling in enumerate((penalized, Sampling())):
        needed = written(MODEL, [1, 2], 12, sampling=sampling)
        assert [event.token for event in events if event.id == name] == needed


@pytest.mark.parametrize(
    ("prompt", "most", "told"),
    [([], 1, "an empty prompt"), ([VOCABULARY], 1, "token 11"), ([-1], 1, "token -1"), ([1], 0, "max_new")],
)
def test_what_is_not_let_in(prompt: list[int], most: int, told: str) -> None:
    batch = batch_of(rows=1)
    with pytest.raises(DataError, match=told):
        batch.add(prompt, most)
    assert len(batch) == 0
