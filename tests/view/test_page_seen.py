"""The page in a browser: what one sees of a timeline, and what pointer and keys do."""

from __future__ import annotations

import re
from dataclasses import replace

from playwright.sync_api import Locator, Page, expect

from tests.view.conftest import Open
from tests.view.timelines import node, timeline

EXPERTS = "#step=lift_experts&section=2&layer=1"


# How many pairs of operators lie over one another.
OVERLAPPING = """svg => {
  const boxes = [...svg.querySelectorAll('.operator > .body')].map((body) => body.getBoundingClientRect());
  const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter((b) => !apart(a, b))).length;
}"""


def item(page: Page, side: str, name: str) -> Locator:
    """An operator or folded region of a picture, by its first line."""
    return page.locator(f'svg[data-side="{side}"] .item', has=page.get_by_text(name, exact=True))


def region(page: Page, side: str, name: str) -> Locator:
    """A region, folded or not."""
    return page.locator(f'svg[data-side="{side}"] .item', has_text=re.compile(f"[▸▾] {re.escape(name)}"))


def current(page: Page) -> str:
    """The name of the step that is looked at."""
    return page.locator("#heading h2").evaluate("heading => heading.firstChild.textContent")


def test_it_opens_on_the_pass_that_made_expert_layers(open_page: Open) -> None:
    page = open_page(timeline(12))
    assert page.title() == "GPT · moec"
    assert current(page) == "lift_experts"
    expect(page.locator("#heading")).to_contain_text("8 created")
    expect(page.locator("#heading .proof")).to_contain_text("proved")
    expect(page.locator("#heading .proof")).to_contain_text("1.3e-15 ≤ 1.0e-10")
    expect(page.locator("#top")).to_contain_text("9,989,572")


def test_the_passes_are_listed_with_verdicts_and_counts(open_page: Open) -> None:
    entries = open_page(timeline()).locator("#steps .step")
    expect(entries).to_have_count(4)
    assert entries.all_inner_texts()[0].split("\n")[0:1] == ["captured → sparse"]
    lifted = entries.filter(has_text="lift_experts")
    expect(lifted).to_contain_text("+8 −2 →2 ~2")
    expect(lifted).to_contain_text("250 ms")
    expect(lifted.locator(".verdict")).to_have_text("✓")
    expect(entries.filter(has_text="drop_noops").locator(".verdict")).to_have_text("○")


def test_what_is_kept_stands_at_the_same_place_on_both_sides(open_page: Open) -> None:
    page = open_page(timeline(), EXPERTS + "&open=0+1")
    places = [
        page.locator(f'svg[data-side="{side}"]').evaluate(
            "svg => Object.fromEntries([...svg.querySelectorAll('.item.operator')].map(item => "
            "[item.dataset.key.split(' ')[1], item.getAttribute('transform')]))"
        )
        for side in ("before", "after")
    ]
    both = set(places[0]) & set(places[1])
    assert both == {"n0", "n1", "n3", "n8", "n9"}
    assert {key: places[0][key] for key in both} == {key: places[1][key] for key in both}
    assert set(places[0]) - both == {"n2"}
    assert set(places[1]) - both == {"n4", "n5", "n6", "n7"}
    # The grouped product stands where the one stood that it was made from; nothing else shares a place.
    assert places[1]["n5"] == places[0]["n2"]
    assert len({*places[0].values(), *places[1].values()}) == 9


def test_no_two_operators_of_a_side_overlap(open_page: Open) -> None:
    page = open_page(timeline(), EXPERTS + "&open=0+1")
    overlapping = page.locator('svg[data-side="after"]').evaluate(OVERLAPPING)
    assert overlapping == 0


