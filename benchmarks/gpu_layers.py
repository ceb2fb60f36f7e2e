"""Layers of SwiGLU experts on a GPU: ours, transformers' and plain `grouped_mm`, and ScatterMoE.

The six sizes, and the numbers published for them on an H100 in bf16 (forward / backward TFLOP/s), are those
of Guo et al., SonicMoE (2025). FLOPs are those of the experts' products: 6·T·K·n·d forward, twice as many
backward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moec.runtime.ops  # noqa: F401
from benchmarks.gpu_clock import Run, attempt

ops = torch.ops.moec
Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """Tokens, width, hidden width, experts, choices; what was published: SonicMoE's, ScatterMoE's."""

    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int
    sonic: tuple[int, int] = (0, 0)
    scatter: tuple[int, int] = (0, 0)

    @property
    def flops(self) -> float:
        """Of one forward."""
        return 6.0 * self.tokens * self.top_k * self.hidden * self.width

    def __str__(self) -> str:
        return f"T{self.tokens} d{self.width} n{self.hidden} E{self.experts} K{self.top_k}"


SIZES = (
    Size(40960, 768, 256, 128, 8, (338, 366), (180, 200)),
    Size(24576, 1536, 256, 128, 8, (363, 404), (205, 210)),
    Size(24576, 1536, 1024, 32, 2, (466, 466), (263, 280)),
    Size(32768, 4096, 256, 256, 16, (427, 459), (260, 236)),
    Size(32768, 4096, 512, 128, 8, (502, 511), (322, 302)),
    Size(32768, 4096, 2048, 64, 4, (594, 586), (384, 369)),
)
TINY = (Size(20, 16, 8, 4, 2),)


class Weights:
    """Router [E, d], up [E, 2n, d] (gate first) and down [E, d, n], leaves that gradients are taken of."""

    def __init__(self, size: Size, run: Run) -> None:
        def make(*shape: int) -> Tensor:
            values = torch.randn(*shape, device=run.device, dtype=run.dtype) / shape[-1] ** 0.5
            return values.requires_grad_()

        self.size = size
        self.router = make(size.experts, size.width)
        self.up = make(size.experts, 2 * size.hidden, size.width)
        self.down = make(size.experts, size.width, size.hidden)


def tokens_of(size: Size, run: Run) -> Tensor:
    """x [T, d], a leaf too."""
    return torch.randn(size.tokens, size.width, device=run.device, dtype=run.dtype, requires_grad=True)


def ours(weights: Weights, run: Run) -> Layer:
    """`moec.gate` and `moec.moe_ffn`, as a fused program calls them."""
    top_k, experts = weights.size.top_k, ours_experts(weights)

    def layer(x: Tensor) -> Tensor:
        _, shares, _, order, counts = ops.gate(
            x, weights.router, None, top_k, "normalized", "none", 0.0, 0.0, 4, False, True
        )
        return experts(x, shares, order, counts)

    return layer


def ours_experts(weights: Weights) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`moec.moe_ffn` alone."""
    hidden = weights.size.hidden
    formula = f"lambda h: silu(h[..., :{hidden}]) * h[..., {hidden}:]"

    def experts(x: Tensor, shares: Tensor, order: Tensor, counts: Tensor) -> Tensor:
        made: Tensor = ops.moe_ffn(
            x, shares, order, counts, [weights.up, weights.down], [None, None], formula
        )
        return made

    return experts


def already_routed(weights: Weights, run: Run) -> Layer:
    """The experts alone, on a table made before."""
    size, experts = weights.size, ours_experts(weights)
    x = torch.randn(size.tokens, size.width, device=run.device, dtype=run.dtype)
    with torch.no_grad():
        _, shares, _, order, counts = ops.gate(
            x, weights.router, None, size.top_k, "normalized", "none", 0.0, 0.0, 4, False, True
        )
    return lambda x: experts(x, shares, order, counts)


