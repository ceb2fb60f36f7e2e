"""The paper's experiments at a size that two cores train: experts and where they are, students and teachers.

    python -m benchmarks.students [--seeds 3] [--only NAME …] [--work build/students]

Sparse models at equal tokens (DeepSpeed-MoE, sections 3.3 and 4.1), then students of the PR-MoE with one
layer fewer: without a teacher, with it all the way, and with it for the first 70 % (section 4.2), each from
the teacher's layers and from fresh weights. A seed draws weights, routers and the order of the batches, and
is shared by all variants. Trained programs stay in `--work`, since students need their teachers. A run that
is in the results already is not repeated: stopped, the command goes on where it was. The tables go into
`docs/experiments.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import moec
from benchmarks.experiment import Course, Results, Run, spread, train_and_measure
from benchmarks.page import RESULTS, write_table
from examples.gpt import GPT, GPTConfig
from moec.plan import Plan, Train
from moec.program import Program
from moec.runtime.data import TextData, load_text
from moec.runtime.distillation.teacher import LiveTeacher
from moec.runtime.distillation.teaching import Teaching

PAGE = Path(__file__).parents[1] / "docs" / "experiments.md"
OWN = RESULTS / "students.json"
CONSOLE = Console()

CONFIG = GPTConfig(vocab=256, seq=64, layers=8, width=64, heads=4, dropout=0.0)
#: The gate and the balance term of the shipped plans; no token is dropped, experts begin as copies of a
#: feed-forward that is itself freshly drawn.
MOE = {"layers": "1::2", "experts": 8, "gate": "probability", "balance_loss": 0.01, "init": "copy"}
PYRAMID = {"residual": "learned", "override": [{"layers": "-2:", "experts": 16}]}
TEACHER = "PR-MoE 8/16"
SUMMED = f"{TEACHER}, summed"
SPARSE: Mapping[str, Mapping[str, Any]] = {
    "dense": {},
    "MoE 8": {"moe": MOE},
    "MoE 32": {"moe": MOE | {"experts": 32}},
    TEACHER: {"moe": MOE | PYRAMID},
    SUMMED: {"moe": MOE | PYRAMID | {"residual": "sum"}},
    "MoE 8, first half": {"moe": MOE | {"layers": [1, 3]}},
    "MoE 8, second half": {"moe": MOE | {"layers": [5, 7]}},
}
#: The teacher's part in a student's training.
ARMS: Mapping[str, Mapping[str, Any] | None] = {
    "no teacher": None,
    "teacher all the way": {"alpha": 1.0, "temperature": 1.0, "stop": 1.0},
    "teacher, staged": {"alpha": 1.0, "temperature": 1.0, "stop": 0.7},
}
STUDENTS: Mapping[str, Mapping[str, Any]] = {
    f"student {start}, {arm}": {"student": {"depth": 7, "init": init}}
    | ({} if how is None else {"distill": how})
    for start, init in (("of its layers", "teacher"), ("from scratch", "fresh"))
    for arm, how in ARMS.items()
}
#: A teacher that has learned for twice as long: another run of as many steps, on other text, from where the
#: first one ended.
BETTER_TEACHER = f"{TEACHER}, twice"
#: Students from scratch of a teacher that has learned for twice as long.
BETTER: Mapping[str, Mapping[str, Any]] = {
    f"student from scratch, better {arm}": {"student": {"depth": 7, "init": "fresh"}, "distill": how}
    for arm, how in ARMS.items()
    if how is not None
}
VARIANTS = {**SPARSE, **STUDENTS, BETTER_TEACHER: SPARSE[TEACHER], **BETTER}
TRAIN = Train(
    steps=600, batch=32, sequence=64, lr=3e-3, warmup=60, betas=(0.9, 0.99), eval_every=150,
    eval_batches=8, save_every=0, log_every=100,
)  # fmt: skip
FINAL_BATCHES = 125
OTHER_TEXT = 100


def train_once(variant: str, seed: int, settings: Train, data: TextData, work: Path) -> Run:
    """Train `variant` with `seed`, keep its program in `work`, and measure it on held-out text."""
    settings = settings.model_copy(update={"seed": seed + OTHER_TEXT * (variant == BETTER_TEACHER)})
    plan = plan_of(variant, seed)
    program = beginning(variant, seed, work)
    teaching = None
    if plan.distill is not None:
        known = BETTER_TEACHER if variant in BETTER else TEACHER
        teacher = LiveTeacher(moec.load(folder_of(known, seed, work)), plan.distill)
        teaching = Teaching(teacher, plan.distill, settings.steps)
    run = train_and_measure(program, variant, seed, Course(settings, data, FINAL_BATCHES, CONSOLE), teaching)
    program.eval().save(folder_of(variant, seed, work))
    return run


def plan_of(variant: str, seed: int) -> Plan:
    """The plan of a variant; `seed` draws its routers and experts, or a fresh student's weights."""
    tables = {name: dict(table) for name, table in VARIANTS[variant].items()}
    for drawn in tables.keys() & {"moe", "student"}:
        tables[drawn]["seed"] = seed
    return Plan.resolve(tables)