def test_every_status_has_a_sign_and_a_line_of_its_own(open_page: Open) -> None:
    page = open_page(timeline(), EXPERTS + "&open=0+1")
    lines = set()
    for side, name, sign in (
        ("after", "moec.router", "+"),
        ("before", "linear", "−"),
        ("after", "gelu", "→"),
        ("after", "add", "~"),
    ):
        found = item(page, side, name)
        expect(found.locator(".sign text")).to_have_text(sign)
        lines.add(found.locator("> .edge").evaluate("edge => getComputedStyle(edge).strokeDasharray"))
    kept = item(page, "after", "layer_norm")
    expect(kept.locator(".sign")).to_have_count(0)
    # Created is solid as kept is, and thicker.
    width = "edge => parseFloat(getComputedStyle(edge).strokeWidth)"
    assert len(lines) == 4
    assert item(page, "after", "moec.router").locator("> .edge").evaluate(width) > kept.locator(
        "> .edge"
    ).evaluate(width)


def test_regions_unfold_by_click_and_by_key(open_page: Open) -> None:
    page = open_page(timeline(), EXPERTS)
    expect(item(page, "after", "moec.router")).to_have_count(0)
    region(page, "after", "moe_1").click()
    expect(item(page, "after", "moec.router")).to_be_visible()
    expect(region(page, "after", "moe_1")).to_have_attribute("aria-expanded", "true")
    region(page, "after", "moe_1").focus()
    page.keyboard.press("Enter")
    expect(item(page, "after", "moec.router")).to_have_count(0)
    page.keyboard.press("e")
    expect(item(page, "before", "linear")).to_be_visible()
    page.keyboard.press("e")
    expect(item(page, "before", "linear")).to_have_count(0)


def test_arrows_and_letters_step_through_the_passes(open_page: Open) -> None:
    page = open_page(timeline())
    page.keyboard.press("ArrowLeft")
    assert current(page) == "drop_noops"
    page.keyboard.press("k")
    assert current(page) == "captured"
    page.keyboard.press("k")
    assert current(page) == "captured → sparse"
    page.keyboard.press("k")
    assert current(page) == "captured → sparse"
    for _ in range(3):
        page.keyboard.press("j")
    assert current(page) == "lift_experts"
    page.keyboard.press("ArrowRight")
    assert current(page) == "lift_experts"
    page.go_back()
    expect(page.locator("#heading h2")).to_contain_text("drop_noops")


def test_what_did_not_change_is_folded_away_until_asked_for(open_page: Open) -> None:
    page = open_page(timeline(12))
    listed = page.locator(".section")
    expect(listed).to_have_count(1)
    expect(listed).to_contain_text("blocks 1, 3 … 11")
    expect(listed).to_contain_text("×6 alike")
    page.get_by_text("3 unchanged").click()
    expect(listed).to_have_count(4)
    page.keyboard.press("[")
    expect(page.locator('.section[aria-pressed="true"]')).to_contain_text("blocks 0, 2 … 10")
    expect(page.locator(".pane")).to_have_count(1)
    page.keyboard.press("u")
    expect(listed).to_have_count(2)


def test_the_layers_that_differ_are_told(open_page: Open) -> None:
    page = open_page(timeline(3))
    expect(page.locator(".strip .sum")).to_have_text("3 layers: ×2 alike; 1 differ: 1")
    expect(page.locator(".cell")).to_have_count(3)


def test_names_are_those_of_the_layer_that_is_chosen(open_page: Open) -> None:
    page = open_page(timeline(12), EXPERTS)
    expect(region(page, "after", "moe_1")).to_be_visible()
    page.locator("#choose-layer").select_option("7")
    expect(region(page, "after", "moe_7")).to_be_visible()
    page.locator(".cell").nth(11).click()
    expect(region(page, "after", "moe_11")).to_be_visible()
    assert "{layer}" not in page.locator("#picture").inner_text()


