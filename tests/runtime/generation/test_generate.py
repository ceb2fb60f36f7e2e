"""`generate` against a loop that recomputes each row alone: ragged, stopped, cancelled, waiting, in parts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import DataError
from moec.runtime.generation.generate import Generation, generate
from moec.runtime.generation.request import Options, Request
from moec.runtime.generation.rows import Event
from moec.runtime.generation.sampling import Sampling
from moec.runtime.generation.stops import Stop
from tests.runtime.generation.recomputing import Hashed, Recomputing, written

VOCABULARY = 7
MODEL = Hashed(VOCABULARY)
PROMPTS = [[1, 2, 3], [4], [5, 6, 0, 1, 2, 3, 4, 5], [2, 2]]

tokens = st.integers(0, VOCABULARY - 1)
prompts = st.lists(st.lists(tokens, min_size=1, max_size=9), min_size=1, max_size=5)
stops = st.none() | tokens | st.lists(tokens, max_size=2) | st.lists(
    st.lists(tokens, min_size=1, max_size=3), max_size=2
)  # fmt: skip
draws = st.fixed_dictionaries(
    {"temperature": st.sampled_from((0.7, 2.0)), "seed": st.integers(0, 9)},
    optional={"top_k": st.integers(1, 9), "top_p": st.sampled_from((0.4, 0.9, 1.0))},
)
options = st.tuples(
    st.just({}) | draws,
    st.fixed_dictionaries(
        {"stop": stops},
        optional={
            "repetition_penalty": st.sampled_from((1.4, 0.8)),
            "rows": st.integers(1, 6), "chunk": st.integers(1, 4),
        },
    ),
).map(lambda parts: {**parts[0], **parts[1]})  # fmt: skip


def decoding(limit: int | None = None) -> Recomputing:
    return Recomputing(MODEL, VOCABULARY, limit)


def needed(
    prompt: Sequence[int], row: int, most: int, given_: Mapping[str, Any], length: int | None = None
) -> list[int]:
    """The new tokens of a row, recomputed alone."""
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    sampling = Sampling(**{name: given_[name] for name in names if name in given_})
    stop = Stop.of(given_.get("stop"), VOCABULARY)
    keep = given_.get("keep")
    return written(MODEL, prompt, most, sampling=sampling, stop=stop, row=row, length=length, keep=keep)


@given(given_prompts=prompts, most=st.integers(1, 12), given_=options)
def test_every_row_is_as_recomputed_alone(
    given_prompts: list[list[int]], most: int, given_: dict[str, Any]
) -> None:
    out = generate(decoding(), given_prompts, most, **given_)
    for row, (prompt, text) in enumerate(zip(given_prompts, out, strict=True)):
        assert text.tolist() == prompt + needed(prompt, row, most, given_)


@given(
    given_prompts=prompts, most=st.integers(1, 30), given_=options, limit=st.integers(9, 14),
    keep=st.integers(1, 9),
)  # fmt: skip
def test_a_full_row_goes_on_from_its_last_tokens(
    given_prompts: list[list[int]], most: int, given_: dict[str, Any], limit: int, keep: int
) -> None:
    given_ = {**given_, "keep": keep}
    out = generate(decoding(limit), given_prompts, most, **given_)
    for row, (prompt, text) in enumerate(zip(given_prompts, out, strict=True)):
        assert text.tolist() == prompt + needed(prompt, row, most, given_, limit)


@given(
    given_prompts=prompts, most=st.integers(1, 12), given_=options,
    cancels=st.lists(st.none() | st.integers(1, 8), min_size=5, max_size=5),
)  # fmt: skip
def test_a_cancelled_row_ends_there_and_the_others_do_not_notice(
    given_prompts: list[list[int]], most: int, given_: dict[str, Any], cancels: list[int | None]
) -> None:
    heard: dict[int, list[int]] = {row: [] for row in range(len(given_prompts))}

    def stream(row: int, token: int) -> bool:
        heard[row].append(token)
        return len(heard[row]) != cancels[row]

    out = generate(decoding(), given_prompts, most, stream=stream, **given_)
    for row, (prompt, text) in enumerate(zip(given_prompts, out, strict=True)):
        whole = needed(prompt, row, most, given_)
        assert heard[row] == whole[: cancels[row]]
        assert text.tolist() == prompt + heard[row]


@given(given_prompts=prompts, left=st.booleans(), ones=st.sampled_from((torch.bool, torch.long)))
def test_a_padded_tensor_is_its_rows(given_prompts: list[list[int]], left: bool, ones: torch.dtype) -> None:
    width = max(map(len, given_prompts))
    lines, masks = [], []
    for prompt in given_prompts:
        gap = width - len(prompt)
        line, mask = ([6] * gap, [0] * gap), [1] * len(prompt)
        lines.append([*line[0], *prompt] if left else [*prompt, *line[0]])
        masks.append([*line[1], *mask] if left else [*mask, *line[1]])
    batch, mask_BS = torch.tensor(lines), torch.tensor(masks).to(ones)
    out = generate(decoding(), batch, 6, mask=mask_BS, stop=[0, 1])
    listed = generate(decoding(), given_prompts, 6, stop=[0, 1])
    assert isinstance(out, torch.Tensor)
    assert torch.equal(out[:, :width], batch)
    new = [text.tolist()[len(prompt) :] for prompt, text in zip(given_prompts, listed, strict=True)]
    most = max(map(len, new))
    assert out[:, width:].tolist() == [[*row, *[0] * (most - len(row))] for row in new]


def test_what_comes_out_is_like_what_came_in() -> None:
    batch = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
    out = generate(decoding(), batch, 3)
    assert isinstance(out, torch.Tensor)
    assert out.dtype == torch.int32
    assert out.shape == (2, 5)
    ragged = generate(decoding(), [torch.tensor([1], dtype=torch.uint8), [1, 2], (3,)], 2)
    assert [(text.dtype, len(text)) for text in ragged] == [
        (torch.uint8, 3),
        (torch.long, 4),
        (torch.long, 3),
    ]
    padded = generate(
        decoding(), torch.tensor(PROMPTS[0])[None].repeat(2, 1), 9, pad=-100, stop=lambda new: True
    )
    assert padded.shape == (2, 4)


def test_padding_is_the_first_stop_or_what_is_asked_for() -> None:
    batch = torch.tensor([[1], [3]])
    short, long = (needed(row, 0, 5, {}) for row in batch.tolist())
    stop = short[0]
    assert stop not in long, "the example needs rows that end at different times"
    assert generate(decoding(), batch, 5, stop=stop).tolist() == [[1, *[stop] * 5], [3, *long]]
    assert generate(decoding(), batch, 5, stop=stop, pad=-1).tolist() == [[1, stop, *[-1] * 4], [3, *long]]
    assert generate(decoding(), batch, 5, stop=lambda new: new[-1] == stop)[0].tolist() == [
        1,
        stop,
        0,
        0,
        0,
        0,
    ]


def test_rows_that_end_leave_the_batch() -> None:
    program = decoding()
    texts = [needed(prompt, row, 12, {"stop": 3}) for row, prompt in enumerate(PROMPTS)]
    generate(program, PROMPTS, 12, stop=3)
    lengths = sorted(map(len, texts))
    assert lengths[0] < lengths[-1], "the example needs rows that end at different times"
    assert program.shapes[0] == (4, 8)
    left = [sum(length > step for length in lengths) for step in range(1, lengths[-1])]
    assert program.shapes[1:] == [(rows, 1) for rows in left]


def test_waiting_rows_take_the_places_of_those_that_ended() -> None:
    program = decoding()
    out = generate(program, PROMPTS * 3, 5, rows=3, stop=2)
    assert max(rows for rows, _ in program.shapes) == 3
    assert [text.tolist() for text in out[:4]] == [
        text.tolist() for text in generate(decoding(), PROMPTS, 5, stop=2)
    ]


def test_chunks_bound_what_is_read_at_once() -> None:
    program = decoding()
    generate(program, PROMPTS, 1, chunk=3)
    # 1 and 2 tokens, then 3, end with the first chunk; the one of eight goes on alone.
    assert program.shapes == [(4, 3), (1, 3), (1, 2)]


def test_a_stop_of_several_tokens_does_not_begin_in_the_prompt() -> None:
    first, second = needed([4], 0, 2, {})
    whole = generate(decoding(), [[4]], 6)[0].tolist()
    assert generate(decoding(), [[4]], 6, stop=[[4, first]])[0].tolist() == whole
    assert generate(decoding(), [[4]], 6, stop=[[first, second]])[0].tolist() == [4, first, second]


def test_a_function_may_say_where_a_row_ends() -> None:
    out = generate(decoding(), PROMPTS, 9, stop=lambda new: sum(new) > 12)
    for prompt, text in zip(PROMPTS, out, strict=True):
        new = text.tolist()[len(prompt) :]
        assert len(new) == 9 or sum(new) > 12 >= sum(new[:-1])


def request(prompts_: Any, most: int, **more: Any) -> Request:
    return Request.of(prompts_, most, vocabulary=VOCABULARY, max_positions=None, **more)


def test_a_generation_hands_out_tokens_as_they_come() -> None:
    program = decoding()
    running = Generation(program, request(PROMPTS, 4))
    assert program.shapes == []  # nothing is done before it is asked for
    first = next(running)
    assert (first.ended, program.shapes) == (None, [(4, 8)])
    assert [text.tolist()[len(p) :] for p, text in zip(PROMPTS, running.result(), strict=True)] == [
        [first.token] if row == first.id else [] for row in range(4)
    ]
    running.cancel(2)
    rest = list(running)
    assert all(event.id != 2 for event in rest if first.id != 2)
    assert running.ended == ["length", "length", "cancelled", "length"]
    running.cancel(0)  # too late
    assert running.ended[0] == "length"
    with pytest.raises(StopIteration):
        next(running)
    assert rest[-1] == Event(rest[-1].id, rest[-1].token, "length")


def test_an_error_in_the_stream_comes_through() -> None:
    def stream(row: int, token: int) -> None:
        raise KeyError(token)

    with pytest.raises(KeyError):
        generate(decoding(), PROMPTS, 4, stream=stream)


def test_a_seed_means_the_same_whoever_shares_the_batch() -> None:
    alone = generate(decoding(), PROMPTS[:1], 8, temperature=1.0, seed=5)
    together = generate(decoding(), PROMPTS, 8, temperature=1.0, seed=5, rows=2, chunk=2)
    other = generate(decoding(), PROMPTS[:1], 8, temperature=1.0, seed=6)
    twice = generate(decoding(), [PROMPTS[0]] * 2, 8, temperature=1.0, seed=5)
    assert torch.equal(alone[0], together[0])
    assert not torch.equal(alone[0], other[0])
    assert not torch.equal(twice[0], twice[1])


ONES = torch.ones(2, 3, dtype=torch.long)
REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "nothing": ([], 1, {}, "no prompt"),
    "no rows": (torch.zeros(0, 3, dtype=torch.long), 1, {}, "no prompt"),
    "empty": ([[1], []], 1, {}, "prompt 1 is empty"),
    "no columns": (torch.zeros(2, 0, dtype=torch.long), 1, {}, "prompt 0 is empty"),
    "all padding": (ONES, 1, {"mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "prompt 1 is empty"),
    "too large": ([[1, 7]], 1, {}, "token 7 in prompt 0\n  needed  tokens from 0 to 6"),
    "negative": ([[1], [-1]], 1, {}, "token -1 in prompt 1"),
    "floats": (torch.ones(1, 2), 1, {}, r"float32 \[1, 2\]"),
    "one prompt": (torch.ones(3, dtype=torch.long), 1, {}, r"nearest tokens\[None\]"),
    "one list": ([1, 2], 1, {}, r"a prompt 1\n(.|\n)*nearest \[tokens\]"),
    "text": ("abc", 1, {}, "prompts of type str"),
    "words": (["abc"], 1, {}, "a prompt 'abc'"),
    "matrix": ([torch.ones(1, 2, dtype=torch.long)], 1, {}, r"a prompt that is int64 \[1, 2\]"),
    "mask shape": (ONES, 1, {"mask": torch.ones(2, 1)}, r"a mask \[2, 1\]"),
    "mask hole": (ONES, 1, {"mask": torch.tensor([[1, 1, 1], [1, 0, 1]])}, "row 1 at 1"),
    "mask values": (ONES, 1, {"mask": ONES + ONES.cumsum(0) - 1}, "from 1.0 to 2.0"),
    "mask of a list": ([[1]], 1, {"mask": torch.ones(1, 1)}, "a mask with a list"),
    "no new": ([[1]], 0, {}, "max_new_tokens 0"),
    "no number": ([[1]], None, {}, "max_new_tokens None"),
    "no rows at a time": ([[1]], 1, {"rows": 0}, "rows 0"),
    "no chunk": ([[1]], 1, {"chunk": 0}, "chunk 0"),
    "keep all": ([[1]], 1, {"keep": 11}, "keep 11\n  needed  at most 10"),
    "stop": ([[1]], 1, {"stop": "end"}, "stop 'end'"),
    "stop in stops": ([[1]], 1, {"stop": ["end"]}, "stop 'end'"),
    "no stop": ([[1]], 1, {"stop": [[]]}, r"stop \[\]"),
    "stop outside": ([[1]], 1, {"stop": [[1, 7]]}, "stop token 7"),
    "pad": ([[1]], 1, {"pad": "x"}, "pad 'x'"),
    "top-k alone": ([[1]], 1, {"top_k": 2}, "top_k 2 with temperature 0"),
    "overflow": ([[1], [1] * 6], 5, {}, "prompt 1\n(.|\n)*6 tokens and 5 new ones: 11 (.|\n)*tokens 4"),
    "full": ([[1] * 10], 1, {}, "a shorter prompt"),
    "too long to keep": ([[1] * 11], 1, {"keep": 3}, "a prompt of 11 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_before_any_work(case: str) -> None:
    given_prompts, most, more, told = REFUSED[case]
    program = decoding(limit=10)
    with pytest.raises(DataError, match=told):
        generate(program, given_prompts, most, **more)
    assert program.shapes == []


def test_what_just_fits_is_written() -> None:
    assert len(generate(decoding(limit=10), [[1] * 6], 4)[0]) == 10


def test_an_unknown_option_is_no_option() -> None:
    with pytest.raises(TypeError, match="temprature"):
        generate(decoding(), [[1]], 1, temprature=1.0)  # type: ignore[call-arg]


def test_the_options_are_the_keywords_of_a_request() -> None:
    keywords = set(inspect.signature(Request.of).parameters)
    of_the_program = {"tokens", "max_new_tokens", "vocabulary", "max_positions", "least"}
    assert keywords - of_the_program == set(Options.__annotations__)
