"""`moec cost` and `moec diff` of two plans: tables, data, times; mistakes in four lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import moec
from moec.cost import Hardware, predict
from moec.models import open_model
from tests.cli.conftest import GPT, Moec

SIZES = ("--batch", 2, "--sequence", 8)


def test_formulas_without_sizes(moec_: Moec, plan: Path) -> None:
    told = moec_("cost", GPT, "--plan", plan).stdout
    assert told.startswith("a training step\n")
    assert "·B·S²" in told
    assert "\nexperts " in told
    assert "\nS  tokens of a sequence\n" in told
    assert "\noptimizer " in told


def test_data_is_what_python_says(moec_: Moec, plan: Path) -> None:
    words = ("cost", GPT, "--plan", plan, *SIZES, "--by", "layer", "--hardware", "a100x8", "--json")
    told = json.loads(moec_(*words).stdout)
    program = moec.compile(open_model(GPT, meta=True), plan=plan, verify="off")
    cost = program.cost()
    assert told["rows"] == cost.table("layer", B=2, S=8).data()
    assert told["memory"] == {
        name: size for name, size in cost.memory.numbers(B=2, S=8).items() if name != "total"
    }
    expected = predict(cost, Hardware.shipped("a100x8"), B=2, S=8)
    assert told["time"]["seconds"] == expected.seconds
    assert told["time"]["by"] == expected.by("layer")


def test_a_saved_program_has_a_cost_of_its_own(moec_: Moec, plan: Path, saved: Path) -> None:
    words = ("--phase", "forward", *SIZES, "--json")
    assert moec_("cost", saved, *words).stdout == moec_("cost", GPT, "--plan", plan, *words).stdout


def test_on_ranks_the_axes_are_told(moec_: Moec, plan: Path) -> None:
    told = moec_("cost", GPT, "--plan", plan, "--ranks", 2, *SIZES, "--by", "axis").stdout
    assert told.startswith("a training step, on one of 2 ranks: data 2 × tensor 1; B = 2, S = 8\n")
    assert "reduce_scatter_tensor" in told
    assert "\ncommunication " in told


def test_a_step_of_decoding_has_other_letters(moec_: Moec, plan: Path) -> None:
    words = (
        "cost",
        GPT,
        "--plan",
        plan,
        "--phase",
        "decode",
        "--batch",
        2,
        "--past",
        16,
        "--hardware",
        "h100",
    )
    told = moec_(*words).stdout
    assert told.startswith("one step of decoding; B = 2, L = 16, n = 1, m = 1\n")
    assert "\ncache " in told
    assert "\nfits: " in told


def test_latex_is_all_there_is(moec_: Moec) -> None:
    told = moec_("cost", GPT, "--latex").stdout
    assert told.startswith("\\begin{tabular}{lrrrrrr}\n")
    assert told.count("\\end{tabular}\n") == 2


def test_a_device_that_is_too_small_is_told(moec_: Moec, tmp_path: Path) -> None:
    small = tmp_path / "small.toml"
    small.write_text(
        '[device]\nname = "toy"\nmemory = 1e4\nbandwidth = 1e9\nlaunch = 1e-6\npeak = { float32 = 1e9 }\n'
        "[inside]\nlatency = 1e-6\nbandwidth = 1e9\n"
    )
    assert "does not fit: " in moec_("cost", GPT, *SIZES, "--hardware", small).stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--phase", "decod"), "nearest 'decode'"),
        (("--by", "layr"), "nearest 'layer'"),
        (("--hardware", "a100x8"), "no --batch and no --sequence"),
        (("--hardware", "a100x8", "--batch", 2), "found   no --sequence"),
        (("--phase", "decode", "--sequence", 8), "--batch, --past"),
        ((*SIZES, "--hardware", "b100"), "nearest"),
        ((*SIZES, "--hardware", "a100x8", "--ranks", 16), "16, one for each rank"),
        (("--batch", 0), "greater than or equal to 1"),
        (("--sequence", 10**8), "the model's limit"),
        (("--phase", "decode", "--batch", 1, "--past", 65), "found   65 positions"),
    ],
)
def test_mistakes(refused: Callable[..., str], words: tuple[object, ...], told: str) -> None:
    assert told in refused("cost", GPT, *words)


def test_a_hardware_file_that_lacks_a_key(refused: Callable[..., str], tmp_path: Path) -> None:
    lacking = tmp_path / "lacking.toml"
    lacking.write_text('[device]\nname = "toy"\nmemory = 1e9\n')
    told = refused("cost", GPT, *SIZES, "--hardware", lacking)
    assert told.startswith(str(lacking))
    assert "needed  bandwidth" in told or "needed  inside" in told


def test_two_plans_side_by_side(moec_: Moec, plan: Path) -> None:
    told = moec_("diff", GPT, "dense", plan, *SIZES, "--hardware", "a100x8").stdout
    rows = {line[:21].strip(): line[21:].split() for line in told.splitlines()}
    assert rows["layers"] == ["2", "2", "="]
    assert rows["residual"] == ["–", "learned", "new"]
    dense = moec.compile(open_model(GPT, meta=True), verify="off")
    assert rows["parameters"][0] == f"{dense.num_parameters():,}"
    assert rows["FLOPs"][-1].startswith("×")
    assert rows["time"][-1].startswith("×")
    assert rows["time of attention"][-1] == "="


def test_two_plans_as_data(moec_: Moec, plan: Path) -> None:
    facts = json.loads(moec_("diff", GPT, plan, plan, "--json").stdout)["facts"]
    assert {fact["change"] for fact in facts} == {"="}
    assert {"parameters", "memory: optimizer", "FLOPs", "experts"} <= {fact["what"] for fact in facts}


def test_a_plan_and_a_stage_cannot_be_compared(refused: Callable[..., str], plan: Path) -> None:
    assert "a plan and 'sparse'" in refused("diff", GPT, plan, "sparse")
    assert "a plan and nothing else" in refused("diff", GPT, "pr_moe")
    assert "a third plan" in refused("diff", GPT, "pr_moe", "moe", "--plan", plan)