def test_an_operator_tells_where_it_comes_from(open_page: Open) -> None:
    page = open_page(timeline(), EXPERTS + "&open=1")
    item(page, "after", "moec.grouped_linear").click()
    told = page.locator("#inspector")
    for text in (
        "created",
        "up = moec.grouped_linear(x)",
        "blocks.1.mlp",
        "gpt.py:52",
        "return self.down(F.gelu(self.up(x_BSD)))",
        "By lift_experts",
        "before:  y = ffn_3(x)",
        "experts = 64",
        "bf16 [B, S, 96]",
        "2*B*S*36864",
        "B=8, S=64",
        "dim 0 over expert",
        "moe_1.up.weight",
        "← blocks.1.mlp.up.weight",
        "2,359,296",
    ):
        expect(told).to_contain_text(text)
    told.get_by_role("button", name="linear h").click()
    expect(told.locator("h2")).to_contain_text("linear")
    expect(told).to_contain_text("removed")
    page.keyboard.press("Escape")
    expect(told).to_be_hidden()


def test_a_region_tells_its_settings_and_its_operators(open_page: Open) -> None:
    page = open_page(timeline(), EXPERTS)
    region(page, "after", "moe_1").click()
    told = page.locator("#inspector")
    for text in ("moe_1", "region · moe", "top_k", 'layers = "1::2"', "2,365,440"):
        expect(told).to_contain_text(text)
    expect(told.locator("li")).to_have_count(5)


def test_keys_reach_everything_in_a_picture(open_page: Open) -> None:
    page = open_page(timeline(), EXPERTS + "&open=1")
    expect(page.locator('svg[data-side="after"] .item[tabindex="0"]')).to_have_count(1)
    page.locator('svg[data-side="after"] .item[tabindex="0"]').focus()
    seen = []
    for _ in range(8):
        seen.append(page.evaluate("document.activeElement.getAttribute('aria-label')"))
        page.keyboard.press("ArrowDown")
    assert seen[0] == "input, x, bf16 [B, S, 96], kept"
    assert "moec.router, scores, bf16 [B, S, 96], created" in seen
    assert len(set(seen)) == 8
    page.keyboard.press("Enter")
    expect(page.locator("#inspector")).to_be_visible()


def test_overlays_are_told_in_words_and_in_a_legend(open_page: Open) -> None:
    page = open_page(timeline(), EXPERTS + "&open=1")
    chosen, legend = page.locator("#choose-overlay"), page.locator("#overlay-legend")
    expected = {
        "parameters": ("moec.grouped_linear", "2.36 M", "most: 2.36 M"),
        "flops": ("moec.router", "1.00 MFLOP", "most: 7.00 MFLOP"),
        "bytes": ("moec.grouped_linear", "9.00 MB", "most: 9.00 MB"),
        "axis": ("moec.grouped_linear", "expert", "expert"),
        "collective": ("c10d.all_to_all_single", "all_to_all over expert", "all_to_all over expert"),
        "certificate": ("moec.combine", "1.3e-15 ≤ 1.0e-10", "1.3e-15 ≤ 1.0e-10"),
        "fused": ("moec.combine", "fuse_moe_ffn", "fuse_moe_ffn"),
    }
    for name, (operator, value, most) in expected.items():
        chosen.select_option(name)
        expect(item(page, "after", operator).locator(".second")).to_have_text(value)
        expect(item(page, "after", operator).locator(".heat, .tint")).to_have_count(1)
        expect(legend).to_contain_text(most)
    expect(page.locator("#steps .step").filter(has_text="lift_experts")).not_to_contain_text("1.3e-15")
    chosen.select_option("certificate")
    expect(page.locator("#steps .step").filter(has_text="lift_experts")).to_contain_text("1.3e-15 ≤ 1.0e-10")


def test_a_folded_region_adds_up(open_page: Open) -> None:
    page = open_page(timeline(), EXPERTS + "&overlay=flops")
    expect(region(page, "after", "moe_1").locator(".second")).to_have_text("8.00 MFLOP")


