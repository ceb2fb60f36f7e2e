"""Whatever names, paths, docstrings and lines of source say: it is shown as text, and nothing of it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, expect

from moec.view.page import write_page
from moec.view.timeline import Timeline
from tests.view.conftest import Open
from tests.view.timelines import timeline

ATTACKS = (
    "</script><script>window.owned=1</script>",
    "<img src=x onerror='window.owned=1'>",
    "<!--<script>",
    "\"><svg onload='window.owned=1'>",
    "'-(window.owned=1)-'",
    "${window.owned=1}{{script}}&lt;b&gt;",
    "\u2028window.owned=1\u2029",
    "\x1b[31m[red]javascript:window.owned=1",
)
EVIL = " ".join(ATTACKS)


def poisoned(value: Any) -> Any:
    """The same data, where every text ends with attacks; what is compared (kinds, statuses) stays."""
    if isinstance(value, str):
        return value + EVIL
    if isinstance(value, tuple):
        return tuple(map(poisoned, value))
    if isinstance(value, dict):
        return {poisoned(key): poisoned(each) for key, each in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        kept = {"status", "verdict", "sizes"} | ({"kind"} if hasattr(value, "sections") else set())
        return replace(
            value,
            **{
                name: poisoned(getattr(value, name))
                for name in value.__dataclass_fields__
                if name not in kept
            },
        )
    return value


def hostile() -> Timeline:
    """A timeline in which every text attacks; counts go by status, so their keys stay."""
    evil: Timeline = poisoned(timeline())
    steps = tuple(
        replace(step, counts=kept.counts) for step, kept in zip(evil.steps, timeline().steps, strict=True)
    )
    ledger = tuple(replace(row, status=f"kept{EVIL}") for row in evil.ledger)
    return replace(evil, steps=steps, ledger=ledger)


def test_nothing_of_a_program_runs(open_page: Open) -> None:
    page = open_page(hostile())
    elements = page.locator("script").count()
    page.keyboard.press("e")
    for tab in "12345":
        page.keyboard.press(tab)
    page.keyboard.press("1")
    for at in range(page.locator('svg[data-side="after"] .item').count()):
        page.locator('svg[data-side="after"] .item').nth(at).dispatch_event("click")
    page.keyboard.press("/")
    page.locator("#search-input").fill("owned")
    expect(page.locator("#found li").first).to_be_visible()
    page.keyboard.press("Escape")
    for _ in range(4):
        page.keyboard.press("k")
        page.keyboard.press("o")
    assert page.evaluate("window.owned") is None
    assert page.locator("script").count() == elements == 2
    assert page.locator("img").count() == 0
    assert page.locator("[onerror], [onload]").count() == 0


def test_attacks_are_shown_as_they_were_written(open_page: Open) -> None:
    page = open_page(hostile(), "#step=x")
    assert page.title().startswith(f"GPT{EVIL}"[:30])
    assert page.locator(".model").evaluate("model => model.textContent") == f"GPT{EVIL}"
    page.keyboard.press("3")
    program = page.locator("#program").evaluate("program => program.textContent")
    for attack in ATTACKS:
        assert attack in program


def test_the_policy_stops_what_the_page_itself_would_not_do(browser: Browser, tmp_path: Path) -> None:
    """Even a mistake in the page's own script could not run text: the browser refuses."""
    page = browser.new_page()
    page.goto(write_page(timeline(), tmp_path / "page.html").as_uri())
    attempt = "document.body.innerHTML = '<b>x</b>'"
    refused = page.evaluate(
        f"() => {{ try {{ {attempt}; return 'made'; }} catch (error) {{ return error.name; }} }}"
    )
    page.close()
    assert refused == "TypeError"
