"""How large a page is and how soon it is there, for a deep model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser

import moec
from examples.gpt import GPT, GPTConfig
from moec.view.page import write_page
from moec.view.timeline import Drawing, Section, Step, Timeline
from tests.view.timelines import lifted_block, steps_of, timeline

# A page is mailed and put beside a report: 5 MB go through everywhere. Somebody who opens it waits for two
# seconds without wondering. What counts is the time that the page's own thread computes until the first
# picture is drawn: other tests run on the same processor meanwhile.
MOST_BYTES = 5_000_000
MOST_SECONDS = 2.0
LAYERS = 60


@pytest.fixture
def computed(browser: Browser) -> Callable[[Path], float]:
    """Seconds that the page's thread computes from the load on until the first picture is drawn."""

    def seconds(path: Path) -> float:
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        assert page.locator(".item").count() > 0
        metrics = session.send("Performance.getMetrics")["metrics"]
        page.close()
        return float(next(each["value"] for each in metrics if each["name"] == "TaskDuration"))

    return seconds


def unlike(drawing: Drawing, layer: int) -> Drawing:
    """The same block in a shape that no other one has."""
    node = drawing.nodes[0]
    assert node.after is not None
    other = replace(node, after=replace(node.after, value=f"bf16 [B, S, {layer}]"))
    return replace(drawing, nodes=(other, *drawing.nodes[1:]))


def unfolded() -> Timeline:
    """Of 60 layers no two of which are alike, changed by five passes among thirty: nothing can be folded."""
    drawings = tuple(unlike(lifted_block(), place) for place in range(5 * LAYERS))
    idle, lifting = steps_of(LAYERS)[1:3]

    def step(number: int) -> Step:
        first = LAYERS * number
        sections = tuple(Section(f"block {at}", (at,), first + at, True) for at in range(LAYERS))
        return replace(lifting, name=f"lift_{number}", sections=sections, diff=lifting.diff * LAYERS)

    steps = [step(number) if number < 5 else replace(idle, sections=()) for number in range(30)]
    return timeline(LAYERS, steps=tuple(steps), drawings=drawings)


def test_sixty_layers_without_any_two_alike(computed: Callable[[Path], float], tmp_path: Path) -> None:
    path = write_page(unfolded(), tmp_path / "page.html")
    assert path.stat().st_size < MOST_BYTES
    assert computed(path) < MOST_SECONDS


def test_folding_is_what_keeps_a_page_small() -> None:
    """A page of alike layers hardly grows with their number."""
    sizes = [len(json.dumps(timeline(layers, ledger=()).to_json())) for layers in (6, 60)]
    assert sizes[1] < 1.1 * sizes[0]


@pytest.mark.nightly
def test_a_program_of_sixty_layers(
    browser: Browser, computed: Callable[[Path], float], tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"vocab": 50257, "seq": 2048, "width": 1024, "heads": 16}
    with torch.device("meta"):
        model = GPT(GPTConfig(layers=LAYERS, **sizes))
    path = moec.compile(model, plan="pr_moe", verify="off").show(tmp_path / "page.html")
    assert path.stat().st_size < MOST_BYTES
    assert computed(path) < MOST_SECONDS
    assert min(waited(browser, path) for _ in range(3)) < MOST_SECONDS


def waited(browser: Browser, path: Path) -> float:
    """Seconds on the clock until the first picture is drawn; of several times the best is the page's own."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    started = time.perf_counter()
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    seconds = time.perf_counter() - started
    page.close()
    return seconds
