"""Who listens hears every router of its own thread, and nobody else is told."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

import moec.runtime.ops  # noqa: F401 - registers torch.ops.moec
from moec.runtime.ops.overhear import overheard

SCORES = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.5]])


def route(scores: Tensor, noise: str = "none") -> None:
    torch.ops.moec.route(scores, None, 1, "probability", noise, True)


def test_scores_are_heard_before_noise_comes_to_them() -> None:
    heard: list[tuple[Tensor, str]] = []
    with overheard(lambda scores, gate: heard.append((scores, gate))):
        route(SCORES, noise="rsample")
    route(SCORES)
    ((scores, gate),) = heard
    assert torch.equal(scores, SCORES)
    assert gate == "probability"


def test_the_gate_of_a_fused_program_is_heard_once() -> None:
    heard: list[Tensor] = []
    x, router = torch.randn(5, 4), torch.randn(3, 4)
    with overheard(lambda scores, _: heard.append(scores)):
        gated = torch.ops.moec.gate(x, router, None, 1, "normalized", "none", 0.0, 0.0, 4, False, True)
    assert len(heard) == 1
    assert torch.equal(heard[0], gated[0])


def test_the_last_one_to_listen_hears() -> None:
    outer: list[Tensor] = []
    inner: list[Tensor] = []
    with overheard(lambda scores, _: outer.append(scores)):
        with overheard(lambda scores, _: inner.append(scores)):
            route(SCORES)
        route(SCORES)
    assert (len(outer), len(inner)) == (1, 1)


def test_another_thread_is_not_heard() -> None:
    heard: list[Tensor] = []
    with overheard(lambda scores, _: heard.append(scores)):
        other = threading.Thread(target=route, args=(SCORES,))
        other.start()
        other.join()
    assert heard == []
