"""`moec bisect` names the pass, the site and the tensor, and its script shows the same again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import moec
from moec.bisect import Bisection, bisect, examine, first_difference, program_before
from moec.errors import PassError, PlanError
from moec.ir import Pass
from moec.models import open_model
from moec.passes.pipeline import pipeline
from moec.plan import Plan
from moec.reproduction import write_script
from tests.cli.broken_passes import (
    Crash,
    Detached,
    DroppedBias,
    FailedCheck,
    Honest,
    LoudExperts,
    TinyError,
    WrongActivation,
    WrongScale,
    WrongShape,
)
from tests.cli.conftest import GPT, MODELS, Moec, run_moec
from tests.cli.models import Bare, gpt

PLAN = Plan.from_text('[moe]\nlayers = "1::2"\nexperts = 4\ninit = "copy"\n')


def with_pass(broken: Pass, after: str) -> list[Pass]:
    """The plan's pipeline with `broken` after the pass called `after`."""
    passes = pipeline(PLAN)
    place = [rewrite.name for rewrite in passes].index(after) + 1
    return [*passes[:place], broken, *passes[place:]]


def bisected(broken: Pass, after: str = "name_values") -> Bisection:
    return bisect(open_model(GPT), PLAN, passes=with_pass(broken, after))


@pytest.mark.parametrize(
    ("broken", "after", "kind", "site", "tensor", "line"),
    [
        (WrongActivation(), "name_values", "value", "ffn_1", "", "gpt.py:52"),
        (WrongScale(), "spell_attention", "value", "blocks.1.attention", "", "gpt.py:39"),
        (DroppedBias(), "outline_attention", "gradient", "attention_0", "attention.out.bias", ""),
        (Detached(), "name_values", "gradient", "ffn_1", "blocks.1.mlp.", ""),
        (TinyError(), "spell_linears", "value", "", "", ""),
        (FailedCheck(), "name_values", "check", "ffn_1", "up.weight", ""),
        (
            Crash(),
            "drop_noops",
            "crash",
            "broken_passes.py:",
            "no_such_thing",
            "return program.no_such_thing",
        ),
    ],
)
def test_the_pass_the_site_and_the_tensor(
    broken: Pass, after: str, kind: str, site: str, tensor: str, line: str
) -> None:
    done = bisected(broken, after)
    assert done.finding is not None
    assert done.finding.rewrite == broken.name
    found = done.finding.difference
    assert found.kind == kind
    assert found.site.startswith(site)
    assert tensor in found.tensor
    assert line in found.source
    assert done.certificates[-1].rewrite == after
    assert done.finding.without == f"without {broken.name} the rest of the pipeline holds"


def test_sizes_that_do_not_fit_are_named() -> None:
    done = bisected(WrongShape())
    assert done.finding is not None
    assert done.finding.rewrite == "wrong_shape"
    assert "shapes and dtypes that fit" in done.finding.difference.after


def test_a_wrong_lift_is_found_in_its_layer() -> None:
    passes = [LoudExperts(PLAN) if rewrite.name == "lift_experts" else rewrite for rewrite in pipeline(PLAN)]
    done = bisect(open_model(GPT), PLAN, passes=passes)
    assert done.finding is not None
    assert done.finding.rewrite == "loud_experts"
    found = done.finding.difference
    assert (found.kind, found.site, found.tensor) == ("check", "moe_1", "values")
    assert found.error == pytest.approx(0.5)


def test_a_sound_pipeline_has_no_finding() -> None:
    done = bisect(open_model(GPT), PLAN, passes=with_pass(Honest(), "name_values"))
    assert done.finding is None
    assert [c.rewrite for c in done.certificates][-2:] == ["lift_experts", "collect_terms"]
    assert {c.verdict for c in done.certificates} == {"proved"}


def test_a_guilty_pass_may_be_left_out() -> None:
    passes = with_pass(WrongActivation(), "name_values")
    done = bisect(open_model(GPT), PLAN, passes=passes, disable=["wrong_activation"])
    assert done.finding is None
    assert "wrong_activation was disabled" in done.program.ledger.notes


def test_two_guilty_passes_are_named_one_after_the_other() -> None:
    passes = [*with_pass(WrongActivation(), "name_values"), DroppedBias()]
    done = bisect(open_model(GPT), PLAN, passes=passes)
    assert done.finding is not None
    assert done.finding.without.startswith("without wrong_activation it fails later: pass dropped_bias")


def test_refusals_are_no_findings() -> None:
    with pytest.raises(PlanError, match="index 7"):
        bisect(open_model(GPT), {"moe": {"layers": [7], "experts": 4}})
    with pytest.raises(PassError, match="'spell_norms'"):
        bisect(open_model(GPT), PLAN, disable=["spell_norm"])


