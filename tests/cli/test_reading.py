"""`compile`, `show`, `diff`, `explain`, `plans`: what they print is what the program says."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch

import moec
from moec.plan import Plan
from tests.cli.conftest import GPT, Moec, run_moec
from tests.cli.models import gpt


def test_compile_says_what_was_done_and_saves_it(moec_: Moec, plan: Path, tmp_path: Path) -> None:
    out = moec_("compile", GPT, "--plan", plan, "--out", tmp_path / "p", "--verify", "full").stdout
    program = moec.load(tmp_path / "p")
    for certificate in program.certificates:
        assert any(
            line.split()[:2] == [certificate.rewrite, certificate.contract] for line in out.splitlines()
        )
    assert {c.verdict for c in program.certificates} == {"proved"}
    assert f"{program.num_parameters():,}" in out
    assert "9 products: 2 rewritten, 7 kept, 0 refused" in out
    assert f"moec show {tmp_path / 'p'}" in out
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


def test_compile_without_out_saves_nothing(
    moec_: Moec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "not saved" in moec_("compile", GPT, "--verify", "off").stdout
    assert list(tmp_path.iterdir()) == []


def test_compile_for_machines(moec_: Moec, plan: Path) -> None:
    words = ("compile", GPT, "--plan", plan, "--json", "--verify", "off", "--disable", "spell_norms")
    told = json.loads(moec_(*words).stdout)
    assert told["stage"] == "sparse"
    assert told["counts"] == {"rewritten": 2, "kept": 7, "refused": 0}
    assert "spell_norms" not in [c["rewrite"] for c in told["certificates"]]


def test_one_name_is_one_model(moec_: Moec, plan: Path, saved: Path, tmp_path: Path) -> None:
    """Fresh weights come from a fixed seed, whatever ran before."""
    torch.manual_seed(77)
    moec_("compile", GPT, "--plan", plan, "--out", tmp_path / "again", "--verify", "off")
    first, second = moec.load(saved).state_dict(), moec.load(tmp_path / "again").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_show_prints_the_text(moec_: Moec, saved: Path) -> None:
    program = moec.load(saved)
    assert moec_("show", saved).stdout == program.text().rstrip("\n") + "\n"
    assert moec_("show", saved, "--stage", "structured").stdout.strip() == program.text("structured").strip()


def test_show_of_a_model_is_show_of_its_program(moec_: Moec, saved: Path, plan: Path) -> None:
    assert moec_("show", GPT, "--plan", plan).stdout == moec_("show", saved).stdout


def test_show_tables_name_every_row(moec_: Moec, saved: Path) -> None:
    program = moec.load(saved)
    ledger = moec_("show", saved, "--ledger").stdout.splitlines()
    assert [line.split()[0] for line in ledger[1:]] == [entry.weight for entry in program.ledger]
    assert "gpt.py:52" in next(line for line in ledger if line.startswith("blocks.1.mlp.up"))
    origins = moec_("show", saved, "--origins").stdout.splitlines()
    assert [line.split()[0].removesuffix("[e]") for line in origins[1:]] == list(program.origins)
    certificates = moec_("show", saved, "--certificates").stdout.splitlines()
    assert [line.split()[0] for line in certificates[1:]] == [c.rewrite for c in program.certificates]


def test_show_for_machines(moec_: Moec, saved: Path) -> None:
    program = moec.load(saved)
    whole = json.loads(moec_("show", saved, "--json").stdout)
    assert whole["text"] == program.text()
    assert "lift_experts" in whole["stages"]
    part = json.loads(moec_("show", saved, "--json", "--origins").stdout)
    assert list(part) == ["origins"]
    assert part["origins"]["moe_1.up.weight"]["source"] == "blocks.1.mlp.up.weight"


def test_show_on_meta_needs_no_memory(moec_: Moec) -> None:
    rest = sum(parameter.numel() for parameter in gpt(vocab=1).parameters()) - 8
    first = moec_("show", f"{GPT}?vocab=50000000000", "--meta").stdout.splitlines()[0]
    assert f"{8 * 50_000_000_000 + rest:,} parameters" in first


def test_diff(moec_: Moec, saved: Path) -> None:
    program = moec.load(saved)
    assert moec_("diff", saved, "structured", "sparse").stdout == program.diff("structured", "sparse")
    assert moec_("diff", saved, "structured").stdout == program.diff("structured")
    assert moec_("diff", saved, "sparse", "sparse").stdout == "no difference between sparse and sparse\n"


def test_plans(moec_: Moec) -> None:
    listed = moec_("plans").stdout
    assert all(
        any(line.startswith(f"{name} ") for line in listed.splitlines()) for name in Plan.shipped_names()
    )
    assert Plan.from_text(moec_("plans", "pr_moe").stdout) == Plan.shipped("pr_moe")
    assert tomllib.loads(moec_("plans", "moe").stdout)["moe"]["experts"] == 128
    assert [row["name"] for row in json.loads(moec_("plans", "--json").stdout)] == Plan.shipped_names()


def test_help_of_every_command_shows_an_example(moec_: Moec) -> None:
    help_ = moec_("--help").stdout
    for command in ("compile", "show", "diff", "explain", "train", "generate", "bisect", "plans"):
        assert f" {command} " in help_
        assert f"moec {command} " in moec_(command, "--help").stdout.split("Usage")[1].split("\n", 1)[1]
    assert moec_("--version").stdout == f"moec {moec.__version__}\n"


def test_colours_are_for_terminals(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" not in run_moec("show", saved, "--ledger").stdout
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[32mrewritten" in run_moec("show", saved, "--ledger").stdout
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[32m" not in run_moec("show", saved, "--ledger").stdout
