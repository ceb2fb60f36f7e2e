"""The picture shows what was recorded, says what was not, and can be read by everyone."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import ArtifactError
from moec.runtime.pictures.expert_run import Series, read_run
from moec.runtime.pictures.experts import draw_experts, parts_of, require_drawable_run, save_picture
from moec.runtime.pictures.load import edges_of, scale_of, shades
from moec.runtime.pictures.style import apart
from tests.runtime.pictures.runs import write_run

PYRAMID = {"moe_1": 4, "moe_3": 8}


def drawn(folder: Path, of: str = "experts", name: str = "picture.svg") -> str:
    """The texts of an SVG of the run in `folder`."""
    picture = save_picture(draw_experts(read_run(folder), of), folder / name).read_text()
    ElementTree.fromstring(picture)
    return picture


def test_a_run_on_ranks_shows_everything(tmp_path: Path) -> None:
    picture = drawn(write_run(tmp_path / "run", PYRAMID, [5, 10, 20]))
    for text in (
        "Experts of run, from step 5 to 20",
        "moe_1 · 4 experts",
        "moe_3 · 8 experts",
        "balanced",
        "no rows",
        "Dropped, % of the tokens' choices",
        "Router entropy over log E (1: undecided)",
        "Bytes sent in a step, by axis",
        "expert_4 · 40 messages",
    ):
        assert f"<!-- {text}" in picture, text


def test_one_step_and_one_part(tmp_path: Path) -> None:
    write_run(tmp_path, PYRAMID, [7])
    assert f"Experts of {tmp_path.name}, after step 7" in drawn(tmp_path)
    alone = drawn(tmp_path, "entropy")
    assert "Router entropy" in alone
    assert "balanced" not in alone
    png = save_picture(draw_experts(read_run(tmp_path), "load"), tmp_path / "load.png")
    assert png.read_bytes().startswith(b"\x89PNG")


def test_more_layers_than_panels_are_shown_at_four_steps(tmp_path: Path) -> None:
    experts = {f"moe_{index}": 16 if index > 56 else 8 for index in range(60)}
    picture = drawn(write_run(tmp_path, experts, range(10, 210, 10)))
    for text in ("after step 10", "after step 70", "after step 140", "after step 200", "moe_0", "moe_56"):
        assert f"<!-- {text} -->" in picture, text
    assert "moe_3 · 8 experts" not in picture
    few = save_picture(draw_experts(read_run(tmp_path).only(["moe_5*"])), tmp_path / "few.svg").read_text()
    assert "moe_57 · 16 experts" in few


def test_an_older_run_is_drawn_as_far_as_it_goes(tmp_path: Path) -> None:
    write_run(tmp_path, PYRAMID, [5, 10], observed=False, evaluations=[5, 10])
    picture = drawn(tmp_path)
    assert "load on held-out text" in picture
    assert "Router entropy" not in picture
    with pytest.raises(ArtifactError, match=r"no router entropy[\s\S]*--of load or dropped"):
        draw_experts(read_run(tmp_path), "entropy")
    with pytest.raises(ArtifactError, match="one process alone sends nothing"):
        draw_experts(read_run(tmp_path), "traffic")


def test_a_dense_run_has_nothing_but_traffic(tmp_path: Path) -> None:
    assert parts_of(read_run(write_run(tmp_path / "ranks", {}, [5])), "experts") == ["traffic"]
    assert "Bytes sent in a step" in drawn(tmp_path / "ranks")
    alone = read_run(write_run(tmp_path / "alone", {}, [5], traffic={}))
    with pytest.raises(ArtifactError, match="nothing of experts or ranks"):
        draw_experts(alone)


def test_words_are_checked_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match="nearest 'entropy'"):
        require_drawable_run("a.png", "entrpy")
    with pytest.raises(ArtifactError, match=r"\.png, \.svg, \.pdf"):
        require_drawable_run("a.gif", "load")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ArtifactError, match=r"pip install 'moec\[plot\]'"):
        require_drawable_run("a.png", "load")


# colours and places


def luminance(colour: np.ndarray) -> float:
    """Relative luminance of an sRGB colour (WCAG 2)."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_shades_fall_from_white_on_both_sides() -> None:
    """Also without any hue, farther from balance is darker; blue is told from orange by its blue alone."""
    colours = shades()(np.linspace(0, 1, 101))[:, :3]
    light = np.array([luminance(colour) for colour in colours])
    assert (np.diff(light[:51]) > 0).all()
    assert (np.diff(light[50:]) < 0).all()
    assert light[50] > 0.9
    red, blue = colours[:, 0], colours[:, 2]
    assert (blue[:45] > red[:45]).all()
    assert (red[56:] > blue[56:]).all()


@given(loads=st.lists(st.floats(0, 40), min_size=1, max_size=60))
def test_one_scale_is_even_around_balance(loads: list[float]) -> None:
    values = np.array([loads])
    scale = scale_of({"moe_1": Series(np.array([1]), values)})
    assert scale.factor in (2.0, 4.0, 8.0)
    assert scale.idle == (0.0 in loads)
    norm, shown = scale.drawn["norm"], scale.shown(values)
    assert norm(1.0) == pytest.approx(0.5)
    assert ((norm(shown) < 0) == (values == 0)).all()
    assert (norm(shown)[values > 1] >= 0.5).all()
    assert (norm(shown) <= 1 + 1e-9).all()


@given(steps=st.lists(st.integers(1, 10_000), min_size=1, max_size=20, unique=True))
def test_columns_meet_halfway(steps: list[int]) -> None:
    at = sorted(steps)
    edges = edges_of(at)
    assert len(edges) == len(at) + 1
    assert all(low < step < high for low, step, high in zip(edges, at, edges[1:], strict=False))
    np.testing.assert_allclose(edges[1:-1], (np.array(at[1:]) + at[:-1]) / 2)


@given(heights=st.lists(st.floats(0, 100), max_size=8))
def test_names_never_overlap(heights: list[float]) -> None:
    heights = sorted(heights)
    places = apart(heights, 15.0, 120.0)
    assert all(high - low > 15.0 - 1e-6 for low, high in pairwise(places))
    assert all(place <= 120.0 for place in places)
    if all(high - low > 15.0 for low, high in pairwise(heights)):
        assert places == heights