class Counting(Bare):
    """Answers differently every time: what is captured is not what it does."""

    calls = 0.0  # of the class, so that the copy which is captured counts on

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        Counting.calls += 1.0
        return super().forward(tokens) * Counting.calls


def test_the_capture_is_judged_first() -> None:
    done = bisect(Counting(), None)
    assert done.finding is not None
    assert done.finding.rewrite == "capture"
    assert done.finding.difference.tensor == "logits"


def test_modes_and_weights_of_the_model_are_as_before() -> None:
    model = gpt().train()
    model.blocks[0].eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    bisect(model, None)
    assert model.training
    assert not model.blocks[0].training
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


# one pass


def test_first_difference_of_a_program_with_itself_is_none() -> None:
    program = moec.compile(gpt(), PLAN, verify="off")
    assert first_difference(program, program.fork()) is None


def test_first_difference_sees_a_changed_weight() -> None:
    before, after = (moec.compile(gpt_seeded(), PLAN, verify="off") for _ in range(2))
    with torch.no_grad():
        after.graph.get_parameter("moe_1.down.weight")[:, 0, 0] += 0.1
    found = first_difference(before, after)
    assert found is not None
    assert found.site == "moe_1"
    assert "grouped_linear" in found.before
    assert 1e-6 < found.error < 10


def gpt_seeded() -> nn.Module:
    torch.manual_seed(0)
    return gpt()


def test_examine_leaves_the_program_alone() -> None:
    before, rewrite = program_before(gpt(), PLAN, "lift_experts")
    text = before.text()
    assert examine(before, rewrite) is None
    assert examine(before, WrongActivation()) is not None
    assert before.text() == text


# the script

Script = Callable[[Pass, str], Path]


def run_script(path: Path) -> subprocess.CompletedProcess[str]:
    """The script, as a user runs it; `models.py` imports the examples from the root of the project."""
    environment = os.environ | {"PYTHONPATH": str(MODELS.parents[2])}
    command = [sys.executable, str(path)]
    return subprocess.run(
        command, cwd=path.parent, capture_output=True, text=True, timeout=120, env=environment
    )


@pytest.fixture
def script(tmp_path: Path) -> Script:
    def write(broken: Pass, after: str) -> Path:
        passes = with_pass(broken, after)
        done = bisect(open_model(GPT), PLAN, passes=passes)
        assert done.finding is not None
        return write_script(done.finding, GPT, PLAN, tmp_path / "found", passes=passes)

    return write


def test_the_script_finds_it_again(script: Script) -> None:
    path = script(WrongScale(scale=0.25), "spell_attention")
    assert path.name == "bisect_wrong_scale.py"
    assert "WrongScale(scale=0.25)" in path.read_text()
    done = run_script(path)
    assert done.returncode == 1, done.stderr
    assert "site    blocks.1.attention" in done.stdout
    assert done.stderr == ""


def test_the_script_of_a_crash_crashes(script: Script) -> None:
    path = script(Crash(), "drop_noops")
    done = run_script(path)
    assert done.returncode == 1
    assert "AttributeError: 'Program' object has no attribute 'no_such_thing'" in done.stderr


# the command


def test_command_when_all_holds(moec_: Moec, plan: Path, tmp_path: Path) -> None:
    out = moec_("bisect", GPT, "--plan", plan, "--out", tmp_path).stdout
    assert out.rstrip().endswith("every pass keeps its contract")
    assert list(tmp_path.iterdir()) == []
    told = json.loads(moec_("bisect", GPT, "--plan", plan, "--out", tmp_path, "--json").stdout)
    assert told["finding"] is None
    assert {row["verdict"] for row in told["held"]} == {"proved"}


def test_command_when_a_pass_is_broken(monkeypatch: pytest.MonkeyPatch, plan: Path, tmp_path: Path) -> None:
    monkeypatch.setattr("moec.bisect.pipeline", lambda plan: with_pass(DroppedBias(), "outline_attention"))
    words = ("bisect", GPT, "--plan", plan, "--out", tmp_path)
    result = run_moec(*words)
    assert result.exit_code == 1
    assert "dropped_bias does not keep its contract (exact)" in result.stdout
    assert "site    attention_0" in result.stdout
    assert f"python {tmp_path}/bisect_dropped_bias.py" in result.stdout
    told = json.loads(run_moec(*words, "--json").stdout)
    assert told["finding"]["rewrite"] == "dropped_bias"
    assert told["script"] == f"{tmp_path}/bisect_dropped_bias.py"
    assert run_moec(*words, "--disable", "dropped_bias").exit_code == 0
