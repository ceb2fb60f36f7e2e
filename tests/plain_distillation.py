"""Teachers and students in plain PyTorch: loops over tokens, layers heard by hooks, losses word by word."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import moec
from examples.gpt import GPT, GPTConfig
from moec.plan import Distill
from moec.program import Program
from moec.runtime.data import IGNORED, Batch

VOCABULARY, WIDTH, EXPERTS, CHOSEN, BALANCE = 13, 12, 3, 2, 0.01
DENSE: dict[str, Any] = {"compile": {"verify": "off"}}
SPARSE: dict[str, Any] = {
    "moe": {
        "layers": "all", "experts": EXPERTS, "top_k": CHOSEN, "gate": "normalized", "residual": "learned",
        "init": "noise", "init_noise": 0.5, "balance_loss": BALANCE, "router_std": 0.5,
    },
    "compile": {"verify": "off"},
}  # fmt: skip


def gpt(layers: int, seed: int = 0, **changes: Any) -> GPT:
    """An ordinary model, its weights far from the start of a training."""
    torch.manual_seed(seed)
    sizes = {"vocab": VOCABULARY, "seq": 6, "width": WIDTH, "heads": 2, "dropout": 0.0, **changes}
    model = GPT(GPTConfig(layers=layers, **sizes)).double()
    for value in model.parameters():
        value.data.add_(0.2 * torch.randn_like(value))
    return model


class ResidualExperts(nn.Module):
    """A feed-forward and the experts beside it, mixed by a softmax: one token at a time."""

    def __init__(self, dense: nn.Module, told: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.dense, self.balance = dense, torch.zeros(())
        for name, value in told.items():
            self.register_parameter(name, nn.Parameter(value.clone()))

    def forward(self, x_BSD: Tensor) -> Tensor:
        shares, counts, rows = [], torch.zeros(EXPERTS, dtype=torch.float64), []
        for x_D in x_BSD.flatten(0, 1):
            share_E = (self.router_weight @ x_D).softmax(0)
            chosen = share_E.argsort(descending=True)[:CHOSEN].tolist()
            total = sum((share_E[e] for e in chosen), torch.zeros(()))
            sparse = sum((self.expert(e, x_D) * share_E[e] / total for e in chosen), torch.zeros(()))
            mix = (self.coefficient_weight @ x_D + self.coefficient_bias).softmax(0)
            rows.append(sparse * mix[0] + self.dense(x_D) * mix[1])
            shares.append(share_E)
            counts[chosen] += 1
        self.balance = EXPERTS / CHOSEN * (torch.stack(shares).mean(0) * counts / len(rows)).sum()
        return torch.stack(rows).view_as(x_BSD)

    def expert(self, number: int, x_D: Tensor) -> Tensor:
        """What one expert makes of one token."""
        h_F = nn.functional.gelu(self.up_weight[number] @ x_D + self.up_bias[number])
        return self.down_weight[number] @ h_F + self.down_bias[number]


class Plain:
    """The model that `program` was compiled from, with the program's weights, and its experts by hand.

    `names`: the program's name of each parameter.
    """

    def __init__(self, program: Program, layers: int) -> None:
        self.model, told = gpt(layers), program.state_dict()
        sparse: dict[str, str] = {}
        for layer in range(layers if "moe_0.router.weight" in told else 0):
            block = self.model.blocks[layer]
            own = {n: v for n, v in told.items() if n.startswith((f"moe_{layer}.", f"mix_{layer}."))}
            short = {name.split(".", 1)[1].replace(".", "_"): name for name in own}
            block.mlp = ResidualExperts(block.mlp, {key: told[name] for key, name in short.items()})  # type: ignore[assignment]
            sparse |= {f"blocks.{layer}.mlp.{key}": name for key, name in short.items()}
        self.names = {n: sparse.get(n, n.replace(".dense.", ".")) for n, _ in self.model.named_parameters()}
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                value.copy_(told[self.names[name]])

    def run(self, tokens: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Logits, what leaves each layer, and the sum of the balance terms."""
        heard: list[Tensor] = []
        hooks = [b.register_forward_hook(lambda _m, _a, out: heard.append(out)) for b in self.model.blocks]
        logits = self.model(tokens)
        for hook in hooks:
            hook.remove()
        experts = [m for m in self.model.modules() if isinstance(m, ResidualExperts)]
        return logits, heard, BALANCE * sum((m.balance for m in experts), torch.zeros(()))


def plain_loss(
    student: Plain, teacher: Plain, batch: Batch, distill: Distill, layers: Mapping[int, int]
) -> dict[str, Tensor]:
    """task + balance + alpha · T² · KL + hidden · distance, position by position; `layers`: student's →
    teacher's."""
    tokens, targets = batch
    logits, ours, balance = student.run(tokens)
    with torch.no_grad():
        told, theirs, _ = teacher.run(tokens)
    counted = [place for place in torch.cartesian_prod(*map(torch.arange, tokens.shape)).tolist()
               if int(targets[tuple(place)]) != IGNORED]  # fmt: skip
    rows: dict[str, list[Tensor]] = {"task": [], "kl": [], "hidden": []}
    for b, s in counted:
        rows["task"].append(-logits[b, s].log_softmax(0)[targets[b, s]])
        rows["kl"].append(divergence(logits[b, s], told[b, s], distill))
        apart = [
            ((ours[mine][b, s] - theirs[its][b, s]) ** 2).sum() / (theirs[its][b, s] ** 2).sum()
            for mine, its in layers.items()
        ]
        rows["hidden"] += [torch.stack(apart).mean()] if apart else []
    means = {name: torch.stack(row).mean() for name, row in rows.items() if row}
    total = means["task"] + balance + distill.alpha * distill.temperature**2 * means["kl"]
    if layers:
        total = total + distill.hidden * means["hidden"]
    return {**means, "balance": balance, "loss": total}


def divergence(logits_V: Tensor, teacher_V: Tensor, distill: Distill) -> Tensor:
    """The sum over words, one by one."""
    q, p = ((side / distill.temperature).softmax(0) for side in (logits_V, teacher_V))
    first, second = (q, p) if distill.direction == "reverse" else (p, q)
    return sum((a * (a / b).log() for a, b in zip(first, second, strict=True)), torch.zeros(()))


def compiled(layers: int, plan: Mapping[str, Any], seed: int) -> Program:
    """A program with weights of its own, the same at every call."""
    return copy.deepcopy(_compiled(layers, json.dumps(plan), seed))


@functools.cache
def _compiled(layers: int, plan: str, seed: int) -> Program:
    return moec.compile(gpt(layers, seed), json.loads(plan))
