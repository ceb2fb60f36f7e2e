"""The page beside its pictures: search, texts, ledger, links, help, themes, paper."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from tests.view.conftest import Open
from tests.view.timelines import timeline

EXPERTS = "#step=lift_experts&section=2&layer=1"


def searched(page: Page, text: str) -> None:
    """Search, and go to the first that is found."""
    page.keyboard.press("/")
    page.locator("#search-input").fill(text)
    page.keyboard.press("Enter")
    expect(page.locator("#search")).to_be_hidden()


@pytest.mark.parametrize(
    ("typed", "step", "chosen"),
    [
        ("drop_noops", "drop_noops", None),
        ("moe_7", "lift_experts", "moe_7"),
        ("moe_7.up.weight", "lift_experts", "moec.grouped_linear"),
        ("blocks.9.mlp.up", "lift_experts", "moec.grouped_linear"),
        ("c10d.all_to_all", "lift_experts", "c10d.all_to_all_single"),
        ("gpt.py:65", "lift_experts", "layer_norm"),
    ],
)
def test_search_goes_where_it_stands(open_page: Open, typed: str, step: str, chosen: str | None) -> None:
    page = open_page(timeline(12))
    searched(page, typed)
    expect(page.locator("#heading h2")).to_contain_text(step)
    if chosen is None:
        expect(page.locator("#inspector")).to_be_hidden()
    else:
        expect(page.locator("#inspector h2")).to_contain_text(chosen)
        expect(page.locator(".item.selected").first).to_be_in_viewport()


def test_search_is_driven_by_keys_and_says_when_nothing_is_found(open_page: Open) -> None:
    page = open_page(timeline())
    page.keyboard.press("/")
    page.locator("#search-input").fill("linear")
    options = page.locator("#found li")
    expect(options.first).to_have_attribute("aria-selected", "true")
    page.keyboard.press("ArrowDown")
    expect(options.nth(1)).to_have_attribute("aria-selected", "true")
    page.locator("#search-input").fill("no such thing")
    expect(page.locator("#search")).to_contain_text("Nothing is called “no such thing”")
    page.keyboard.press("Escape")
    expect(page.locator("#search")).to_be_hidden()


def test_the_difference_is_coloured_and_signed(open_page: Open) -> None:
    page = open_page(timeline())
    page.get_by_role("tab", name="Text").click()
    expect(page.locator("#text .line.created")).to_have_text("+ scores = moec.router(x)\n")
    expect(page.locator("#text .line.removed")).to_have_text("- h = linear(x)\n")
    page.keyboard.press("k")
    expect(page.locator("#text")).to_contain_text("The text is the same before and after drop_noops")


def test_program_and_plan_are_there_line_by_line(open_page: Open) -> None:
    page = open_page(timeline(), EXPERTS + "&select=r1")
    page.keyboard.press("3")
    expect(page.locator("#program b")).to_have_text("forward")
    expect(page.locator("#program .line")).to_have_count(7)
    page.keyboard.press("5")
    expect(page.locator("#plan .chosen")).to_have_text(
        [re.compile(line) for line in (r"\[moe\]", "layers", "experts")]
    )


def test_the_ledger_is_filtered_and_sorted(open_page: Open) -> None:
    page = open_page(timeline(12), "#tab=ledger")
    rows = page.locator("#ledger tbody tr")
    expect(rows).to_have_count(24)
    expect(page.locator("#ledger tbody td.weight").nth(4)).to_have_text("blocks.2.mlp.down.weight")
    page.locator("#ledger-status").select_option("rewritten")
    expect(rows).to_have_count(12)
    page.locator("#ledger-filter").fill("blocks.11")
    expect(rows).to_have_count(2)
    expect(page.locator("#ledger .sum")).to_have_text("2 of 24 products")
    page.locator("#ledger-filter").fill("")
    header = page.get_by_role("button", name="weight")
    header.click()
    expect(page.locator("th").first).to_have_attribute("aria-sort", "descending")
    expect(rows.first).to_contain_text("blocks.11.mlp.up.weight")
    expect(page.locator("#ledger")).to_contain_text("layer 2 was left dense")


def test_a_link_shows_the_same_again(open_page: Open) -> None:
    page = open_page(timeline(12), EXPERTS)
    page.locator("#choose-layer").select_option("5")
    page.locator("#choose-overlay").select_option("bytes")
    page.locator('svg[data-side="after"] .region').click()
    link = page.evaluate("location.hash")
    again = open_page(timeline(12), link)
    expect(again.locator("#inspector h2")).to_contain_text("moe_5")
    expect(again.locator("#choose-overlay")).to_have_value("bytes")
    expect(again.locator('svg[data-side="after"] .item')).to_have_count(
        page.locator('svg[data-side="after"] .item').count()
    )


def test_a_link_to_what_is_not_there_shows_the_beginning(open_page: Open) -> None:
    page = open_page(timeline(), "#step=gone&section=99&layer=99&open=7+x&select=n99&overlay=gone&tab=gone")
    expect(page.locator("#heading h2")).to_contain_text("lift_experts")
    expect(page.locator("#inspector")).to_be_hidden()
    expect(page.locator("#picture")).to_be_visible()


def test_help_lists_the_keys_and_the_signs(open_page: Open) -> None:
    page = open_page(timeline())
    page.keyboard.press("?")
    for text in ("next pass", "search", "unfold or fold all regions", "removed: not there after"):
        expect(page.locator("#help")).to_contain_text(text)
    page.keyboard.press("Escape")
    expect(page.locator("#help")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_are_readable_and_one_can_change(open_page: Open, scheme: str) -> None:
    page = open_page(timeline(), EXPERTS, color_scheme=scheme)
    light = lambda: page.evaluate(LIGHTNESS, "body")
    assert (light()[0] > 0.5) == (scheme == "light")
    for selector in (
        "body",
        "#heading .summary, #heading summary",
        ".step .seconds",
        ".status.created b",
        ".proof b",
    ):
        background, ink = page.evaluate(LIGHTNESS, selector)
        brighter, darker = max(background, ink), min(background, ink)
        assert (brighter + 0.05) / (darker + 0.05) >= 4.5, f"{selector}: too little contrast (WCAG AA)"
    before = light()
    page.keyboard.press("d")
    assert (light()[0] > 0.5) != (before[0] > 0.5)
    page.reload()
    assert (light()[0] > 0.5) != (before[0] > 0.5)


# Relative luminance of the page's ground and of an element's text, as WCAG 2 defines it.
LIGHTNESS = """selector => {
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map((each) => each / 255)
      .map((each) => (each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = getComputedStyle(document.body).backgroundColor;
  return [luminance(ground), luminance(getComputedStyle(document.querySelector(selector)).color)];
}"""


def test_paper_shows_the_step_its_text_and_the_ledger(open_page: Open) -> None:
    page = open_page(timeline(), EXPERTS + "&tab=text", color_scheme="dark")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    for shown in ("#heading", "#picture svg", "#text", "#ledger table"):
        expect(page.locator(shown).first).to_be_visible()
    for hidden in ("#steps", "#tabs", ".actions", ".toolbar"):
        expect(page.locator(hidden)).to_be_hidden()
    expect(page.locator("#ledger tbody tr")).to_have_count(8)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    printed = page.pdf(format="A4")
    assert printed.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) >= 2


def test_motion_can_be_done_without(open_page: Open) -> None:
    page = open_page(timeline(), EXPERTS, reduced_motion="reduce")
    page.keyboard.press("+")
    moved = page.evaluate("document.querySelector('.view').getAttribute('transform')")
    page.keyboard.press("0")
    assert page.evaluate("document.querySelector('.view').getAttribute('transform')") != moved
