"""The trainer on a captured program: dropout, tied weights and bf16 go through the graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from examples.gpt import GPT, GPTConfig
from moec.capture import capture
from moec.ir.program import Program
from moec.plan import LayerSettings
from moec.runtime.train import Trainer, TrainResult
from moec.runtime.trainable import LossTerms
from tests.runtime.tiny import tiny_settings, tiny_text


class DenseProgram(Program):
    """A captured program with the loss of a dense model."""

    def loss_terms(
        self, tokens: Tensor, targets: Tensor | None = None, mask: Tensor | None = None
    ) -> LossTerms:
        assert targets is not None
        task = F.cross_entropy(self(tokens).float().flatten(0, 1), targets.flatten())
        return {"loss": task, "task": task}

    def moe_settings(self) -> dict[str, LayerSettings]:
        return {}

    def moe_biases(self) -> dict[str, Tensor]:
        return {}

    def fingerprint(self) -> str:
        return self.text()


def captured(seed: int) -> DenseProgram:
    torch.manual_seed(seed)
    config = GPTConfig(vocab=256, seq=16, layers=2, width=24, heads=3, dropout=0.2)
    program = capture(GPT(config))
    return DenseProgram(program.graph, **program._records())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_captured_gpt_learns_and_resumes_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    data = tiny_text(tmp_path)
    settings = tiny_settings(steps=16, batch=6, accumulate=3, eval_every=5, dtype=dtype, lr=0.02)

    def train(program: DenseProgram, folder: str, **how: int | bool) -> TrainResult:
        trainer = Trainer(program, settings, data, tmp_path / folder, console=Console(quiet=True))
        return trainer.run(**how)  # type: ignore[arg-type]

    whole, resumed = captured(seed=1), captured(seed=2)
    told = train(whole, "whole")
    train(captured(seed=1), "parts", stop_at=7)
    train(resumed, "parts", resume=True)
    for (name, left), (_, right) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert left.dtype == torch.float32
        assert torch.equal(left, right), name
    assert told.history[-1].loss < told.history[0].loss - 0.5
    assert told.final is not None
    assert told.final.load == {}
