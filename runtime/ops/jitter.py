"""`moec::jitter`: multiply by uniform noise around one while training (Switch Transformers, section 2.2).

jitter(x, epsilon, training) -> x * uniform(1 - epsilon, 1 + epsilon) while training, x itself otherwise
"""

from __future__ import annotations

from torch import Tensor

from moec.runtime.ops.draws import uniform_around_one
from moec.runtime.ops.registry import define_composite, demand


def _jitter(x: Tensor, epsilon: float, training: bool) -> Tensor:
    demand(0.0 <= epsilon < 1.0, "jitter", f"epsilon {epsilon}", "0 <= epsilon < 1")
    # A copy, because an operator whose schema promises a new tensor may not return its input.
    return x * uniform_around_one(x, epsilon) if training else x.clone()


define_composite("jitter(Tensor x, float epsilon, bool training) -> Tensor", _jitter, random=True)
