"""The demo's model trained dense, as a mixture of experts, and as a PR-MoE: equal tokens, several seeds.

    python -m benchmarks.dense_vs_sparse [--seeds 3] [--steps N] [--threads 1] [--out FILE]

All runs have the same text, batches, schedule and rate; a seed draws the weights, the routers and the order
of the batches, and is shared by all variants. A run that is in the results already, under the same
settings, is not repeated: stopped, the command goes on where it was. The table goes into
`docs/experiments.md` and the README.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import moec
from benchmarks.experiment import Course, Results, Run, spread, train_and_measure
from examples import gpt
from moec.plan import Plan, Train
from moec.runtime.data import TextData, load_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "dense_vs_sparse.json"
PAGES = ROOT / "docs" / "experiments.md", ROOT / "README.md"
BEGIN, END = "<!-- dense_vs_sparse: begin -->", "<!-- dense_vs_sparse: end -->"
CONSOLE = Console()

#: What `[moe]` says in each variant, with the gate and the balance term of the shipped plans. MoE: one of
#: eight experts, the dense model's arithmetic per token. PR-MoE: half as many experts in the earlier sparse
#: layer, and the dense feed-forward beside them. Experts start as copies of a feed-forward that is itself
#: freshly drawn.
MOE = {
    "layers": "1::2",
    "experts": 8,
    "top_k": 1,
    "gate": "probability",
    "balance_loss": 0.01,
    "init": "copy",
}
PYRAMID = {"experts": 4, "residual": "learned", "override": [{"layers": "-1:", "experts": 8}]}
VARIANTS: Mapping[str, Mapping[str, Any] | None] = {
    "dense": None,
    "MoE": MOE,
    "PR-MoE": MOE | PYRAMID,
    "PR-MoE, straight-through": MOE | PYRAMID | {"gate": "straight-through"},  # the demo's plan
}
TRAIN = Train(
    steps=600, batch=16, sequence=64, lr=3e-3, warmup=60, betas=(0.9, 0.99), eval_every=200,
    eval_batches=16, save_every=0, log_every=100,
)  # fmt: skip
FINAL_BATCHES = 250


def train_once(variant: str, seed: int, settings: Train, data: TextData) -> Run:
    """Train `variant` with `seed` from scratch, and measure it on text held out from training."""
    torch.manual_seed(seed)
    settings = settings.model_copy(update={"seed": seed})
    program = moec.compile(gpt.small(), plan=plan_of(variant, seed), verify="off")
    return train_and_measure(program, variant, seed, Course(settings, data, FINAL_BATCHES, CONSOLE))


def plan_of(variant: str, seed: int) -> Plan:
    """The plan of a variant; `seed` draws its routers and experts."""
    moe = VARIANTS[variant]
    return Plan.resolve(None if moe is None else {"moe": {**moe, "seed": seed}})


def conditions(settings: Train) -> dict[str, Any]:
    """All that has to be equal for two runs to be compared."""
    model = asdict(gpt.small().config)
    train = settings.model_dump(mode="json", exclude={"seed"})
    told = {"model": model, "variants": VARIANTS, "train": train, "final_batches": FINAL_BATCHES}
    return {**json.loads(json.dumps(told)), "threads": torch.get_num_threads()}


# the page


def table(runs: list[Run]) -> str:
    """The results as a Markdown table, a row per variant."""
    heads = "model", "held-out bits per byte", "below dense", "parameters", "active", "tokens/s", "seeds"
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    dense = {run.seed: run.bits for run in runs if run.variant == "dense"}
    for variant in VARIANTS:
        own = [run for run in runs if run.variant == variant]
        if not own:
            continue
        gains = [dense[run.seed] - run.bits for run in own if run.seed in dense]
        below = spread(gains, 3) if gains and variant != "dense" else ""
        cells = [variant, spread((r.bits for r in own), 3), below]
        cells += [f"{own[0].parameters:,}", f"{own[0].active:,}"]
        cells += [spread((r.tokens_per_cpu_second for r in own), 0), str(len(own))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_page(page: Path, runs: list[Run]) -> None:
    """Put the table between its two marks in `page`."""
    text = page.read_text(encoding="utf-8")
    head, found, rest = text.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not found or not closed:
        raise SystemExit(f"{page}: no lines {BEGIN} and {END} to put the table between")
    page.write_text(f"{head}{BEGIN}\n\n{table(runs)}\n\n{END}{tail}", encoding="utf-8")


def main() -> None:
    """Run what is missing, print as it goes, write the file and the page."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=TRAIN.steps)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--pages", type=Path, nargs="*", default=PAGES, help="Where the table stands.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warmup = min(TRAIN.warmup, options.steps // 10)
    settings = Train(**{**TRAIN.model_dump(), "steps": options.steps, "warmup": warmup})
    results, data = Results(options.out, conditions(settings)), load_text(sequence=settings.sequence)
    for seed in range(options.seeds):
        for variant in VARIANTS:
            if not results.has(variant, seed):
                CONSOLE.print(f"{variant}, seed {seed}")
                results.add(train_once(variant, seed, settings, data))
                CONSOLE.print(table(results.runs), soft_wrap=True)
    for page in options.pages:
        write_page(page, results.runs)


if __name__ == "__main__":
    main()
