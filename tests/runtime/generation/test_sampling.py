"""The next token: processors equal to Hugging Face's, number for number, and draws that follow them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import DataError
from moec.runtime.generation.sampling import Draws, Sampling, choose, drawn, limited, penalized
from tests.runtime.generation.recomputing import processed

VOCABULARY = 37


@st.composite
def samplings(draw: st.DrawFn) -> Sampling:
    """Settings of one row, draws or none."""
    penalty, seed = draw(st.sampled_from((1.0, 1.3, 0.7))), draw(st.integers(0, 2**40))
    if draw(st.booleans()):
        return Sampling(repetition_penalty=penalty, seed=seed)
    return Sampling(
        temperature=draw(st.sampled_from((1.0, 0.3, 0.8, 2.5))),
        top_k=draw(st.none() | st.integers(1, VOCABULARY + 3)),
        top_p=draw(st.none() | st.sampled_from((0.001, 0.5, 0.9, 1.0)) | st.floats(1e-6, 1.0)),
        repetition_penalty=penalty,
        seed=seed,
    )


def seen_in(tokens: list[int]) -> torch.Tensor:
    seen = torch.zeros(VOCABULARY, dtype=torch.bool)
    seen[tokens] = True
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@given(data=st.data())
def test_processed_logits_are_those_of_hugging_face(dtype: torch.dtype, data: st.DataObject) -> None:
    """Each row of a batch with settings of its own, equal to the processors run on that row alone."""
    rows = data.draw(st.lists(samplings(), min_size=1, max_size=4))
    texts = [data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9)) for _ in rows]
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = (3 * torch.randn(len(rows), VOCABULARY, generator=draw, dtype=torch.float64)).to(dtype)
    logits[:, 5] = logits[:, 6]  # a tie
    kept = logits.clone()
    scores = penalized(logits, rows, [seen_in(text) for text in texts]).clone()
    drawing = [row for row, settings in enumerate(rows) if not settings.greedy]
    if drawing:
        scores[drawing] = limited(scores[drawing], [rows[row] for row in drawing])
    for row, (settings, text) in enumerate(zip(rows, texts, strict=True)):
        assert torch.equal(scores[row], processed(logits[row], text, settings)), (row, settings)
    assert torch.equal(logits, kept)


def test_draws_follow_the_probabilities() -> None:
    """20,000 draws against the exact probabilities, each within five standard deviations."""
    scores = torch.tensor([[0.0, 1.0, -math.inf, 2.0, -1.0]])
    draws, count = Draws(3, 0), 20_000
    tokens = drawn(scores.expand(count, -1), [draws.next() for _ in range(count)])
    found = torch.bincount(torch.tensor(tokens), minlength=5).double() / count
    needed = scores[0].double().softmax(-1)
    assert float(found[2]) == 0.0
    assert bool(((found - needed).abs() <= 5 * (needed * (1 - needed) / count).sqrt()).all())


@given(number=st.sampled_from((0.0, math.nextafter(1.0, 0.0))) | st.floats(0, 1, exclude_max=True))
def test_what_has_no_probability_is_never_drawn(number: float) -> None:
    scores = torch.full((1, 9), -math.inf)
    scores[0, [2, 5]] = torch.tensor([0.3, 0.1])
    assert drawn(scores, [number])[0] in (2, 5)


def test_rows_draw_from_streams_of_their_own() -> None:
    def stream(seed: int, row: int) -> list[float]:
        draws = Draws(seed, row)
        return [draws.next() for _ in range(4)]

    streams = {(seed, row): stream(seed, row) for seed in (0, 1, 2**60) for row in (0, 1, 7)}
    assert len({tuple(numbers) for numbers in streams.values()}) == len(streams)
    assert stream(1, 7) == streams[1, 7]
    # Written down, because texts of a seed must not change from one version to the next.
    assert streams[0, 0][:2] == pytest.approx([0.9429375528828794, 0.3163371523854981], abs=0)


def test_greedy_rows_draw_nothing_and_disturb_nobody() -> None:
    logits = torch.randn(3, VOCABULARY)
    warm = Sampling(temperature=1.0, seed=4)
    alone = choose(logits[1:2], [warm], [None], [Draws(4, 1)])
    draws = [Draws(4, row) for row in range(3)]
    among = choose(logits, [Sampling(), warm, Sampling()], [None] * 3, draws)
    assert among == [int(logits[0].argmax()), alone[0], int(logits[2].argmax())]
    assert draws[0].next() == Draws(4, 0).next()


def test_logits_that_are_no_numbers_are_told() -> None:
    logits = torch.randn(2, VOCABULARY)
    logits[1, 3] = math.nan
    with pytest.raises(DataError, match="largest is nan, in row 1"):
        choose(logits, [Sampling()] * 2, [None] * 2, [Draws(0, 0)] * 2)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"temperature": -1.0}, "temperature -1"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"temperature": 1e-30}, "temperature 1e-30"),
        ({"temperature": "warm"}, "temperature 'warm'"),
        ({"temperature": None}, "temperature None"),
        ({"temperature": 1.0, "top_k": 0}, "top_k 0"),
        ({"temperature": 1.0, "top_k": 1.5}, "top_k 1.5"),
        ({"temperature": 1.0, "top_k": True}, "top_k True"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p 0.0"),
        ({"temperature": 1.0, "top_p": 1.01}, "top_p 1.01"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 0.5}, "seed 0.5"),
        ({"top_k": 5}, "top_k 5 with temperature 0"),
        ({"top_p": 0.5}, "top_p 0.5 with temperature 0"),
    ],
)
def test_settings_that_mean_nothing(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        Sampling(**settings)