def test_wheel_and_drag_move_both_pictures_and_fit_brings_them_back(open_page: Open) -> None:
    page = open_page(timeline(), EXPERTS)
    views = page.locator(".view")
    places = lambda: views.evaluate_all("views => views.map(view => view.getAttribute('transform'))")
    before = places()
    page.locator('svg[data-side="after"]').hover(position={"x": 20, "y": 20})
    page.mouse.wheel(0, 120)
    page.wait_for_function(
        "was => document.querySelector('.view').getAttribute('transform') !== was", arg=before[0]
    )
    assert len(set(places())) == 1
    page.keyboard.press("+")
    page.keyboard.press("0")
    page.wait_for_function(
        "was => document.querySelector('.view').getAttribute('transform') === was", arg=before[0]
    )
    assert places() == before


def test_a_step_of_which_only_the_text_is_left_leads_to_it(open_page: Open) -> None:
    whole = timeline()
    texts = [replace(step, sections=(), counts={}) for step in whole.steps[:-1]]
    page = open_page(replace(whole, steps=(*texts, whole.steps[-1])))
    assert current(page) == "captured → sparse"
    page.locator("#steps .step").filter(has_text="lift_experts").click()
    expect(page.locator("#steps [aria-current]")).to_contain_text("text changed")
    page.get_by_role("button", name="what it changed").click()
    expect(page.locator("#text .line.created")).to_be_visible()
    page.keyboard.press("1")
    page.keyboard.press("k")
    expect(page.locator("#picture")).to_contain_text("This step left no graph")


def test_what_a_pass_numbered_anew_has_its_old_number_before(open_page: Open) -> None:
    whole = timeline(4)
    lifted = whole.steps[2]
    renumbered = [replace(each, before=(4, 9)) if each.changed else each for each in lifted.sections]
    steps = (*whole.steps[:2], replace(lifted, sections=tuple(renumbered)), *whole.steps[3:])
    page = open_page(replace(whole, steps=steps), "#step=lift_experts&section=2&layer=3")
    expect(region(page, "before", "ffn_9")).to_be_visible()
    expect(region(page, "after", "moe_3")).to_be_visible()


def test_sizes_are_drawn_where_they_are_asked_for(open_page: Open) -> None:
    whole = timeline()
    dense = whole.drawings[1]
    entering = node("kept", "S", "input", value="S")
    product = node("kept", "m", "mul", value="")
    drawing = replace(
        dense, nodes=(*dense.nodes, entering, product), edges=(*dense.edges, (len(dense.nodes), 1, 0))
    )
    page = open_page(
        replace(whole, drawings=(whole.drawings[0], drawing, *whole.drawings[2:])),
        "#step=drop_noops&section=1",
    )
    expect(page.locator(".operator.end")).to_have_count(2)
    page.get_by_text("2 sizes").click()
    expect(item(page, "after", "mul")).to_be_visible()
    expect(page.locator(".operator.end")).to_have_count(3)
    page.keyboard.press("s")
    expect(page.locator(".operator.end")).to_have_count(2)
    page.keyboard.press("/")
    page.keyboard.type("mul")
    page.keyboard.press("Enter")
    expect(item(page, "after", "mul")).to_be_visible()


def test_an_operator_placed_otherwise_is_marked(open_page: Open) -> None:
    whole = timeline()
    dense = whole.drawings[1]
    norm = dense.nodes[1]
    assert norm.after is not None
    moved = replace(norm, after=replace(norm.after, placement="dim 0 over data"))
    drawing = replace(dense, nodes=(dense.nodes[0], moved, *dense.nodes[2:]))
    page = open_page(
        replace(whole, drawings=(whole.drawings[0], drawing, *whole.drawings[2:])),
        "#step=drop_noops&section=1",
    )
    expect(page.locator("#heading .counts")).to_contain_text("4 marked")
    expect(page.locator("#heading .counts")).to_contain_text("36 kept")
    expect(item(page, "after", "layer_norm").locator(".sign text")).to_have_text("•")
    expect(page.locator(".pane")).to_have_count(2)
    item(page, "after", "layer_norm").click()
    expect(page.locator("#inspector")).to_contain_text("none → dim 0 over data")
