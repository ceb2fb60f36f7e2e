"""What experts go by: how much of a token's expert follows from its byte, in `benchmarks.students`.

    python -m benchmarks.students_routing [--work build/students]

The mutual information of expert and byte over held-out text, as a share of the entropy of the expert: 1 where
the byte alone decides, 0 where it says nothing. The table goes into `docs/experiments.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moec
from benchmarks import machine
from benchmarks.experiment import spread
from benchmarks.page import RESULTS, record
from benchmarks.students import CONFIG, PAGE, TEACHER, folder_of
from moec.ir import regions
from moec.program import Program
from moec.runtime.data import load_text

OWN = RESULTS / "students_routing.json"
MODELS = "MoE 8", "MoE 8, first half", "MoE 8, second half", TEACHER
BATCHES, ROWS = 20, 64


def choices(program: Program, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """The expert of each token, i64 [T], by layer: the one with the highest score."""
    found: dict[str, list[Tensor]] = {}

    def listen(name: str) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
            tokens_TD = inputs[0].flatten(0, -2)
            found.setdefault(name, []).append((tokens_TD @ module.router.weight.t()).argmax(-1))

        return hook

    hooks = [m.register_forward_hook(listen(name)) for name, m in regions(program.graph, "moe").items()]
    with torch.no_grad():
        for tokens in batches:
            program(tokens)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


def told(experts_T: Tensor, words_T: Tensor) -> float:
    """Mutual information of expert and word over the entropy of the expert."""
    num_experts, num_words = int(experts_T.max()) + 1, int(words_T.max()) + 1
    counts = torch.bincount(words_T * num_experts + experts_T, minlength=num_words * num_experts)
    joint = counts.double().view(num_words, num_experts) / len(words_T)
    words, experts = joint.sum(1, keepdim=True), joint.sum(0, keepdim=True)
    information = torch.special.xlogy(joint, joint) - torch.special.xlogy(joint, words * experts)
    return float(information.sum() / -torch.special.xlogy(experts, experts).sum())


def measure(work: Path, seeds: int) -> list[dict[str, Any]]:
    """The share for each model, layer and seed."""
    data = load_text(sequence=CONFIG.seq)
    batches = [tokens for tokens, _ in data.held_out_batches(ROWS, BATCHES)]
    words = torch.cat([tokens.flatten() for tokens in batches])
    cases = []
    for name in MODELS:
        programs = [moec.load(folder_of(name, seed, work)).eval() for seed in range(seeds)]
        shares = [{k: told(v, words) for k, v in choices(p, batches).items()} for p in programs]
        cases.append({"model": name, "layers": {k: [s[k] for s in shares] for k in shares[0]}})
    return cases


def table(cases: list[dict[str, Any]]) -> str:
    """The cases as a Markdown table."""
    layers = sorted({layer for case in cases for layer in case["layers"]})
    heads = ["model", *layers]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for case in cases:
        cells = [spread(case["layers"][n], 2) if n in case["layers"] else "" for n in layers]
        lines.append(f"| {' | '.join([case['model'], *cells])} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write the record and the page."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--work", type=Path, default=Path("build/students"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OWN)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = measure(options.work, options.seeds)
    print(table(cases))
    found = {"machine": machine.describe(), "tokens": BATCHES * ROWS * CONFIG.seq, "cases": cases}
    record(found, options.out, OWN, table, PAGE)


if __name__ == "__main__":
    main()
