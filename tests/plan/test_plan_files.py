"""Plans from files: a mistake answers where · found · needed · nearest, and keys have their lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import PlanError
from moec.plan import Plan
from moec.plan.source import locate

MOE = '[moe]\nlayers = "all"\nexperts = 4\n'

MISTAKES = {
    "unknown key": (
        '[moe]\nlayers = "all"\n\nexpertz = 4\n',
        "p.toml:4: moe.expertz (first of 2 problems)\n"
        "  found   unknown key 'expertz'\n"
        "  needed  one of experts, top_k, residual, capacity_factor, eval_capacity_factor, min_capacity, "
        "random_token_selection, gate, noise, jitter, balance, balance_loss, bias_rate, z_loss, init, "
        "init_noise, init_ratio, router_std, layers, override, seed\n"
        "  nearest 'experts'",
    ),
    "unknown table": (
        "# a comment\n[meo]\nexperts = 4\n",
        "p.toml:2: meo\n"
        "  found   unknown key 'meo'\n"
        "  needed  one of moe, student, distill, parallel, train, compile\n"
        "  nearest 'moe'",
    ),
    "unknown key in the second override": (
        MOE + "[[moe.override]]\nlayers = 0\ntop_k = 2\n[[moe.override]]\nlayers = 1\ntopk = 2\n",
        "p.toml:9: moe.override[1].topk\n"
        "  found   unknown key 'topk'\n"
        "  needed  one of layers, experts, top_k, residual, capacity_factor, eval_capacity_factor, "
        "min_capacity, random_token_selection, gate, noise, jitter, balance, balance_loss, bias_rate, "
        "z_loss, init, init_noise, init_ratio, router_std\n"
        "  nearest 'top_k'",
    ),
    "missing key": (
        "\n[moe]\nexperts = 4\n",
        "p.toml:2: moe.layers\n"
        "  found   no 'layers'\n"
        "  needed  layers = … (Which feed-forwards become sparse: a layer selector.)",
    ),
    "text for a number": (
        '[moe]\nlayers = "all"\nexperts = "4"\n',
        'p.toml:3: moe.experts\n  found   experts = "4"\n  needed  a whole number',
    ),
    "fraction for a whole number": (
        '[moe]\nlayers = "all"\nexperts = 4.5\n',
        "p.toml:3: moe.experts\n  found   experts = 4.5\n  needed  a whole number",
    ),
    "yes for a whole number": (
        "[train]\nsteps = true\n",
        "p.toml:2: train.steps\n  found   steps = true\n  needed  a whole number",
    ),
    "number for yes or no": (
        MOE + "random_token_selection = 1\n",
        "p.toml:4: moe.random_token_selection\n  found   random_token_selection = 1\n  needed  true or false",
    ),
    "text for a fraction": (
        '[train]\nlr = "fast"\n',
        'p.toml:2: train.lr\n  found   lr = "fast"\n  needed  a number',
    ),
    "value for a table": ("moe = 3\n", "p.toml:1: moe\n  found   moe = 3\n  needed  a table"),
    "misspelt choice": (
        MOE + 'gate = "straight_through"\n',
        "p.toml:4: moe.gate\n"
        '  found   gate = "straight_through"\n'
        "  needed  one of 'straight-through', 'probability', 'normalized' or 'sigmoid'\n"
        "  nearest 'straight-through'",
    ),
    "misspelt choice in an override": (
        MOE + '[[moe.override]]\nlayers = 0\ninit = "copie"\n',
        "p.toml:6: moe.override[0].init\n"
        '  found   init = "copie"\n'
        "  needed  one of 'copy', 'noise', 'partial', 'split' or 'fresh'\n"
        "  nearest 'copy'",
    ),
    "fewer experts than top_k": (
        MOE + "top_k = 5\n",
        "p.toml:3: moe.experts\n"
        "  found   experts = 4 with top_k = 5\n"
        "  needed  at least 5 experts, one for each that a token is sent to",
    ),
    "fewer experts than top_k in an override": (
        MOE + "top_k = 3\n[[moe.override]]\nlayers = 0\nexperts = 2\n",
        "p.toml:7: moe.override[0].experts\n"
        "  found   experts = 2 with top_k = 3\n"
        "  needed  at least 3 experts, one for each that a token is sent to",
    ),
    "override without a change": (
        MOE + "[[moe.override]]\nlayers = 0\n",
        "p.toml:4: moe.override[0]\n"
        "  found   an override that changes nothing\n"
        "  needed  a key besides layers",
    ),
    "no experts": (
        '[moe]\nlayers = "all"\nexperts = 0\n',
        "p.toml:3: moe.experts\n  found   experts = 0\n  needed  1 or more",
    ),
    "no capacity": (
        MOE + "capacity_factor = 0.0\n",
        "p.toml:4: moe.capacity_factor\n"
        "  found   capacity_factor = 0.0\n"
        '  needed  a number more than 0, or "dropless"',
    ),
    "endless capacity": (
        MOE + "eval_capacity_factor = inf\n",
        "p.toml:4: moe.eval_capacity_factor\n"
        "  found   eval_capacity_factor = Infinity\n"
        '  needed  a number more than 0, or "train" or "dropless"',
    ),
    "negative weight": (
        MOE + "balance_loss = -0.01\n",
        "p.toml:4: moe.balance_loss\n  found   balance_loss = -0.01\n  needed  0.0 or more",
    ),
    "weight that is no number": (
        MOE + "z_loss = nan\n",
        "p.toml:4: moe.z_loss\n  found   z_loss = NaN\n  needed  a finite number",
    ),
    "bad selector": (
        '[moe]\nexperts = 4\nlayers = "1:2:3:4"\n',
        "p.toml:3: moe.layers\n"
        '  found   layers = "1:2:3:4"\n'
        '  needed  "all", 3, [1, 3], a slice such as "1::2", "depth>0.5", or a glob such as "*.h.1?.mlp"',
    ),
    "stop beyond the end": (
        "[distill]\nstop = 1.2\n",
        "p.toml:2: distill.stop\n  found   stop = 1.2\n  needed  1.0 or less",
    ),
    "cold temperature": (
        "[distill]\ntemperature = 0.0\n",
        "p.toml:2: distill.temperature\n  found   temperature = 0.0\n  needed  more than 0.0",
    ),
    "empty student": (
        "[student]\n",
        "p.toml:1: student\n  found   neither depth nor keep\n  needed  one of depth and keep",
    ),
    "student told twice": (
        "[student]\ndepth = 2\nkeep = [0, 1]\n",
        "p.toml:1: student\n  found   both depth and keep\n  needed  one of depth and keep",
    ),
    "student out of order": (
        "[student]\nkeep = [2, 1]\n",
        "p.toml:2: student.keep\n  found   keep = [2, 1]\n  needed  layer numbers in ascending order",
    ),
    "misspelt auto": (
        '[parallel]\ndata = "aut"\n',
        'p.toml:2: parallel.data\n  found   data = "aut"\n  needed  a whole number, 1 or more, or "auto"',
    ),
    "no rank": (
        "[parallel]\nexpert = 0\n",
        "p.toml:2: parallel.expert\n  found   expert = 0\n  needed  1 or more",
    ),
    "one beta": (
        "[train]\nbetas = [0.9]\n",
        "p.toml:2: train.betas[1]\n  found   no betas[1]\n  needed  2 or more values",
    ),
    "beta of one": (
        "[train]\nbetas = [\n  0.9,\n  1.0,\n]\n",
        "p.toml:2: train.betas[1]\n  found   betas[1] = 1.0\n  needed  less than 1.0",
    ),
    "negative rate": (
        "[train]\nlr = -1.0\n",
        "p.toml:2: train.lr\n  found   lr = -1.0\n  needed  more than 0.0",
    ),
    "rate that rises": (
        "[train]\nlr = 0.1\nmin_lr = 0.2\n",
        "p.toml:3: train.min_lr\n  found   min_lr = 0.2\n  needed  at most lr, 0.1",
    ),
    "warm-up beyond the end": (
        "[train]\nwarmup = 20\nsteps = 10\n",
        "p.toml:2: train.warmup\n  found   warmup = 20\n  needed  at most steps, 10",
    ),
    "uneven accumulation": (
        "[train]\nbatch = 8\naccumulate = 3\n",
        "p.toml:3: train.accumulate\n"
        "  found   accumulate = 3 with batch = 8\n"
        "  needed  a number that divides batch",
    ),
    "value missing": ("[train]\nsteps =\n", "p.toml:2:8\n  found   steps =\n  needed  TOML (Invalid value)"),
    "key twice": (
        "[train]\nsteps = 1\nsteps = 2\n",
        "p.toml:3:10\n  found   steps = 2\n  needed  TOML (Cannot overwrite a value)",
    ),
    "text without an end": (
        "[train]\ndtype = 'fp32",
        "p.toml:2\n  found   dtype = 'fp32\n  needed  TOML (Expected \"'\")",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_told_with_its_line(mistake: str) -> None:
    text, message = MISTAKES[mistake]
    with pytest.raises(PlanError) as caught:
        Plan.from_text(text, "p.toml")
    assert str(caught.value) == message


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "my_plan.toml").write_text(MOE)
    with pytest.raises(PlanError) as caught:
        Plan.resolve(tmp_path / "my_plam.toml")
    assert str(caught.value) == (
        f"{tmp_path}/my_plam.toml\n  found   no such file\n  needed  a plan file\n  nearest 'my_plan.toml'"
    )


def test_a_missing_file_may_be_a_shipped_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.resolve(str(tmp_path / "pr-moe.toml"))
    assert caught.value.nearest == "the shipped plan 'pr_moe'"


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"a plan file; the folder .*/nowhere does not exist either"):
        Plan.from_toml(tmp_path / "nowhere" / "plan.toml")


def test_a_folder_is_not_a_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="found   is a directory\n  needed  a TOML file that can be read"):
        Plan.from_toml(tmp_path)


def test_bytes_are_not_a_plan(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_bytes(b"[moe]\nlayers = '\xff'\n")
    with pytest.raises(PlanError, match="byte 16 is not UTF-8"):
        Plan.from_toml(tmp_path / "plan.toml")


def test_a_file_reads_as_its_python_twin(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(MOE + '[[moe.override]]\nlayers = "-1:"\nexperts = 8\n')
    twin = Plan.resolve(
        {"moe": {"layers": "all", "experts": 4, "override": [{"layers": "-1:", "experts": 8}]}}
    )
    assert Plan.resolve(tmp_path / "plan.toml") == Plan.resolve(str(tmp_path / "plan.toml")) == twin


keys = st.text("ab=.#[]\" '", min_size=1, max_size=4).map(lambda text: text.replace('"', "d"))
scalars = st.integers(-9, 9) | st.booleans() | st.text('a\n"=[]#', max_size=6)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(keys, values, max_size=4), st.booleans())
def test_every_key_is_found_on_a_line_that_spells_it(document: dict[str, Any], multiline: bool) -> None:
    text = "\n# a line of comment\n" + tomli_w.dumps(document, multiline_strings=multiline)
    lines, rows = locate(text), text.split("\n")
    for path in paths(document):
        if isinstance(path[-1], str) and path in lines:
            assert path[-1] in rows[lines[path] - 1] or in_a_list(path)
    tables = [path for path in paths(document) if path not in lines]
    assert tables == [], "keys without a line"


def in_a_list(path: tuple[str | int, ...]) -> bool:
    """Tables inside lists may be written over several lines; their keys have the line the list begins on."""
    return any(isinstance(part, int) for part in path)


def paths(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every path into `value`, the empty one left out."""
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    inner = [found for key, item in entries for found in paths(item, (*path, key))]
    return ([path] if path else []) + inner


def test_lines_of_nested_headers_and_arrays_of_tables() -> None:
    text = '[a.b]\nx = 1\n[[t]]\nk = """\ntwo\nlines"""\n[[t]]\nk = [\n 1,\n]\n[t.deep]\n"q.r".s = 2\n'
    lines = locate(text)
    assert lines["a",] == lines["a", "b"] == 1
    assert lines["a", "b", "x"] == 2
    assert (lines["t", 0], lines["t", 0, "k"]) == (3, 4)
    assert (lines["t", 1], lines["t", 1, "k"], lines["t", 1, "deep"]) == (7, 8, 11)
    assert lines["t", 1, "deep", "q.r", "s"] == 12
