"""`[moe]`: which feed-forwards become sparse, and how; `[[moe.override]]`: where some of them differ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field, model_validator

from moec.plan.fields import (
    Balance,
    Capacity,
    Count,
    EvalCapacity,
    Gate,
    Init,
    Listed,
    Noise,
    NonNegative,
    PositiveShare,
    Residual,
    Selector,
    Whole,
)
from moec.plan.section import Path, Section, complaint


class LayerSettings(Section):
    """Everything one mixture-of-experts layer is made of: what `[moe]` says, its overrides applied."""

    experts: Count = Field(description="Experts in the layer.")
    top_k: Count = Field(default=1, description="Experts that each token is sent to.")
    residual: Residual = Field(
        default="none",
        description="What becomes of the dense feed-forward: dropped (none), kept beside the experts and "
        "added (sum, the PR-MoE paper), or mixed with them by a learned softmax of two weights (learned, "
        "DeepSpeed).",
    )
    capacity_factor: Capacity = Field(
        default="dropless",
        description="Rows an expert takes while training, as a multiple of an even share; tokens beyond it "
        "are dropped. Leave out, or say dropless, to keep every token.",
    )
    eval_capacity_factor: EvalCapacity = Field(
        default="train", description="The same outside training; train means: as capacity_factor."
    )
    min_capacity: Whole = Field(default=4, description="Rows an expert takes at least, whatever the factor.")
    random_token_selection: bool = Field(
        default=False,
        description="While training, an expert that overflows keeps tokens at random, not the first ones.",
    )
    gate: Gate = Field(
        default="straight-through",
        description="Weight of a chosen expert: its softmax value (probability, DeepSpeed); that divided by "
        "the sum over the chosen (normalized; with top_k = 1 always 1, which trains no router); the same "
        "in value, with a gradient for the router at any top_k (straight-through); or sigmoid scores divided "
        "by their sum (sigmoid; with top_k = 1 it is always 1 too).",
    )
    noise: Noise = Field(
        default="none",
        description="Exploration while training: none, the router's input times 1 ± jitter (jitter), or "
        "Gumbel noise on the scores that select (rsample).",
    )
    jitter: PositiveShare = Field(default=0.01, description="Half-width of the jitter, when noise is jitter.")
    balance: Balance = Field(
        default="loss",
        description="How load is evened out: a term in the loss (loss), or a selection bias per expert that "
        "is nudged after every step and adds nothing to the loss (bias).",
    )
    balance_loss: NonNegative = Field(
        default=0.01, description="Weight of the balance term, when balance is loss."
    )
    bias_rate: NonNegative = Field(default=0.001, description="Size of a nudge, when balance is bias.")
    z_loss: NonNegative = Field(
        default=0.0, description="Weight of the mean squared logsumexp of the router scores."
    )
    init: Init = Field(
        default="copy",
        description="Where expert weights come from: the feed-forward, copied (copy), copied with noise "
        "(noise), copied with some hidden units drawn anew (partial), its hidden units dealt out among the "
        "experts (split), or all drawn anew (fresh).",
    )
    init_noise: NonNegative = Field(
        default=0.01,
        description="Noise added by init noise, as a multiple of each weight's standard deviation.",
    )
    init_ratio: PositiveShare = Field(
        default=0.5, description="Share of each expert's hidden units that init partial draws anew."
    )
    router_std: NonNegative = Field(
        default=0.02, description="Standard deviation of the router's first weights."
    )

    @model_validator(mode="after")
    def _enough_experts(self) -> LayerSettings:
        if self.experts < self.top_k:
            raise _too_few(self.experts, self.top_k)
        return self

    @property
    def train_capacity(self) -> float:
        """Capacity factor in training as `moec.assign` takes it: 0.0 when dropless."""
        return 0.0 if self.capacity_factor == "dropless" else float(self.capacity_factor)

    @property
    def eval_capacity(self) -> float:
        """Capacity factor outside training as `moec.assign` takes it: 0.0 when dropless."""
        if self.eval_capacity_factor == "train":
            return self.train_capacity
        return 0.0 if self.eval_capacity_factor == "dropless" else float(self.eval_capacity_factor)

    @property
    def balance_weight(self) -> float:
        """Weight of the balance term in the loss: zero when a bias balances instead."""
        return self.balance_loss if self.balance == "loss" else 0.0

    def overridden(self, overrides: Iterable[Override]) -> LayerSettings:
        """These settings with each override's own keys laid over them, the last one on top.

        Raises PlanError when the outcome does not hold together.
        """
        merged = self.model_dump(include=set(LayerSettings.model_fields))
        for override in overrides:
            merged |= override.changes()
        return LayerSettings(**merged)


class Override(Section):
    """One `[[moe.override]]`: other settings for some of the layers that `[moe]` selects.

    `layers` counts the *selected* layers as if they were the whole model: under `[moe] layers = "1::2"`,
    `layers = "-2:"` is the last two sparse layers, and 0 is the first. Keys left out stay as `[moe]` says.
    """

    layers: Selector = Field(description="Which of the layers that [moe] selects, counted among those alone.")
    experts: Count | None = Field(default=None, description="As in [moe].")
    top_k: Count | None = Field(default=None, description="As in [moe].")
    residual: Residual | None = Field(default=None, description="As in [moe].")
    capacity_factor: Capacity | None = Field(default=None, description="As in [moe].")
    eval_capacity_factor: EvalCapacity | None = Field(default=None, description="As in [moe].")
    min_capacity: Whole | None = Field(default=None, description="As in [moe].")
    random_token_selection: bool | None = Field(default=None, description="As in [moe].")
    gate: Gate | None = Field(default=None, description="As in [moe].")
    noise: Noise | None = Field(default=None, description="As in [moe].")
    jitter: PositiveShare | None = Field(default=None, description="As in [moe].")
    balance: Balance | None = Field(default=None, description="As in [moe].")
    balance_loss: NonNegative | None = Field(default=None, description="As in [moe].")
    bias_rate: NonNegative | None = Field(default=None, description="As in [moe].")
    z_loss: NonNegative | None = Field(default=None, description="As in [moe].")
    init: Init | None = Field(default=None, description="As in [moe].")
    init_noise: NonNegative | None = Field(default=None, description="As in [moe].")
    init_ratio: PositiveShare | None = Field(default=None, description="As in [moe].")
    router_std: NonNegative | None = Field(default=None, description="As in [moe].")

    def changes(self) -> dict[str, object]:
        """The keys this override sets."""
        return self.model_dump(exclude_none=True, exclude={"layers"})


class Moe(LayerSettings):
    """The `[moe]` table: the settings of every selected layer, and the overrides (a later one wins)."""

    layers: Selector = Field(description="Which feed-forwards become sparse: a layer selector.")
    override: Annotated[tuple[Override, ...], Listed] = Field(
        default=(),
        description="Settings for some of the selected layers; a later override wins over an earlier one.",
    )
    seed: Whole = Field(default=0, description="Seed of every newly drawn weight.")

    @model_validator(mode="after")
    def _overrides_hold(self) -> Moe:
        """Each override must make sense on top of `[moe]` by itself, so that the mistake has a line."""
        for position, override in enumerate(self.override):
            experts, top_k = override.experts or self.experts, override.top_k or self.top_k
            if experts < top_k:
                raise _too_few(experts, top_k, ("override", position))
            if not override.changes():
                raise complaint(
                    "an override that changes nothing", "a key besides layers", at=("override", position)
                )
        return self


def _too_few(experts: int, top_k: int, at: Path = ()) -> Exception:
    found = f"experts = {experts} with top_k = {top_k}"
    return complaint(
        found, f"at least {top_k} experts, one for each that a token is sent to", at=(*at, "experts")
    )
