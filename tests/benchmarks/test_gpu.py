"""The GPU script: every part runs at tiny sizes in the interpreter, and what cannot run says why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_layers, gpu_tune, page
from benchmarks.gpu_clock import OutOfTimeError, Run, attempt

pytest.importorskip("triton", reason="Triton has no build for this platform")
from moec.runtime.ops.triton import shapes

ROOT = Path(gpu.__file__).parents[1]


def run_of(budget: float = 60.0) -> Run:
    """A dry run on the CPU."""
    return Run(torch.device("cpu"), torch.bfloat16, budget, dry=True)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one dry run wrote, in a process of its own."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(out)]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    assert gpu.layers_table(found["layers"]) in done.stdout
    return found


def test_every_part_runs(record: dict[str, Any]) -> None:
    assert {"command", "seconds", "machine", *gpu.PARTS} == record.keys()
    missing = [line for line in gpu.reasons(record) if "ScatterMoE: ModuleNotFoundError" not in line]
    assert not missing
    assert record["tests"]["status"] == 0
    assert {"decode", "train", "parameters"} <= record["model"].keys()
    assert record["model"]["decode"]["B1"]["of_bandwidth"] > 0


def test_contenders_compute_the_same_layer(record: dict[str, Any]) -> None:
    for row in record["layers"].values():
        assert row["moec"]["difference"] == 0.0
        for name in ("plain grouped_mm", "transformers grouped_mm"):
            assert 0.0 < row[name]["difference"] < 0.03


def test_tables_show_gaps() -> None:
    cell = {"forward_tflops": 401.4, "backward_tflops": 398.6, "kept_gb": 1.0, "peak_gb": 2.25}
    row = {
        "moec": cell,
        "ScatterMoE": {"failed": "gone"},
        "sonic_published": (2, 3),
        "scattermoe_published": (4, 5),
    }
    record = {"layers": {"T1": row}}
    assert gpu.layers_table(record["layers"]).splitlines()[-1] == "| T1 | 401 / 399 | – | 2 / 3 | 4 / 5 |"
    assert gpu.memory_table(record["layers"]).splitlines()[-1] == "| T1 | 1.00 / 2.25 | – |"
    tables = gpu.page_tables(record | {"decode": {"failed": "gone"}, "model": {"failed": "gone"}})
    assert all(title in tables for title in gpu.TABLES)
    assert gpu.reasons(record) == ["/layers/T1/ScatterMoE: gone"]


def test_the_sizes_and_the_published_lines() -> None:
    published = [(*size.sonic, *size.scatter) for size in gpu_layers.SIZES]
    assert published[0] == (338, 366, 180, 200)
    assert published[-1] == (594, 586, 384, 369)
    assert str(gpu_layers.SIZES[3]) == "T32768 d4096 n256 E256 K16"
    assert gpu_layers.SIZES[0].flops == 6 * 40960 * 8 * 768 * 256


def test_other_tiles_are_tried_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each candidate stands in the table while it is measured, and only then."""
    seen = []

    def stand_in(*_: Any) -> dict[str, float]:
        seen.append(shapes.shape_for("rows", torch.bfloat16, 4096, 4096, 4096))
        return {"forward_ms": 1.0}

    monkeypatch.setattr(gpu_tune, "_layer", stand_in)
    monkeypatch.setattr(gpu_tune, "_decoding", stand_in)
    before = shapes.shape_for("rows", torch.bfloat16, 4096, 4096, 4096)
    found = gpu_tune.tune(run_of())
    candidate = gpu_tune.CANDIDATES["rows", False][0]
    assert seen[:3] == [before, candidate, before]
    assert shapes.shape_for("rows", torch.bfloat16, 4096, 4096, 4096) == before
    assert found["T20 d16 n8 E4 K2, rows"] == {
        "as it is": {"forward_ms": 1.0},
        str(candidate): {"forward_ms": 1.0},
    }
    assert not gpu.reasons(found)


def test_the_page_has_a_place_for_the_tables() -> None:
    """And holds what was recorded, once there is a record."""
    text = page.PAGE.read_text(encoding="utf-8")
    assert all(text.count(mark) == 1 for mark in page.marks("gpu"))
    if gpu.RESULTS.exists():
        assert gpu.page_tables(json.loads(gpu.RESULTS.read_text(encoding="utf-8"))) in text


def test_a_part_that_fails_leaves_its_reason_and_the_others() -> None:
    found: dict[str, Any] = {}
    attempt("first", lambda: 1 / 0, found)
    attempt("second", lambda: {"x": 1}, found)
    assert found == {"first": {"failed": "ZeroDivisionError: division by zero"}, "second": {"x": 1}}


def test_a_part_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it found comes back with the machine; one that takes too long, or dies, leaves its reason."""
    monkeypatch.chdir(ROOT)
    found = gpu.alone("tests", ["--dry"], 120.0)
    assert found["tests"]["status"] == 0
    assert found["machine"]["host"]["cores"] >= 1
    assert gpu.alone("layers", ["--dry"], 0.1) == {"layers": {"failed": "not done after 0 s"}}
    assert "invalid float value" in gpu.alone("decode", ["--budget", "x"], 60.0)["decode"]["failed"]


def test_nothing_begins_without_time_for_it() -> None:
    with pytest.raises(OutOfTimeError, match="the rest: 0 s left of 0"):
        run_of(budget=0.0).demand(1.0, "the rest")
    run_of().demand(1.0, "the rest")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no CUDA device; --dry runs every part"):
        gpu.main(["--out", str(tmp_path / "gpu.json")])
