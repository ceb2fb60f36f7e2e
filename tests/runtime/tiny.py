"""A small decoder in plain torch that can be trained: what the trainer's protocol asks for, and no more."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moec.plan import LayerSettings, Train
from moec.runtime.data import TextData, load_text
from moec.runtime.distillation.lesson import Lesson
from moec.runtime.distillation.losses import Words, kl_loss, weighted
from moec.runtime.trainable import LossTerms

LAYER = "moe_0"


class TinyProgram(nn.Module):
    """Embedding, a causal running mean, one top-k expert layer with dropout, tied head: tokens → logits."""

    embedding: nn.Parameter
    router: nn.Parameter
    up: nn.Parameter
    up_bias: nn.Parameter
    down: nn.Parameter
    bias: Tensor

    def __init__(
        self, *, vocabulary: int = 256, width: int = 12, dropout: float = 0.0, balance_loss: float = 0.01,
        settings: LayerSettings | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.settings = settings or LayerSettings(experts=3, top_k=2, balance_loss=balance_loss)
        experts, hidden = self.settings.experts, 2 * width
        shapes = {
            "embedding": (vocabulary, width), "router": (experts, width), "up": (experts, hidden, width),
            "up_bias": (experts, hidden), "down": (experts, width, hidden),
        }  # fmt: skip
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=draw) * 0.1))
        self.norm = nn.LayerNorm(width)
        self.dropout = dropout
        self.register_buffer("bias", torch.zeros(experts))

    def forward(self, tokens: Tensor) -> Tensor:
        return self._run(tokens)[0]

    def run(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self._run(tokens)[0], {}

    def loss_terms(
        self, tokens: Tensor, targets: Tensor | None = None, mask: Tensor | None = None,
        *, lesson: Lesson | None = None,
    ) -> LossTerms:  # fmt: skip
        assert targets is not None
        assert mask is None
        logits, affinity_TE, experts_TK = self._run(tokens)
        counts_E = torch.bincount(experts_TK.flatten(), minlength=self.settings.experts)
        share_E = counts_E / experts_TK.numel()
        task = F.cross_entropy(_wide(logits).flatten(0, 1), targets.flatten())
        balance = self.settings.balance_loss * len(share_E) * (affinity_TE.mean(0) * share_E).sum()
        zero = task.new_zeros(())
        found: LossTerms = {
            "loss": task + balance, "task": task, "balance": balance, "z": zero, "counts": {LAYER: counts_E}
        }  # fmt: skip
        if lesson is not None:
            everywhere = torch.ones_like(targets, dtype=torch.bool)
            kl = kl_loss(logits, lesson, everywhere, everywhere.sum(), Words(logits.shape[-1]))
            found |= {"loss": found["loss"] + weighted(lesson, kl, None), "kl": kl}
        return found

    def _run(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.embedding(tokens, self.embedding)
        steps = torch.arange(1, tokens.shape[1] + 1)
        x = x + x.cumsum(1) / steps[:, None]
        rows_TD = self.norm(x).flatten(0, 1)
        affinity_TE = F.linear(_wide(rows_TD), _wide(self.router)).softmax(-1)
        experts_TK = (affinity_TE + self.bias).topk(self.settings.top_k).indices
        chosen_TE = torch.zeros_like(affinity_TE).scatter(1, experts_TK, affinity_TE.gather(1, experts_TK))
        hidden_ETF = F.gelu(torch.einsum("td,efd->etf", rows_TD, self.up) + self.up_bias[:, None])
        out_TD = torch.einsum("etf,edf,te->td", hidden_ETF, self.down, chosen_TE.to(hidden_ETF.dtype))
        x = x + F.dropout(out_TD, self.dropout, self.training).view_as(x)
        return F.linear(x, self.embedding), affinity_TE, experts_TK

    def expert_parameter_names(self) -> set[str]:
        return {"up", "up_bias", "down"}

    def moe_settings(self) -> Mapping[str, LayerSettings]:
        return {LAYER: self.settings}

    def moe_biases(self) -> Mapping[str, Tensor]:
        return {LAYER: self.bias} if self.settings.balance == "bias" else {}

    def fingerprint(self) -> str:
        return f"tiny {self.settings} {self.dropout}"


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def tiny_text(folder: Path, *, sequence: int = 8, repeats: int = 400) -> TextData:
    """A short, easily learnt text, cut into sequences."""
    path = folder / "text.txt"
    path.write_text("".join(f"{n * n % 97} sheep, then {n % 7} goats.\n" for n in range(repeats)))
    return load_text(path, sequence=sequence)


def tiny_settings(**changes: object) -> Train:
    """Settings for a run of a few milliseconds a step."""
    fixed = {"steps": 10, "batch": 4, "sequence": 8, "eval_batches": 2, "log_every": 1, "lr": 3e-3}
    return Train.model_validate({**fixed, **changes})
