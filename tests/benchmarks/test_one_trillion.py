"""A trillion parameters compile and partition in a minute and 2 GB, however many ranks there are."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.one_trillion import ROWS, TRILLION, measure_apart

DOCS = Path(__file__).parents[2] / "docs" / "performance.md"


def test_a_trillion_parameters_on_256_ranks() -> None:
    """Processor time: it is what the clock shows on an idle machine, with one thread."""
    found = measure_apart(TRILLION)
    assert found.compile_seconds + found.partition_seconds < 60
    assert found.peak_bytes < 2e9
    row = next(line for line in DOCS.read_text().splitlines() if line.startswith(f"| {TRILLION.name} |"))
    assert f"| {found.parameters:,} | {found.local:,} |" in row


@pytest.mark.nightly
def test_neither_parameters_nor_ranks_take_time() -> None:
    first, *others = [measure_apart(row) for row in ROWS]
    for found in others:
        assert found.compile_seconds + found.partition_seconds < 1.5 * (
            first.compile_seconds + first.partition_seconds
        )
        assert found.peak_bytes < 1.5 * first.peak_bytes
