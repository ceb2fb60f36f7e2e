"""The benchmark of the divergence, in small: contenders agree, wrong ones are caught, the page is fresh."""

from __future__ import annotations

import json

import pytest

from benchmarks import divergence, page


def test_contenders_compute_the_same() -> None:
    logits, teacher = divergence.inputs(5, 67)
    divergence.require_alike(logits, teacher)
    top = divergence.contenders(teacher)[divergence.TOP_NAME](logits, teacher)
    assert (top <= divergence.ours(logits, teacher) + 1e-6).all()


def test_a_wrong_one_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(divergence.CONTENDERS, "moec", divergence.ours_reverse)
    with pytest.raises(AssertionError):
        divergence.require_alike(*divergence.inputs(5, 67))


def test_memory_is_that_of_the_step() -> None:
    logits, teacher = divergence.inputs(2048, 8192)
    gradient = logits.nbytes / 1e6
    found = [
        divergence.extra_memory(divergence.step(cost, logits, teacher))
        for cost in (divergence.ours, divergence.torch_kl)
    ]
    # Beside the gradient, some 20 MB of torch itself, which a copy of a process loads again.
    assert 0.9 * gradient <= found[0] <= gradient + 40
    assert found[1] >= 3 * gradient


def test_the_page_holds_the_record() -> None:
    record = json.loads(divergence.RESULTS.read_text())
    begin, end = page.marks("divergence")
    text = page.PAGE.read_text()
    assert text.split(begin)[1].split(end)[0].strip() == divergence.table(record["cases"])