def beginning(variant: str, seed: int, work: Path) -> Program:
    """What a variant is before it is trained."""
    plan = plan_of(variant, seed)
    if plan.student is not None:
        return student_of(plan, seed, work)
    return moec.load(folder_of(TEACHER, seed, work)) if variant == BETTER_TEACHER else fresh(plan, seed)


def fresh(plan: Plan, seed: int) -> Program:
    """The model of `seed` under `plan`."""
    torch.manual_seed(seed)
    return moec.compile(GPT(CONFIG), plan=plan, verify="off")


def student_of(plan: Plan, seed: int, work: Path) -> Program:
    """The student of the teacher of `seed`."""
    return moec.load(folder_of(TEACHER, seed, work)).student(plan, verify="off")


def folder_of(variant: str, seed: int, work: Path) -> Path:
    """Where the program of a finished run lies."""
    return work / f"{variant.replace('/', '-').replace(', ', '-').replace(' ', '-')}-{seed}"


def conditions(settings: Train) -> dict[str, Any]:
    """All that has to be equal for two runs to be compared."""
    train = settings.model_dump(mode="json", exclude={"seed"})
    told = {"model": asdict(CONFIG), "variants": VARIANTS, "train": train, "final_batches": FINAL_BATCHES}
    return {**json.loads(json.dumps(told)), "threads": torch.get_num_threads()}


# the page


def table(runs: list[Run], variants: Iterable[str], against: str) -> str:
    """The results of `variants` as a Markdown table, each compared with `against`."""
    heads = [
        "model",
        "held-out bits per byte",
        f"below {against}",
        "parameters",
        "active",
        "tokens/s",
        "seeds",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    base = {run.seed: run.bits for run in runs if run.variant == against}
    for variant in variants:
        own = [run for run in runs if run.variant == variant]
        if own:
            lines.append(f"| {' | '.join(_cells(variant, own, {} if variant == against else base))} |")
    return "\n".join(lines)


def _cells(variant: str, own: list[Run], base: Mapping[int, float]) -> list[str]:
    gains = [base[run.seed] - run.bits for run in own if run.seed in base]
    speed = spread((run.tokens_per_cpu_second for run in own), 0)
    bits, below = spread((run.bits for run in own), 3), spread(gains, 3) if gains else ""
    return [variant, bits, below, f"{own[0].parameters:,}", f"{own[0].active:,}", speed, str(len(own))]


def tables(runs: list[Run]) -> dict[str, str]:
    """The tables of the page, by the name of their marks."""
    alone = {start: f"student {start}, no teacher" for start in ("of its layers", "from scratch")}
    by_start = {start: [name for name in STUDENTS if start in name] for start in alone}
    return {
        "sparse_models": table(runs, SPARSE, "dense"),
        "students_of_its_layers": table(runs, [TEACHER, *by_start["of its layers"]], alone["of its layers"]),
        "students_from_scratch": table(
            runs, [BETTER_TEACHER, *by_start["from scratch"], *BETTER], alone["from scratch"]
        ),
    }


def main() -> None:
    """Run what is missing, print as it goes, write the file and the page."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--work", type=Path, default=Path("build/students"), help="Where programs are kept.")
    parser.add_argument("--out", type=Path, default=OWN)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results, data = Results(options.out, conditions(TRAIN)), load_text(sequence=TRAIN.sequence)
    for seed in range(options.seeds):
        for variant in options.only:
            if not results.has(variant, seed):
                CONSOLE.print(f"{variant}, seed {seed}")
                results.add(train_once(variant, seed, TRAIN, data, options.work))
    for name, text in tables(results.runs).items():
        CONSOLE.print(text, soft_wrap=True)
        if options.out.resolve() == OWN.resolve():
            write_table(PAGE, name, text)


if __name__ == "__main__":
    main()
