"""How transformers generates on a CPU: its ways of computing experts, with and without torch.compile.

Each way is a model of its own that shares all weights with the others. `grouped_mm` is its default;
`batched_mm` copies the experts of every token and is what it switches to for decoding on a GPU, not on a CPU:
compiled, where the copies are fused away, it is its fastest way here, so it takes part.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CompileConfig, PreTrainedModel

#: Prompts i64 [B, S] and how many tokens to write, to the new tokens i64 [B, n].
Generate = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Way:
    """How experts are computed while the prompt is read (`reading`) and one token a time (`decoding`)."""

    reading: str
    decoding: str
    compiled: bool = False

    def options(self) -> dict[str, Any]:
        """What `generate` is told: a compiled step needs a cache of fixed length."""
        if not self.compiled:
            return {}
        config = CompileConfig(mode="default")
        setattr(config, "_compile_all_devices", True)  # noqa: B010  its type says None; without it no CPU
        return {"cache_implementation": "static", "compile_config": config}


WAYS = {
    "transformers": Way("grouped_mm", "grouped_mm"),
    "transformers, eager experts": Way("eager", "eager"),
    "transformers, compiled": Way("grouped_mm", "grouped_mm", compiled=True),
    "transformers, batched_mm, compiled": Way("grouped_mm", "batched_mm", compiled=True),
}


def transformers(twin: PreTrainedModel, way: Way) -> Generate:
    """Greedy texts by `generate` of a copy of `twin` that shares its weights."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in twin.parameters()}
    return _writing(copy.deepcopy(twin, shared), way)


def _writing(model: Any, way: Way) -> Generate:
    model.set_experts_implementation(way.reading)
    if way.decoding != way.reading:
        model._optimize_model_for_decode = lambda: _switched(model, way)

    def generate(tokens: Tensor, new: int) -> Tensor:
        out: Tensor = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=new,
            **way.options(),
        )
        return out[:, tokens.shape[1] :]

    return generate


@contextlib.contextmanager
def _switched(model: Any, way: Way) -> Iterator[None]:
    model.set_experts_implementation(way.decoding)
    yield
    model.set_experts_implementation(way.reading)


@dataclass
class ExpertsUsed:
    """How many different experts of a layer the tokens of a step chose, on average over layers and steps.

    Counted in one run of `twin`; steps that read a prompt do not count.
    """

    counts: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, twin: PreTrainedModel, tokens: Tensor, new: int) -> float:
        """The average while `new` tokens are written after `tokens`; `new` is two at least."""
        used = cls()
        routers = [module for name, module in twin.named_modules() if name.endswith("mlp.gate")]
        hooks = [router.register_forward_hook(used.count) for router in routers]
        _writing(twin, WAYS["transformers"])(tokens, new)
        for hook in hooks:
            hook.remove()
        decoding = used.counts[len(routers) :]
        return sum(decoding) / len(decoding)

    def count(self, router: nn.Module, given: Any, out: tuple[Tensor, Tensor, Tensor]) -> None:
        """A router's third output says who was chosen."""
        self.counts.append(out[2].unique().numel())
