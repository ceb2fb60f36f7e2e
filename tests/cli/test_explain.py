"""`moec explain`: every product has a row, numbers add up, refusals keep their reasons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.errors import PassError
from moec.explain import explain
from moec.program import Program
from tests.cli.conftest import Moec
from tests.cli.models import Bare, gpt


def compiled(residual: str = "none", init: str = "copy", top_k: int = 1, layers: str = "1::2") -> Program:
    moe = {"layers": layers, "experts": 4, "residual": residual, "init": init, "top_k": top_k}
    return moec.compile(gpt(), {"moe": moe}, verify="off")


def test_every_product_has_a_row_in_program_order() -> None:
    program = compiled()
    told = explain(program)
    assert [row.weight for row in told.products] == [entry.weight for entry in program.ledger]
    assert told.counts == {"rewritten": 2, "kept": 7, "refused": 0}
    row = next(row for row in told.products if row.weight == "blocks.1.mlp.up.weight")
    assert (row.path, row.role, row.by) == ("blocks.1.mlp.up", "ffn_1 up", "lift_experts")
    assert row.source.startswith("gpt.py:")
    assert row.became == ("moe_1.up.weight[e]  (copy × 4)",)


@pytest.mark.parametrize("init", ["copy", "split", "fresh"])
@pytest.mark.parametrize("residual", ["none", "learned"])
def test_parameters_add_up(init: str, residual: str) -> None:
    dense = sum(parameter.numel() for parameter in gpt().parameters())
    program = compiled(residual, init)
    told = explain(program)
    (layer,) = told.layers
    assert layer.before == 8 * 32 + 32 + 32 * 8 + 8
    assert told.parameters["before"] == dense
    assert told.parameters["after"] == program.num_parameters() == dense + layer.after - layer.before
    assert (
        told.parameters["active"]
        == program.num_parameters(active=True)
        == dense + layer.active - layer.before
    )


def test_layers_carry_the_plan() -> None:
    (layer,) = explain(compiled("learned", "noise", 2)).layers
    assert layer.settings == {
        "experts": 4, "top_k": 2, "residual": "learned", "gate": "straight-through", "init": "noise"
    }  # fmt: skip
    assert (layer.name, layer.path, layer.capacity) == ("moe_1", "blocks.1.mlp", "dropless")


@pytest.mark.parametrize(
    ("about", "weights"),
    [
        ("0", {"attention.qkv", "attention.out", "mlp.up", "mlp.down"}),
        ("ffn_0", {"mlp.up", "mlp.down"}),
        ("blocks.0.attention", {"attention.qkv", "attention.out"}),
        ("blocks.0.mlp.up.weight", {"mlp.up"}),
        ("blocks.0.*.??.weight", {"mlp.up"}),
    ],
)
def test_about_a_part(about: str, weights: set[str]) -> None:
    found = explain(compiled(), about).products
    assert {row.path for row in found} == {f"blocks.0.{name}" for name in weights}


def test_about_a_sparse_layer_shows_that_layer_alone() -> None:
    program = compiled(layers="all")
    told = explain(program, "moe_1")
    assert [layer.name for layer in told.layers] == ["moe_1"]
    assert {row.path for row in told.products} == {"blocks.1.mlp.up", "blocks.1.mlp.down"}


def test_about_nothing_is_refused_with_the_nearest() -> None:
    with pytest.raises(PassError, match=r"(?s)explain 'moe_11'.*'moe_1'"):
        explain(compiled(), "moe_11")


class Peeking(Bare):
    """Its hidden units are read from outside: no closed region."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        hidden = self.up(x).relu()
        return nn.functional.linear(x + self.down(hidden) * hidden.mean(), self.embedding.weight)


def test_a_near_miss_keeps_its_reason() -> None:
    program = moec.compile(Peeking(), verify="off")
    (row,) = [row for row in explain(program).products if row.status == "refused"]
    assert row.weight == "down.weight"
    assert row.reason == program.ledger["down.weight"].reason != ""
    assert row.reason in program.explain()


def test_disabled_passes_are_noted() -> None:
    program = moec.compile(gpt(), verify="off", disable=["spell_norms"])
    assert "note: spell_norms was disabled" in program.explain()


def test_command_prints_the_same_facts(moec_: Moec, saved: Path) -> None:
    told = explain(moec.load(saved))
    table = moec_("explain", saved).stdout
    assert [line.split()[0] for line in table.splitlines()[1:10]] == [row.weight for row in told.products]
    assert table.rstrip().endswith(told.summary)
    assert moec_("explain", saved, "moe_1").stdout.strip() == str(explain(moec.load(saved), "moe_1"))
    plain = json.loads(moec_("explain", saved, "--json").stdout)
    assert plain == json.loads(json.dumps(told.to_json()))


def test_explaining_changes_nothing() -> None:
    program = compiled()
    text, weights = program.text(), {n: v.clone() for n, v in program.state_dict().items()}
    program.explain()
    assert program.text() == text
    assert all(torch.equal(weights[name], value) for name, value in program.state_dict().items())
