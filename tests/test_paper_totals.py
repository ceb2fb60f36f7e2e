"""The parameter totals of the paper come out of an ordinary dense GPT and a shipped plan."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.paper_totals import PAPER, PaperModel, digits, measure_apart

DOCS = Path(__file__).parents[1] / "docs" / "paper.md"


@pytest.mark.parametrize("model", PAPER, ids=lambda model: model.name)
def test_total_at_the_printed_digits(model: PaperModel) -> None:
    """In a process of its own, in under a minute and 2 GB; and docs/paper.md says the same numbers."""
    found = measure_apart(model)
    assert digits(found.parameters) == model.total
    assert found.seconds < 60
    assert found.peak_bytes < 2e9
    row = next(line for line in DOCS.read_text().splitlines() if model.name in line)
    written = [int(number.replace(",", "")) for number in re.findall(r"\d{1,3}(?:,\d{3})+", row)]
    assert written == [found.parameters, found.active]
