"""How long a decoder takes for a whole text: its prompt at once, then a step for every further token."""

from __future__ import annotations

from dataclasses import dataclass

from moec.cost.cost import Cost
from moec.cost.machine.hardware import Hardware
from moec.cost.timing.predict import predict
from moec.cost.timing.prediction import Prediction
from moec.errors import CostError


@dataclass(frozen=True)
class Generation:
    """`prefill`: the prompts of all rows at once, and their first token; `step`: one more token of each row;
    `tokens`: of a row, the first included; `rows`: of all ranks that hold other rows."""

    prefill: Prediction
    step: Prediction
    tokens: int
    rows: int

    @property
    def seconds(self) -> float:
        """Until the last token. A step reads the whole cache, so all of them take the same."""
        return self.prefill.seconds + (self.tokens - 1) * self.step.seconds

    @property
    def throughput(self) -> float:
        """Tokens a second, of all rows."""
        return self.tokens * self.rows / self.seconds

    def __str__(self) -> str:
        return (
            f"{self.seconds:.4g} s for {self.tokens} tokens of {self.rows} rows: prompts "
            f"{self.prefill.seconds * 1e3:.4g} ms, a step {self.step.seconds * 1e3:.4g} ms, "
            f"{self.throughput:.4g} tokens a second"
        )


def predict_generation(
    cost: Cost, hardware: Hardware, *, prompt: int, tokens: int, captured: bool = False, **letters: int
) -> Generation:
    """`tokens` tokens after prompts of `prompt` tokens, for `B` rows of each rank.

    `cost`: of the phase `decode`. `L`, the positions that the cache has room for, is `prompt + tokens` where
    it is not given. Raises `CostError` for another phase, for no tokens, and as `predict` does.
    """
    if cost.phase != "decode":
        raise CostError("predict_generation", f"the cost of phase {cost.phase!r}", 'program.cost("decode")')
    if prompt < 1 or tokens < 1:
        raise CostError("predict_generation", f"prompt {prompt}, tokens {tokens}", "one or more of each")
    room = {"L": prompt + tokens} | letters
    prefill, step = (
        predict(cost, hardware, captured=captured, **{"n": count, "m": 1} | room) for count in (prompt, 1)
    )
    seen = step.axes.get(cost.mesh.axis("data"), 1)
    return Generation(prefill, step, tokens, letters.get("B", 1) * seen)
