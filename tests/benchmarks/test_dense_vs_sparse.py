"""The experiment's bookkeeping: plans, seeds, results that are kept, and the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moec
from benchmarks import dense_vs_sparse as experiment
from benchmarks.dense_vs_sparse import BEGIN, END, TRAIN, conditions, plan_of, table, write_page
from benchmarks.experiment import Results, Run, spread
from examples import gpt
from moec.plan import Plan
from moec.runtime.data import load_text

RUN = Run("dense", 0, 2.0, 1000, 1000, 10.0, 2000.0, 5.0, {}, {"1": 4.0})


def test_the_variants_are_what_they_are_called() -> None:
    sizes = {}
    for variant in experiment.VARIANTS:
        program = moec.compile(gpt.small(), plan=plan_of(variant, 0), verify="off")
        sizes[variant] = (program.num_parameters(), program.num_parameters(active=True))
    dense = sizes["dense"][0]
    ffn = 2 * 4 * 96 * 96 + 5 * 96
    assert sizes["dense"] == (dense, dense)
    routers = 2 * 8 * 96
    assert sizes["MoE"] == (dense + 2 * 7 * ffn + routers, dense + routers)
    mix = 2 * (2 * 96 + 2)
    assert sizes["PR-MoE"] == (dense + (4 + 8) * ffn + 12 * 96 + mix, dense + 2 * ffn + 12 * 96 + mix)
    assert sizes["PR-MoE, straight-through"] == sizes["PR-MoE"]


def test_the_last_variant_is_the_demo() -> None:
    demo = Plan.from_toml(Path(gpt.__file__).with_name("pr_moe.toml")).moe
    assert plan_of("PR-MoE, straight-through", 0).moe == demo


def test_a_seed_draws_weights_and_routers() -> None:
    def routers(seed: int) -> torch.Tensor:
        program = moec.compile(gpt.small(), plan=plan_of("MoE", seed), verify="off")
        return dict(program.named_parameters())["moe_1.router.weight"]

    assert torch.equal(routers(0), routers(0))
    assert not torch.equal(routers(0), routers(1))


def test_one_run_is_measured_and_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "FINAL_BATCHES", 2)
    settings = TRAIN.model_copy(update={"steps": 2, "warmup": 1, "batch": 2, "eval_batches": 1})
    data = load_text(Path(gpt.__file__).parent, sequence=settings.sequence)
    first, again = (experiment.train_once("PR-MoE", 3, settings, data) for _ in range(2))
    assert (first.variant, first.seed, list(first.curve)) == ("PR-MoE", 3, ["2"])
    assert 4.0 < first.bits < 9.0
    assert set(first.busiest) == {"moe_1", "moe_3"}
    assert (first.bits, first.curve, first.busiest) == (again.bits, again.curve, again.busiest)
    assert experiment.train_once("PR-MoE", 4, settings, data).bits != first.bits


def test_results_are_kept_and_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "made" / "runs.json"
    results = Results(path, conditions(TRAIN))
    assert not results.has("dense", 0)
    results.add(RUN)
    again = Results(path, conditions(TRAIN))
    assert again.runs == [RUN]
    assert again.has("dense", 0)
    assert not again.has("dense", 1)
    assert not again.has("MoE", 0)
    assert json.loads(path.read_text(encoding="utf-8"))["machine"]["threads"] == torch.get_num_threads()
    with pytest.raises(SystemExit, match=r"runs\.json: runs under another train; give --out another file"):
        Results(path, conditions(TRAIN.model_copy(update={"lr": 1.0})))
    assert Results(path, conditions(TRAIN)).runs == [RUN]


def test_a_variant_may_come_later_but_not_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs.json"
    Results(path, conditions(TRAIN)).add(RUN)
    more = {**experiment.VARIANTS, "wide": {**experiment.MOE, "experts": 16}}
    monkeypatch.setattr(experiment, "VARIANTS", more)
    assert Results(path, conditions(TRAIN)).runs == [RUN]
    monkeypatch.setattr(experiment, "VARIANTS", {**more, "MoE": {**experiment.MOE, "experts": 16}})
    with pytest.raises(SystemExit, match="runs under another variants"):
        Results(path, conditions(TRAIN))


def test_a_seed_is_no_condition() -> None:
    other = TRAIN.model_copy(update={"seed": 7})
    assert experiment.conditions(TRAIN) == experiment.conditions(other)


def test_the_table_has_means_spreads_and_paired_gains() -> None:
    runs = [RUN, replace(RUN, seed=1, bits=2.2)]
    runs += [replace(RUN, variant="MoE", bits=1.9, parameters=3000, active=1001)]
    runs += [replace(RUN, variant="MoE", seed=1, bits=2.0, parameters=3000, active=1001)]
    assert table(runs).splitlines()[2:] == [
        "| dense | 2.100 ± 0.141 |  | 1,000 | 1,000 | 2,000 ± 0 | 2 |",
        "| MoE | 1.950 ± 0.071 | 0.150 ± 0.071 | 3,000 | 1,001 | 2,000 ± 0 | 2 |",
    ]
    assert spread([1.25], 1) == "1.2"


def test_the_page_changes_between_its_marks_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    write_page(page, [RUN])
    write_page(page, [RUN])
    assert page.read_text(encoding="utf-8") == f"before\n{BEGIN}\n\n{table([RUN])}\n\n{END}\nafter\n"
    page.write_text("no marks\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="no lines <!-- dense_vs_sparse: begin -->"):
        write_page(page, [RUN])


def test_the_recorded_results_hold_what_the_pages_say() -> None:
    recorded = json.loads(experiment.RESULTS.read_text(encoding="utf-8"))
    runs = [Run(**run) for run in recorded["runs"]]
    assert {run.variant for run in runs} == set(experiment.VARIANTS)
    for page in experiment.PAGES:
        assert table(runs) in page.read_text(encoding="utf-8")
