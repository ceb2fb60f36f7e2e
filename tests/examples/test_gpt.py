"""The example GPT is an ordinary one: causal, tied, of the paper's sizes, and it learns."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from examples import gpt


def tiny(dropout: float = 0.0) -> gpt.GPT:
    return gpt.GPT(gpt.GPTConfig(vocab=61, seq=17, layers=2, width=24, heads=3, dropout=dropout))


def test_it_is_plain_pytorch() -> None:
    tree = ast.parse(Path(gpt.__file__).read_text(encoding="utf-8"))
    froms = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert froms == {"__future__", "dataclasses", "torch", "torch.nn"}


@pytest.mark.parametrize(("build", "layers", "width"), [(gpt.gpt_350m, 24, 1024), (gpt.gpt_1_3b, 24, 2048)])
def test_paper_sizes_on_meta(build: Callable[[], gpt.GPT], layers: int, width: int) -> None:
    with torch.device("meta"):
        model = build()
    block = 12 * width * width + 13 * width
    embeddings = (50257 + 2048) * width
    assert sum(p.numel() for p in model.parameters()) == layers * block + embeddings + 2 * width
    assert all(p.is_meta for p in model.parameters())
    assert model(torch.zeros(2, 9, dtype=torch.int64, device="meta")).shape == (2, 9, 50257)


def test_a_token_sees_only_what_came_before() -> None:
    model = tiny().double().eval()
    tokens = torch.randint(61, (2, 17))
    changed = tokens.clone()
    changed[:, 11] = (changed[:, 11] + 1) % 61
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.equal(before[:, 11:], after[:, 11:])


def test_the_head_is_tied_and_every_parameter_gets_a_gradient() -> None:
    model = tiny()
    assert model.head.weight is model.token_embedding.weight
    model(torch.randint(61, (3, 17))).logsumexp(-1).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_dropout_acts_in_training_only() -> None:
    model, tokens = tiny(dropout=0.5), torch.randint(61, (1, 9))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_it_starts_ignorant_and_learns() -> None:
    model, tokens = tiny(), torch.randint(61, (4, 17))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(61)) < 0.1
    assert losses[-1] < losses[0] / 2
