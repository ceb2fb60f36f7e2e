"""`make demo`, shortened: it goes through to the end, and what it says of itself is so."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

import moec
from examples import demo_screen
from examples.demo import PLAN, choose_steps, demo, new_folder, next_commands
from examples.gpt import small
from moec import cli
from moec.ir.ledger import Entry
from moec.plan import Plan, Train
from moec.runtime.data import TextData, load_text
from moec.runtime.records import read_records


@dataclass(frozen=True)
class DemoRun:
    """One run of three steps: what it printed, and the folder it made."""

    printed: str
    folder: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    out = tmp_path_factory.mktemp("demo")
    app = typer.Typer()
    app.command()(demo)
    result = CliRunner().invoke(app, ["--steps", "3", "--length", "20", "--out", str(out)])
    if result.exception is not None:
        raise result.exception
    return DemoRun(result.output, out / "1")


def test_its_parts_come_in_order(run: DemoRun) -> None:
    titles = re.findall(r"^(.*?) ─{3,}", run.printed, re.MULTILINE)
    told = [
        "An ordinary GPT is compiled",
        "Before",
        "After",
        "What changed",
        "What became of every matrix product",
    ]
    told += ["What was proved of every rewrite", "Training", "Which experts the held-out text went to"]
    assert titles == [*told, "A sample", "Saved", "Next"]


def test_the_programs_on_the_screen_are_the_programs(run: DemoRun) -> None:
    torch.manual_seed(0)
    program = moec.compile(small(), plan=PLAN, verify="off")
    for text in (program.text("structured"), program.text(), program.diff("structured", "sparse")):
        assert _tidy(text) in _tidy(run.printed)


def _tidy(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def test_the_numbers_are_those_of_the_records(run: DemoRun) -> None:
    records = read_records(run.folder / "train.jsonl")
    last = next(record for record in reversed(records) if record["kind"] == "evaluation")
    assert records[-1]["step"] == 3
    assert f"→ {last['bits']:.3f} bits per byte" in run.printed
    shown = [int(rows.replace(",", "")) for rows in re.findall(r"% +([\d,]+) rows", run.printed)]
    assert shown == [count for rows in last["counts"].values() for count in rows]


def test_what_it_saved_is_the_trained_program(run: DemoRun) -> None:
    program = moec.load(run.folder / "program")
    torch.manual_seed(0)
    untrained = moec.compile(small(), plan=PLAN, verify="off").eval()
    tokens = torch.randint(256, (2, 9))
    assert program.fingerprint() == untrained.fingerprint()
    assert not torch.allclose(program(tokens), untrained(tokens))


@pytest.mark.parametrize("command", ["show", "diff", "explain", "generate", "plans"])
def test_the_commands_it_names_work(run: DemoRun, command: str) -> None:
    _, *words = _named(run.folder)[command]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    assert result.output


def test_the_training_it_names_is_one_the_plan_allows(run: DemoRun) -> None:
    words = _named(run.folder)["train"]
    assert words[2:5] == ["examples/gpt.py:small", "--plan", "examples/pr_moe.toml"]
    assert f"--out {run.folder}-longer" in shlex.join(words)


def _named(folder: Path) -> dict[str, list[str]]:
    lines = [shlex.split(line) for line in next_commands(folder / "program", folder)]
    return {words[1]: words for words in lines}


def test_every_named_command_is_on_the_screen(run: DemoRun) -> None:
    for line in next_commands(run.folder / "program", run.folder):
        assert line.partition(" ")[2] in run.printed


@pytest.fixture(scope="module")
def text() -> TextData:
    return load_text(Path(__file__).parents[2] / "examples", sequence=8)


def test_steps_come_from_the_plan_a_number_or_the_clock(text: TextData) -> None:
    plan = Plan.from_toml(PLAN)
    program = moec.compile(small(), plan=plan, verify="off")
    given = Train(steps=700, batch=2, sequence=8, warmup=100)
    before = [parameter.detach().clone() for parameter in program.parameters()]
    assert choose_steps(program, given, text, None, None) is given
    assert (few := choose_steps(program, given, text, 20, None)).steps == 20
    assert (few.warmup, few.batch, few.lr) == (2, given.batch, given.lr)
    assert choose_steps(program, given, text, None, 1e-9).steps == 1
    assert choose_steps(program, given, text, None, 100.0).steps > 100
    assert all(torch.equal(a, b) for a, b in zip(before, program.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in program.parameters())


def test_a_second_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    assert new_folder(tmp_path / "runs") == tmp_path / "runs" / "1"
    (tmp_path / "runs" / "1").mkdir(parents=True)
    assert new_folder(tmp_path / "runs") == tmp_path / "runs" / "2"


def test_folding_joins_what_differs_by_layer_alone() -> None:
    def up(layer: int, status: str, why: str) -> Entry:
        return Entry(f"h.{layer}.mlp.up.weight", (8, 2), f"ffn_{layer} up", status, why)

    entries = [up(0, "kept", "not selected"), up(1, "rewritten", "moe_1: 4 experts")]
    entries += [up(2, "kept", "not selected"), up(3, "rewritten", "moe_3: 8 experts")]
    assert demo_screen.fold([*entries, Entry("wte.weight", (256, 2), "head", "kept", "the head")]) == {
        ("h.*.mlp.up.weight", "8×2", "kept", "not selected"): ["0", "2"],
        ("h.*.mlp.up.weight", "8×2", "rewritten", "moe_*: 4 experts"): ["1"],
        ("h.*.mlp.up.weight", "8×2", "rewritten", "moe_*: 8 experts"): ["3"],
        ("wte.weight", "256×2", "kept", "the head"): [],
    }


def test_code_is_never_cut_or_broken() -> None:
    console = Console(width=40, color_system=None)
    line = "y = " + " + ".join(f"value_{i}" for i in range(40))
    with console.capture() as captured:
        demo_screen.code(console, line)
    assert captured.get() == line + "\n"


def test_sampled_text_cannot_steer_the_terminal() -> None:
    console = Console(width=40, color_system=None)
    with console.capture() as captured:
        demo_screen.sample(console, "def ", "def f(\x1b[2J\r):\n    pass\x07")
    assert captured.get() == "def f(�[2J�):\n    pass�\n"
