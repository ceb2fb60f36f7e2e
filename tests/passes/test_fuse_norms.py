"""Residual sums and the norms that read them: one operator where it pays, the reason where it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import fx

import moec
from moec.errors import VerifyError
from moec.ir import Program
from moec.passes.fuse_norms import FuseNorms
from moec.passes.runner import Runner
from moec.testing import DecoderRecipe
from moec.testing.parts.norms import NormRecipe
from moec.testing.recipe import BlockForm

ops = torch.ops.moec
FUSED = (ops.add_rms_norm.default, ops.add_layer_norm.default)
HERE = FuseNorms(devices=("cpu",))


def program(kind: str = "layer", block: BlockForm = "pre") -> moec.Program:
    norm = NormRecipe(kind, weight=True, bias=kind == "layer")  # type: ignore[arg-type]
    recipe = replace(DecoderRecipe(num_layers=2), norm=norm, block=block)
    return moec.compile(recipe.build(0, torch.float64), verify="off")


def fused(root: fx.GraphModule) -> list[fx.Node]:
    return [node for node in root.graph.nodes if node.target in FUSED]


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("block", ["pre", "post", "sandwich", "parallel_two_norms"])
def test_proved(kind: str, block: BlockForm) -> None:
    """Also where two norms read one sum, and where the sum is read by the norm alone."""
    larger = Runner(verify="full").run(program(kind, block), [HERE])
    assert larger.certificates[-1].verdict == "proved"
    assert fused(larger.graph)
    names = [node.name for node in larger.graph.graph.nodes]
    assert len(names) == len(set(names))


def test_every_sum_that_a_norm_reads() -> None:
    """Two a layer, after attention and after the feed-forward; that of the embeddings is of two shapes."""
    assert len(fused(Runner(verify="off").run(program(), [HERE]).graph)) == 4


def test_stays_on_a_cpu_and_says_so() -> None:
    larger = Runner(verify="off").run(program(), [FuseNorms()])
    assert not fused(larger.graph)
    assert "fuse_norms: root: sum and norm stay: on a cpu one operator is no faster" in larger.ledger.notes


def test_a_wrong_epsilon_is_caught() -> None:
    class Other(FuseNorms):
        def apply(self, program: Program) -> Program:
            done = super().apply(program)
            for node in fused(done.graph):
                node.update_arg(len(node.args) - 1, 1e-3)
            done.graph.recompile()
            return done

    with pytest.raises(VerifyError, match="pass other"):
        Runner(verify="full").run(program(), [Other(devices=("cpu",))])
