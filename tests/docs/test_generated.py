"""Pages that are made: of every pass one, with a real example, and of every key of the plan a row."""

from __future__ import annotations

import pytest

from docs.generate.docstring import read_docstring
from docs.generate.examples import DENSE, EXAMPLES, Example, Screen
from docs.generate.pass_pages import all_passes, doc_of, groups, index_page, name_of, pass_page
from docs.generate.plan_page import kind_of, plan_page
from moec.plan import Plan
from moec.plan.moe import LayerSettings, Moe

GROUPS = {kind: group for group in groups() for kind in group.passes}


def test_every_pass_is_listed_once_and_has_an_example() -> None:
    listed = [kind for group in groups() for kind in group.passes]
    assert sorted(map(name_of, listed)) == sorted(map(name_of, all_passes()))
    assert set(map(name_of, listed)) == set(EXAMPLES)
    page = index_page()
    assert all(f"({name_of(kind)}.md)" in page for kind in listed)


@pytest.mark.parametrize("kind", all_passes(), ids=name_of)
def test_every_docstring_is_taken_apart(kind: type) -> None:
    """A pass draws its rewrite, and says its contract in a line that begins with the word."""
    doc = doc_of(kind)
    assert doc.title
    assert "after:" in "\n".join(doc.drawing)
    assert doc.contract
    assert "Contract:" not in doc.assumes + "".join(doc.drawing) + "".join(doc.prose)


def test_a_docstring_that_draws_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="without a drawing"):
        read_docstring("Do something.\n\nAssumes: nothing.")


def test_pages_show_what_their_program_prints() -> None:
    screen = Screen()
    shown = [kind for kind in all_passes() if EXAMPLES[name_of(kind)].setup == DENSE]
    assert len(shown) > 10
    for kind in shown:
        page = pass_page(kind, GROUPS[kind], screen)
        assert screen.printed(EXAMPLES[name_of(kind)]).splitlines()[0] in page
        assert f"\n# {name_of(kind)}\n" in page


def test_an_example_that_shows_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = all_passes()[0]
    monkeypatch.setitem(EXAMPLES, name_of(kind), Example("x = 1", "print()"))
    with pytest.raises(ValueError, match="shows nothing"):
        pass_page(kind, GROUPS[kind], Screen())


def test_what_setups_share_runs_once() -> None:
    screen, once = Screen(), "made = []"
    more = f"{once}\nmade.append(len(made))"
    assert screen.printed(Example(once, "print(made)")) == "[]"
    assert screen.printed(Example(more, "print(made)")) == "[0]"
    assert screen.printed(Example(more, "print(made)")) == "[0]"


def test_the_plan_page_has_every_key() -> None:
    page = plan_page()
    tables = [LayerSettings, Moe, *(type(getattr(Plan(), name)) for name in ("parallel", "train", "compile"))]
    for table in tables:
        for key, field in table.model_fields.items():
            row = next(line for line in page.splitlines() if line.startswith(f"| `{key}` |"))
            assert field.description
            assert " ".join(field.description.split()).replace("|", "\\|") in page, row
    assert "| `top_k` | whole number, 1 or more | `1` |" in page
    assert "| `layers` | a [selector](#layer-selectors) | *required* |" in page
    assert all(f"### `{name}`" in page for name in Plan.shipped_names())


def test_kinds_are_told_in_words() -> None:
    assert (
        kind_of({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, {})
        == "number, more than 0, at most 1"
    )
    assert kind_of({"anyOf": [{"type": "integer"}, {"const": "auto"}, {"type": "null"}]}, {}) == (
        'whole number or `"auto"`'
    )
    pair = {"type": "array", "prefixItems": [{"type": "number"}, {"type": "number"}]}
    assert kind_of(pair, {}) == "2 values, each a number"