def _routed(x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    scores = F.linear(x, weights.router).float()
    best = scores.softmax(-1).topk(weights.size.top_k, -1)
    return best.values / best.values.sum(-1, keepdim=True), best.indices


def grouped_mm(weights: Weights, run: Run) -> Layer:
    """Rows sorted by expert, gathered, two of torch's `grouped_mm`, and added up."""
    size = weights.size

    def layer(x: Tensor) -> Tensor:
        shares, experts = _routed(x, weights)
        order = experts.flatten().argsort(stable=True)
        counts = torch.zeros(size.experts, dtype=torch.int64, device=x.device)
        counts = counts.scatter_add(0, experts.flatten(), torch.ones_like(experts.flatten()))
        ends, tokens = counts.cumsum(0).to(torch.int32), order // size.top_k
        gate, up = F.grouped_mm(x[tokens], weights.up.mT, offs=ends).chunk(2, -1)
        rows = F.grouped_mm(F.silu(gate) * up, weights.down.mT, offs=ends)
        rows = rows * shares.flatten()[order, None].to(rows.dtype)
        return torch.zeros_like(x).index_add(0, tokens, rows)

    return layer


def hugging_face(weights: Weights, run: Run) -> Layer:
    """Qwen3-MoE's sparse block of transformers v5, experts by `grouped_mm`; over the same memory."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    size = weights.size
    config = Qwen3MoeConfig(
        hidden_size=size.width,
        moe_intermediate_size=size.hidden,
        num_experts=size.experts,
        num_experts_per_tok=size.top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = "grouped_mm"
    before = torch.get_default_dtype()
    torch.set_default_dtype(run.dtype)
    try:
        with torch.device(run.device):
            block = Qwen3MoeSparseMoeBlock(config)
    finally:
        torch.set_default_dtype(before)
    names = {"gate.weight": "router", "experts.gate_up_proj": "up", "experts.down_proj": "down"}
    given = {name: getattr(weights, mine) for name, mine in names.items()}
    block.load_state_dict(given, assign=True)
    for name, value in given.items():
        owner, _, last = name.rpartition(".")
        setattr(block.get_submodule(owner), last, torch.nn.Parameter(value.detach()))

    def layer(x: Tensor) -> Tensor:
        found = block(x.unsqueeze(0))
        made: Tensor = (found[0] if isinstance(found, tuple) else found).squeeze(0)
        return made

    layer.leaves = list(block.parameters())  # type: ignore[attr-defined]
    return layer


def scattermoe(weights: Weights, run: Run) -> Layer:
    """ScatterMoE's gated layer, out of the folder given by ``--scattermoe`` or from where it is installed."""
    if run.scattermoe and run.scattermoe not in sys.path:
        sys.path.insert(0, run.scattermoe)
    from scattermoe.mlp import GLUMLP

    size = weights.size
    module = GLUMLP(size.width, size.hidden, size.experts, size.top_k, activation=torch.nn.SiLU())
    module = module.to(run.device, run.dtype)
    up, gate = weights.up.detach()[:, size.hidden :], weights.up.detach()[:, : size.hidden]
    module.experts.weight.data = torch.cat([up, gate], 1)
    module.output_experts.weight.data = weights.down.detach().clone()

    def layer(x: Tensor) -> Tensor:
        shares, experts = _routed(x, weights)
        made: Tensor = module(x, shares.to(x.dtype), experts)
        return made

    layer.leaves = [weights.router, *module.parameters()]  # type: ignore[attr-defined]
    return layer


CONTENDERS: dict[str, Callable[[Weights, Run], Layer]] = {
    "moec": ours,
    "moec, experts alone": already_routed,
    "plain grouped_mm": grouped_mm,
    "transformers grouped_mm": hugging_face,
    "ScatterMoE": scattermoe,
}


def measure(name: str, size: Size, weights: Weights, x: Tensor, run: Run) -> dict[str, float]:
    """TFLOP/s forward and backward, GB kept for the backward and at most, and the difference to ours."""
    run.demand(12.0 if not run.dry else 0.0, f"{name}, {size}")
    layer = CONTENDERS[name](weights, run)
    leaves = [x, *getattr(layer, "leaves", [weights.router, weights.up, weights.down])]
    grad = torch.randn_like(x)
    found = {} if "alone" in name else {"difference": _difference(layer, weights, x, run)}
    forward = run.seconds(lambda: layer(x), 1.5)
    backward = _backward_seconds(layer(x), leaves, grad, run)
    kept, _ = run.memory(lambda: layer(x))
    _, peak = run.memory(lambda: _gradients(layer(x), leaves, grad))
    return found | {
        "forward_ms": forward * 1e3,
        "backward_ms": backward * 1e3,
        "forward_tflops": size.flops / forward / 1e12,
        "backward_tflops": 2 * size.flops / backward / 1e12,
        "kept_gb": kept,
        "peak_gb": peak,
    }


def _backward_seconds(y: Tensor, leaves: list[Tensor], grad: Tensor, run: Run) -> float:
    return run.seconds(lambda: _gradients(y, leaves, grad, retain_graph=True), 2.0)


def _gradients(y: Tensor, leaves: list[Tensor], grad: Tensor, **options: Any) -> object:
    return torch.autograd.grad(y, leaves, grad, allow_unused=True, **options)


@torch.no_grad()
def _difference(layer: Layer, weights: Weights, x: Tensor, run: Run) -> float:
    """Median over tokens of |theirs - ours| / |ours|: few tokens may be routed otherwise by a rounded
    score."""
    mine, theirs = ours(weights, run)(x).float(), layer(x).float()
    apart = (theirs - mine).norm(dim=1) / mine.norm(dim=1).clamp_min(1e-9)
    return float(apart.median())


def layers(run: Run) -> dict[str, Any]:
    """Every size and contender; a contender that cannot run has its reason in its place."""
    record: dict[str, Any] = {}
    for size in TINY if run.dry else SIZES:
        row: dict[str, Any] = {"sonic_published": size.sonic, "scattermoe_published": size.scatter}
        weights = Weights(size, run)
        x = tokens_of(size, run)
        for name in CONTENDERS:
            attempt(name, lambda name=name, w=weights, x=x: measure(name, w.size, w, x, run), row)  # type: ignore[misc]
        record[str(size)] = row
        del weights, x
    return record
