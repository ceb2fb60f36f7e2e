"""`program.generate` on real programs: equal to recomputing, and to Hugging Face's `generate`."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import moec
from examples.gpt import GPT, GPTConfig
from moec.errors import DataError
from moec.plan import Plan
from moec.runtime.generation.batch import Batch
from moec.runtime.generation.request import Options
from moec.runtime.generation.sampling import Draws, Sampling, choose
from moec.runtime.generation.stops import Stop
from tests.capture.families import FAMILIES
from tests.runtime.generation.load import bytes_of_tensors, requests, run
from tests.runtime.generation.recomputing import written

PROMPTS = [[1, 2, 3], [40, 5, 6, 7, 8, 9, 10, 11], [30], [4, 4, 4, 4, 4]]
MOE: dict[str, Any] = {"layers": "1::2", "experts": 4, "init": "fresh", "router_std": 1.0}
PLANS: dict[str, dict[str, Any]] = {
    "dense": {},
    "top-1": {"moe": MOE},
    "top-2": {"moe": {**MOE, "top_k": 2, "gate": "normalized", "layers": "all"}},
    "pr-moe": {
        "moe": {**MOE, "residual": "learned", "override": [{"layers": "-1:", "experts": 6}]},
    },
}


def enlarged(model: torch.nn.Module, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """With weights so large that the likeliest token is a matter of the text."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    return model.to(dtype).eval()


@cache
def program_of(plan: str) -> moec.Program:
    """A GPT of four layers by one of `PLANS`, in fp64."""
    model = enlarged(GPT(GPTConfig(vocab=64, seq=48, layers=4, width=16, heads=2)))
    return moec.compile(model, Plan.model_validate(PLANS[plan]), verify="off").eval()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "options",
    [{}, {"chunk": 3, "rows": 2}, {"temperature": 0.8, "seed": 4}, {"keep": 20, "stop": 7}],
    ids=["greedy", "in chunks", "drawn", "kept"],
)
def test_generate_is_recomputing_token_by_token(plan: str, options: Options) -> None:
    program = program_of(plan)
    most = 60 if "keep" in options else 24
    sampling = Sampling(options.get("temperature", 0.0), seed=options.get("seed", 0))
    stop = Stop.of(options.get("stop"), 64)
    out = program.generate(PROMPTS, most, **options)
    for row, (prompt, text) in enumerate(zip(PROMPTS, out, strict=True)):
        needed = written(
            program, prompt, most, sampling=sampling, stop=stop, row=row, length=48, keep=options.get("keep")
        )  # fmt: skip
        assert text.tolist() == prompt + needed
    assert len({int(token) for text in out for token in text}) > 15, "texts that say something"


def test_a_tensor_with_padding_on_either_side() -> None:
    program, width = program_of("pr-moe"), max(map(len, PROMPTS))
    listed = program.generate(PROMPTS, 9)
    for left in (True, False):
        rows = [[*[0] * (width - len(p)), *p] if left else [*p, *[0] * (width - len(p))] for p in PROMPTS]
        ones = [[token in kept for token in range(width)] for kept in map(_places(width, left), PROMPTS)]
        out = program.generate(torch.tensor(rows), 9, mask=torch.tensor(ones))
        assert isinstance(out, Tensor)
        for row, text in zip(out, listed, strict=True):
            assert torch.equal(row[width:], text[-9:])


def _places(width: int, left: bool) -> Any:
    return lambda prompt: range(width - len(prompt), width) if left else range(len(prompt))


def test_weights_that_change_are_seen_and_the_mode_is_left_alone() -> None:
    """Cached tables and all: what is written after a training step is what the trained program writes."""
    program = moec.compile(
        enlarged(GPT(GPTConfig(vocab=64, seq=48, layers=2, width=16, heads=2, dropout=0.1))),
        Plan.model_validate(PLANS["pr-moe"]),
        verify="off",
    )
    program.train()
    before = program.generate(PROMPTS[:1], 12)[0]
    assert all(module.training for module in program.modules())
    step = torch.optim.SGD(program.parameters(), lr=0.5)
    program.loss(torch.randint(64, (2, 12))).backward()
    step.step()
    after = program.generate(PROMPTS[:1], 12)[0]
    program.eval()
    assert after.tolist() == PROMPTS[0] + written(program, PROMPTS[0], 12)
    assert not torch.equal(before, after)


