"""What a user can get wrong ends in where, found, needed, nearest and status 2, never in a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import GPT, MODELS, run_moec

Refused = Callable[..., str]


# the words themselves


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["shw", "p"], ["moec", "found   no command 'shw'", "nearest 'show'"]),
        (["show", "p", "--stag", "x"], ["moec show", "found   no option '--stag'", "nearest '--stage'"]),
        (["show"], ["moec show", "found   missing argument 'MODEL|DIR'", "needed  see moec show --help"]),
        (["train", "p", "--steps", "many"], ["moec train", "invalid value for '--steps'"]),
        (["train", GPT, "--steps", "0"], ["steps = 0", "needed  1 or more"]),
        (["compile", GPT, "--verify", "ful"], ["found   'ful'", "one of auto, off, full", "nearest 'full'"]),
        (["compile", GPT, "--disable", "spell_norm"], ["found   'spell_norm'", "nearest 'spell_norms'"]),
        (["show", GPT, "--stage", "canonicl"], ["found   no stage of that name", "nearest 'canonical'"]),
        (["diff", GPT, "capturd"], ["stage 'capturd'", "nearest 'captured'"]),
        (["explain", GPT, "fn_0"], ["explain 'fn_0'", "nearest 'ffn_0'"]),
        (["plans", "prmoe"], ["no shipped plan 'prmoe'", "nearest 'pr_moe'"]),
    ],
)
def test_words(words: list[str], lines: list[str], refused: Refused) -> None:
    told = refused(*words)
    assert [line for line in lines if line not in told] == [], told


# the model


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (f"{MODELS}:gtp", ["no 'gtp' in", "nearest 'gpt'"]),
        (f"{MODELS}", ["a file without a factory", f"nearest {MODELS}:"]),
        (f"{MODELS.parent}/modls.py:gpt", ["modls.py\n", "no such file", "nearest 'models.py'"]),
        (f"{MODELS.parent}/modls", ["nothing that is called", "a saved program's folder"]),
        (f"{GPT}?layer=3", ["unexpected keyword argument 'layer'", "nearest 'layers'"]),
        (f"{GPT}?layers", ["arguments 'layers'", "key=value"]),
        (f"{GPT}?layers=open('x')", ["arguments", "key=value"]),
        (f"{MODELS}:ready?width=3", ["arguments for an nn.Module that is made already"]),
        (f"{MODELS}:number", ["found   a int", "a function that returns an nn.Module"]),
        (f"{MODELS}:careless", ["it returned a NoneType"]),
        ("hf:no/such/folder", ["no such folder", "nothing is downloaded"]),
    ],
)
def test_models(name: str, lines: list[str], refused: Refused) -> None:
    told = refused("show", name)
    assert [line for line in lines if line not in told] == [], told


def test_a_factory_that_raises_is_shown_with_its_own_line(refused: Refused) -> None:
    told = refused("show", f"{MODELS}:broken")
    assert "models.py:" in told.splitlines()[0]
    assert 'in broken: return nn.Linear(3, "four")' in told.splitlines()[0]
    assert "found   TypeError: " in told
    assert "moec/" not in told


@pytest.mark.parametrize(
    ("text", "where", "found"),
    [
        ("import torch\nx = = 3\n", "m.py:2", "SyntaxError"),
        ("import torch\n\nraise ValueError('not today')\n", "m.py:3", "ValueError: not today"),
        ("import no_such_module_anywhere\n", "m.py:1", "ModuleNotFoundError"),
    ],
)
def test_a_file_that_does_not_import(
    text: str, where: str, found: str, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "m.py").write_text(text)
    told = refused("show", f"{tmp_path}/m.py:f")
    assert where in told.splitlines()[0]
    assert f"found   {found}" in told


def test_positions_that_cannot_be_captured(refused: Refused) -> None:
    told = refused("compile", f"{MODELS}:FixedPositions")
    assert "capture of FixedPositions" in told
    assert "a model that works for any batch and sequence length" in told or "torch.export can trace" in told


def test_weights_on_meta_cannot_be_bisected(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(
        "import torch\nfrom tests.cli.models import Bare\ndef f():\n    return Bare().to('meta')\n"
    )
    assert "weights on meta" in refused("bisect", f"{tmp_path}/m.py:f")


# the plan

BAD_PLANS = {
    "a misspelt key": (
        "experts = 4\ntopk = 1",
        GPT,
        ["plan.toml:4: moe.topk", "unknown key", "nearest 'top_k'"],
    ),
    "a wrong type": (
        'experts = "four"',
        GPT,
        ["plan.toml:3: moe.experts", 'experts = "four"', "a whole number"],
    ),
    "too few experts": ("experts = 2\ntop_k = 3", GPT, ["plan.toml:3", "experts = 2 with top_k = 3"]),
    "split that does not divide": (
        'experts = 4\ninit = "split"',
        f"{GPT}?hidden=30",
        ["ffn_1 (blocks.1.mlp)", "30 hidden units into 4", "nearest experts = 3"],
    ),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_plans(case: str, tmp_path: Path, refused: Refused) -> None:
    body, model, lines = BAD_PLANS[case]
    (tmp_path / "plan.toml").write_text(f'[moe]\nlayers = "1::2"\n{body}\n')
    told = refused("compile", model, "--plan", tmp_path / "plan.toml", "--verify", "off")
    assert [line for line in lines if line not in told] == [], told


@pytest.mark.parametrize(
    ("layers", "lines"),
    [
        ("[5]", ["index 5", "from -2 to 1", "blocks.0.mlp"]),
        ('"7:"', ["selects nothing", "0 blocks.0.mlp, 1 blocks.1.mlp"]),
        ('"*.mlps"', ["selects nothing", "0 blocks.0.mlp, 1 blocks.1.mlp"]),
    ],
)
def test_selectors_that_fit_nothing(layers: str, lines: list[str], tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "plan.toml").write_text(f"[moe]\nlayers = {layers}\nexperts = 4\n")
    told = refused("show", GPT, "--plan", tmp_path / "plan.toml")
    assert [line for line in ["moe.layers", *lines] if line not in told] == [], told


def test_a_missing_plan_names_its_neighbour(plan: Path, refused: Refused) -> None:
    assert "nearest 'four.toml'" in refused("show", GPT, "--plan", plan.with_name("for.toml"))


def test_a_saved_program_has_its_own_plan(saved: Path, refused: Refused) -> None:
    assert "which is a saved program" in refused("show", saved, "--plan", "moe")


# the saved program


def cut(folder: Path) -> None:
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def edit(folder: Path) -> None:
    path = folder / "program.py"
    path.write_text(path.read_text().replace("gelu(h)", 'gelu(h, approximate="tanh")'))


def age(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))


@pytest.mark.parametrize("command", ["show", "explain", "train", "generate"])
@pytest.mark.parametrize(
    ("damage", "lines"),
    [
        (cut, ["weights.safetensors", "cut short"]),
        (edit, ["program.py", "edited after saving", "; or --trust, if the edit is yours"]),
        (age, ["manifest.json", "version 99", "version 1"]),
        (lambda folder: (folder / "manifest.json").unlink(), ["no manifest.json"]),
    ],
)
def test_damaged_programs(
    command: str,
    damage: Callable[[Path], None],
    lines: list[str],
    saved: Path,
    tmp_path: Path,
    refused: Refused,
) -> None:
    damage(Path(shutil.copytree(saved, tmp_path / "p")))
    more = ["--prompt", "a"] if command == "generate" else []
    told = refused(command, tmp_path / "p", *more)
    assert [line for line in lines if line not in told] == [], told


def test_an_edited_program_is_shown_on_trust(saved: Path, tmp_path: Path) -> None:
    edit(Path(shutil.copytree(saved, tmp_path / "p")))
    result = run_moec("show", tmp_path / "p", "--trust")
    assert result.exit_code == 0
    assert 'approximate="tanh"' in result.stdout


def test_out_that_holds_something_else(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "mine.txt").write_text("dear diary")
    assert "something else is there" in refused("compile", GPT, "--verify", "off", "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_out_that_cannot_be_written(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("")
    told = refused("compile", GPT, "--verify", "off", "--out", tmp_path / "file" / "program")
    assert "a place that can be read and written" in told
