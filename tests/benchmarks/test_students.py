"""The experiment on students: what its variants are, a run of each kind, and what the page says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import students as experiment
from benchmarks.experiment import Run
from benchmarks.students import (
    ARMS,
    BETTER_TEACHER,
    CONFIG,
    PAGE,
    SPARSE,
    STUDENTS,
    SUMMED,
    TEACHER,
    TRAIN,
    VARIANTS,
    beginning,
    folder_of,
    fresh,
    plan_of,
    student_of,
    table,
    tables,
    train_once,
)
from moec.runtime.data import TextData, load_text

RUN = Run("dense", 0, 2.0, 1000, 1000, 10.0, 2000.0, 5.0, {}, {"1": 4.0})
SHORT = TRAIN.model_copy(update={"steps": 10, "warmup": 1, "batch": 2, "eval_batches": 1, "eval_every": 5})


@pytest.fixture(scope="module")
def data() -> TextData:
    return load_text(Path(experiment.__file__).parent, sequence=CONFIG.seq)


def test_the_sparse_models_are_what_they_are_called() -> None:
    sizes = {name: fresh(plan_of(name, 0), 0).num_parameters() for name in SPARSE}
    ffn, width = 2 * 4 * 64 * 64 + 5 * 64, 64
    dense = sizes["dense"]
    assert sizes["MoE 8"] == dense + 4 * (7 * ffn + 8 * width)
    assert sizes["MoE 32"] == dense + 4 * (31 * ffn + 32 * width)
    assert sizes["MoE 8, first half"] == sizes["MoE 8, second half"] == dense + 2 * (7 * ffn + 8 * width)
    mixes = 4 * (2 * width + 2)
    assert sizes[SUMMED] + mixes == sizes[TEACHER]
    assert sizes[TEACHER] == dense + (8 + 8 + 16 + 16) * (ffn + width) + mixes


def test_each_start_has_every_arm() -> None:
    plans = [plan_of(name, 0) for name in STUDENTS]
    assert len(plans) == 2 * len(ARMS)
    stops = [(p.student.init, p.distill.stop if p.distill else None) for p in plans if p.student]
    assert stops == [(init, stop) for init in ("teacher", "fresh") for stop in (None, 1.0, 0.7)]


def test_a_student_learns_from_the_teacher_of_its_seed(
    tmp_path: Path, data: TextData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "FINAL_BATCHES", 2)
    teacher = train_once(TEACHER, 3, SHORT, data, tmp_path)
    assert folder_of(TEACHER, 3, tmp_path).is_dir()
    staged = "student of its layers, teacher, staged"
    student = train_once(staged, 3, SHORT, data, tmp_path)
    assert student.parameters < teacher.parameters
    assert student == replace(train_once(staged, 3, SHORT, data, tmp_path), **_clocks(student))
    alone = train_once("student of its layers, no teacher", 3, SHORT, data, tmp_path)
    assert alone.bits != student.bits


def _clocks(run: Run) -> dict[str, float]:
    names = "tokens_per_second", "tokens_per_cpu_second", "seconds"
    return {name: getattr(run, name) for name in names}


def test_a_better_teacher_begins_as_the_teacher(tmp_path: Path) -> None:
    fresh(plan_of(TEACHER, 1), 1).save(folder_of(TEACHER, 1, tmp_path))
    begun = beginning(BETTER_TEACHER, 1, tmp_path).state_dict()
    assert all(
        torch.equal(begun[name], value) for name, value in fresh(plan_of(TEACHER, 1), 1).state_dict().items()
    )


def test_students_from_scratch_differ_by_seed(tmp_path: Path) -> None:
    for seed in (0, 1):
        fresh(plan_of(TEACHER, seed), 0).save(folder_of(TEACHER, seed, tmp_path))

    def embedding(seed: int) -> torch.Tensor:
        made = student_of(plan_of("student from scratch, no teacher", seed), seed, tmp_path)
        return dict(made.named_parameters())["token_embedding.weight"]

    assert torch.equal(embedding(0), embedding(0))
    assert not torch.equal(embedding(0), embedding(1))


def test_the_tables_compare_run_by_run() -> None:
    runs = [RUN, replace(RUN, seed=1, bits=2.2), replace(RUN, variant="MoE 8", bits=1.9)]
    runs += [replace(RUN, variant="MoE 8", seed=1, bits=2.0)]
    assert table(runs, SPARSE, "dense").splitlines()[2:] == [
        "| dense | 2.100 ± 0.141 |  | 1,000 | 1,000 | 2,000 ± 0 | 2 |",
        "| MoE 8 | 1.950 ± 0.071 | 0.150 ± 0.071 | 1,000 | 1,000 | 2,000 ± 0 | 2 |",
    ]


def test_the_recorded_results_hold_what_the_page_says() -> None:
    recorded = json.loads(experiment.OWN.read_text(encoding="utf-8"))
    runs = [Run(**run) for run in recorded["runs"]]
    assert {(run.variant, run.seed) for run in runs} == {
        (name, seed) for name in VARIANTS for seed in range(3)
    }
    page = PAGE.read_text(encoding="utf-8")
    for text in tables(runs).values():
        assert text in page