def test_two_hundred_texts_on_a_program() -> None:
    """Of random lengths, coming over time, some cancelled, some too long: no wrong token, no more memory."""
    program = program_of("pr-moe")
    batch = Batch(program.decoder(48), rows=6, length=48, chunk=16)
    run(batch, requests(20, 64, 48, seed=2), seed=2)
    held = batch.cache.num_bytes(), bytes_of_tensors()
    load = run(batch, requests(200, 64, 48, seed=3), seed=3)
    assert (batch.cache.num_bytes(), bytes_of_tensors()) == held
    assert load.refused >= 10
    for text in load.texts:
        assert text.new == _as_alone(program, text.prompt, text.new, text.sampling, text.row)
        assert len(text.new) == (text.cancel_at if text.ended == "cancelled" else text.most)


def _as_alone(
    program: moec.Program, prompt: list[int], new: list[int], sampling: Sampling, row: int
) -> list[int]:
    """What the program, run once over a text, says should follow each of its tokens."""
    if not new:
        return []
    with torch.no_grad():
        logits = program(torch.tensor([[*prompt, *new]]))[0, len(prompt) - 1 : -1]
    draws = Draws(sampling.seed, row)
    return [choose(scores[None], [sampling], [None], [draws])[0] for scores in logits]


# against Hugging Face


WIDTH = 9
IDS = torch.tensor([[0] * (WIDTH - len(prompt)) + prompt for prompt in PROMPTS[:1] + PROMPTS[2:] + [[7] * 9]])
MASK = (IDS != 0).long()


def written_by_hf(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    out: Tensor = model.generate(
        ids, attention_mask=mask, pad_token_id=0, **{"do_sample": False, "eos_token_id": None, **options}
    )
    return out


@cache
def compiled(name: str) -> tuple[Any, moec.Program]:
    # These compute a part in fp32 whatever their weights are, and do not run in fp64 throughout.
    dtype = torch.float32 if name in ("gemma2", "olmo2") else torch.float64
    model = enlarged(FAMILIES[name](), dtype)
    return model, moec.compile(model, verify="off").eval()


ALWAYS = ("gpt2", "llama", "mistral")
BATCHED = [name for name in FAMILIES if name != "bloom"]


@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.nightly) for name in BATCHED]
)
def test_greedy_as_hugging_face(name: str) -> None:
    """Left padding and a mask there, ragged rows here."""
    model, program = compiled(name)
    needed = written_by_hf(model, IDS, MASK, max_new_tokens=20)
    out = program.generate(IDS, 20, mask=MASK)
    assert torch.equal(out, needed)
    assert len(set(needed[:, WIDTH:].flatten().tolist())) > 3, "texts that say something"


def test_bloom_as_hugging_face_row_by_row() -> None:
    """Its own generate gives NaN for rows that are padded on the left, in fp64."""
    model, program = compiled("bloom")
    out = program.generate(PROMPTS, 12)
    for prompt, text in zip(PROMPTS, out, strict=True):
        ids = torch.tensor([prompt])
        assert torch.equal(text, written_by_hf(model, ids, torch.ones_like(ids), max_new_tokens=12)[0])


def test_stops_and_penalties_as_hugging_face() -> None:
    model, program = compiled("llama")
    whole = program.generate(IDS, 12, mask=MASK)
    assert isinstance(whole, Tensor)
    stop = int(whole[0, WIDTH + 4])
    needed = written_by_hf(model, IDS, MASK, max_new_tokens=12, eos_token_id=stop)
    assert torch.equal(program.generate(IDS, 12, mask=MASK, stop=stop, pad=0), needed)
    assert torch.equal(program.generate(IDS, 12, mask=MASK, temperature=0.7, top_k=1), whole)
    # Hugging Face counts padding as seen, so rows of one length.
    ids = torch.tensor([[1, 2, 3, 4], [9, 9, 9, 9]])
    for penalty in (1.5, 0.7):
        needed = written_by_hf(
            model, ids, torch.ones_like(ids), max_new_tokens=20, repetition_penalty=penalty
        )
        assert torch.equal(program.generate(ids, 20, repetition_penalty=penalty), needed)


def test_overflow_is_told_before_anything_is_derived() -> None:
    program = program_of("dense").fork()
    with pytest.raises(
        DataError, match="49 positions\n  needed  at most 48 positions\n  nearest max_new_tokens 43"
    ):
        moec.Program.of(program).generate([[1] * 5], 44)
