"""Layer selectors against plain Python: slices, indices, comparisons and fnmatch."""

from __future__ import annotations

import operator
from fnmatch import fnmatchcase
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import PlanError
from moec.plan import Layers

COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


def names_of(count: int) -> list[str]:
    return [f"transformer.h.{site}.mlp" for site in range(count)]


def resolve(spec: int | str | list[int], count: int) -> list[int]:
    return Layers.parse(spec).resolve(count, names_of(count))


def expect(spec: int | str | list[int], count: int, wanted: list[int]) -> None:
    """The selector gives `wanted`, or PlanError when that is empty."""
    if wanted:
        assert resolve(spec, count) == sorted(set(wanted))
    else:
        with pytest.raises(PlanError, match="selects nothing"):
            resolve(spec, count)


ends = st.none() | st.integers(-40, 40)


@given(st.integers(1, 30), ends, ends, ends.filter(lambda step: step != 0), st.booleans())
def test_slices_are_pythons(
    count: int, start: int | None, stop: int | None, step: int | None, spaces: bool
) -> None:
    parts = ["" if part is None else str(part) for part in (start, stop, step)]
    text = (" : " if spaces else ":").join(parts if step is not None else parts[:2])
    expect(text, count, list(range(count))[start:stop:step])


@given(st.integers(1, 30), st.lists(st.integers(-35, 35), min_size=1, max_size=6))
def test_indices_are_pythons(count: int, indices: list[int]) -> None:
    if all(-count <= index < count for index in indices):
        assert resolve(indices, count) == sorted({range(count)[index] for index in indices})
    else:
        with pytest.raises(PlanError, match=f"an index from {-count} to {count - 1}"):
            resolve(indices, count)


@given(st.integers(1, 30), st.sampled_from(sorted(COMPARE)), st.decimals(0, 1, places=3))
def test_depth_is_compared_exactly(count: int, sign: str, bound: object) -> None:
    wanted = [site for site in range(count) if COMPARE[sign](Fraction(site, count), Fraction(str(bound)))]
    expect(f"depth{sign}{bound}", count, wanted)


@pytest.mark.parametrize("pattern", ["*", "*.h.1?.mlp", "*.[02].mlp", "transformer.h.3.mlp", "*7*", "h.*"])
@pytest.mark.parametrize("count", [1, 12, 24])
def test_globs_are_fnmatch(pattern: str, count: int) -> None:
    wanted = [site for site, name in enumerate(names_of(count)) if fnmatchcase(name, pattern)]
    expect(pattern, count, wanted)


def test_the_forms_of_the_design() -> None:
    assert resolve("all", 5) == [0, 1, 2, 3, 4]
    assert resolve("1::2", 7) == [1, 3, 5]
    assert resolve([1, 3], 7) == [1, 3]
    assert resolve("-2:", 7) == [5, 6]
    assert resolve("depth>0.5", 4) == [3]
    assert resolve("depth >= 0.5", 4) == [2, 3]
    assert resolve("depth<=0.3", 10) == resolve("depth<0.4", 10) == [0, 1, 2, 3]  # floats err both ways
    assert resolve([3, 1, -4, 3], 7) == [1, 3]
    assert resolve(3, 7) == resolve("3", 7) == resolve("-4", 7) == [3]


def test_parsing_again_changes_nothing() -> None:
    layers = Layers.parse("1 :: 2")
    assert layers == Layers.parse("1::2") == Layers.parse(layers)
    assert layers.text == '"1::2"'
    assert Layers.parse([1, -1]).text == "[1, -1]"


@pytest.mark.parametrize(
    "spec",
    [
        "",
        " ",
        "1:2:3:4",
        "1:two",
        "depth",
        "depht>0.5",
        "depth~1",
        "depth>",
        "[1,3]",
        "1,3",
        "::0",
        "9" * 5000,
    ],
)
def test_text_that_is_no_selector_is_refused(spec: str) -> None:
    if spec == "depth":  # a module may well be called that; no site here is
        with pytest.raises(PlanError, match="selects nothing"):
            resolve(spec, 3)
        return
    with pytest.raises(PlanError, match="needed"):
        Layers.parse(spec)


@pytest.mark.parametrize("spec", [True, 1.5, None, [], [True], ["1"], {}])
def test_values_that_are_no_selector_are_refused(spec: object) -> None:
    with pytest.raises(PlanError, match=r'needed  "all", 3, \[1, 3\]'):
        Layers.parse(spec)  # type: ignore[arg-type]


def test_a_quoted_list_is_told_to_drop_its_quotes() -> None:
    with pytest.raises(PlanError, match="a list, without the quotes"):
        Layers.parse("[1, 3]")


def test_selecting_nothing_lists_what_there_is() -> None:
    with pytest.raises(PlanError) as caught:
        Layers.parse("transformer.h.2.mpl").resolve(3, names_of(3))
    assert str(caught.value) == (
        "layers\n"
        '  found   layers = "transformer.h.2.mpl", which selects nothing\n'
        "  needed  one that selects some of the 3 feed-forwards of the model: "
        "0 transformer.h.0.mlp, 1 transformer.h.1.mlp, 2 transformer.h.2.mlp\n"
        "  nearest 'transformer.h.2.mlp'"
    )


def test_an_index_outside_lists_what_there_is_and_shortens_long_lists() -> None:
    with pytest.raises(PlanError) as caught:
        resolve([24], 24)
    assert caught.value.found == "index 24"
    assert caught.value.needed.startswith("an index from -24 to 23 (24 feed-forwards of the model: 0 trans")
    assert ", … 15 more …, 21 transformer.h.21.mlp, 22 " in caught.value.needed


def test_a_model_without_feed_forwards_is_refused() -> None:
    with pytest.raises(PlanError, match="no feed-forwards of the model"):
        resolve("all", 0)


def test_sites_and_names_must_agree() -> None:
    with pytest.raises(ValueError, match="3 sites need as many names, got 2"):
        Layers.parse("all").resolve(3, names_of(2))
