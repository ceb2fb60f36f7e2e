"""Whole programs on a GPU: the same as on the CPU, and decoding inside a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moec
from examples.gpt import GPT, GPTConfig
from moec.testing.tolerances import error_of, tolerance_of

pytestmark = pytest.mark.gpu
PLAN: dict[str, Any] = {
    "moe": {"layers": "1::2", "experts": 4, "top_k": 2, "residual": "learned", "init": "fresh"}
}
TINY = GPTConfig(vocab=97, seq=64, layers=4, width=64, heads=4, dropout=0.0)


def program() -> moec.Program:
    """A small sparse program, fused, on the CPU."""
    torch.manual_seed(0)
    return moec.compile(GPT(TINY), plan=PLAN, verify="off").fused()


def test_loss_and_gradients_are_those_of_the_cpu() -> None:
    tokens = torch.randint(0, 97, (3, 40))
    runs = []
    for device in ("cpu", "cuda"):
        there = program().to(device)
        there.loss(tokens.to(device)).backward()
        found = {name: weight.grad for name, weight in there.named_parameters() if weight.grad is not None}
        runs.append((there(tokens.to(device)), found))
    (logits, grads), (gpu_logits, gpu_grads) = runs
    assert error_of(gpu_logits, logits) <= tolerance_of(torch.float32)
    assert grads.keys() == gpu_grads.keys()
    scale = max(float(grad.abs().max()) for grad in grads.values())
    for name, grad in grads.items():
        assert error_of(gpu_grads[name], grad, floor=1e-3 * scale) <= tolerance_of(torch.float32), name


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_decoding_in_a_cuda_graph(rows: int) -> None:
    """One captured step, replayed for twenty tokens, says what the decoder says without a graph."""
    decoder = program().to("cuda").eval().decoder(64)
    prompt = torch.randint(0, 97, (rows, 9), device="cuda")
    plain_cache, cache = decoder.new_cache(rows, 64), decoder.new_cache(rows, 64)
    nothing = torch.zeros(rows, dtype=torch.int64, device="cuda")
    last = torch.full((rows, 1), 8, device="cuda")
    for memory in (plain_cache, cache):
        logits = decoder.step(prompt, nothing, last, memory, 64)
    tokens, past = logits[:, -1].argmax(-1, keepdim=True), nothing + 9
    graph, said, inputs = capture(decoder, cache, tokens, past)
    for _ in range(20):
        needed = decoder.step(tokens, past, nothing[:, None], plain_cache, 64)
        inputs[0].copy_(tokens)
        inputs[1].copy_(past)
        graph.replay()
        assert error_of(said, needed) <= tolerance_of(torch.float32)
        tokens, past = needed[:, -1].argmax(-1, keepdim=True), past + 1


def capture(
    decoder: Any, cache: Any, tokens: Tensor, past: Tensor
) -> tuple[Any, Tensor, tuple[Tensor, Tensor]]:
    """A graph of one step, the logits it writes, and the tokens and lengths it reads."""
    inputs, wanted = [tokens.clone(), past.clone()], torch.zeros_like(tokens)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            decoder.step(*inputs, wanted, cache, 64)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        said = decoder.step(*inputs, wanted, cache, 64)
    return graph, said, inputs
