"""The layer benchmarks, in small: contenders agree, a wrong one is caught, the page holds the record."""

from __future__ import annotations

import json
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from benchmarks import decode, layer, page, peers
from benchmarks.layers import Shape, Sparse, Unfused

LIMITS = {"gflops_float32": 100.0, "gflops_bfloat16": 200.0, "read_gb_per_s": 20.0}
SWIGLU = Shape(16, 24, 4, 2, gated=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contenders_compute_the_same(dtype: torch.dtype) -> None:
    eager: layer.Make = partial(peers.hugging_face, experts="eager")
    case = layer.Case("small", 40, SWIGLU, {"eager": eager, "grouped_mm": peers.hugging_face})
    result = layer.measure(case, dtype, 1, LIMITS)
    assert list(result.times) == ["moec", "moec, not fused", "moec, fresh memory", "eager", "grouped_mm"]
    assert result.times["moec"]["min_ratio"] == 1.0
    assert result.gflop == pytest.approx(6 * 40 * 2 * 16 * 24 * 3 / 1e9)
    unfused = Unfused(ours := Sparse(SWIGLU, dtype))
    layer.check_agreement("unfused", unfused, ours, torch.randn(40, 16).to(dtype))


class Wrong(nn.Module):
    """Twice what it should be."""

    def __init__(self, right: nn.Module) -> None:
        super().__init__()
        self.right = right

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.right(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_peer_is_not_timed(dtype: torch.dtype) -> None:
    case = layer.Case("small", 40, SWIGLU, {"wrong": Wrong})
    with pytest.raises(AssertionError, match="wrong and moec agree on"):
        layer.measure(case, dtype, 1, LIMITS)


def test_decoding_packs_a_copy_over_the_same_memory() -> None:
    ours = Sparse(Shape(32, 48, 4, 1, gated=False, gate="probability", residual=True)).eval()
    packed, x = ours.packed(), torch.randn(8, 32)
    assert packed.up.data_ptr() == ours.up.data_ptr()
    layer.check_agreement("packed", packed, ours, x)


def test_batches_begin_where_they_are_told() -> None:
    seen: list[float] = []
    batches = [torch.full((1, 1), float(place)) for place in range(decode.INPUTS)]
    recorder = nn.Identity()
    recorder.register_forward_hook(lambda *found: seen.append(float(found[2])))
    steps = decode.Steps(recorder, batches, 3 * decode.STRIDE)
    for _ in range(3):
        steps()
    assert seen == [15.0, 0.0, 1.0]


def test_a_peer_that_refuses_is_reported_in_its_own_words() -> None:
    class Refusing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("not fewer than 4\nsecond line")

    ours = Sparse(Shape(16, 24, 4, 1, gated=False, gate="probability")).eval()
    with pytest.raises(peers.MissingPeerError, match=r"refuses 1 tokens: not fewer than 4$"):
        decode._willing("peer", Refusing(), ours, torch.randn(1, 16))


@pytest.mark.parametrize("benchmark", [layer, decode])
def test_the_page_holds_what_was_recorded(benchmark: ModuleType) -> None:
    record = json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))
    text = page.PAGE.read_text(encoding="utf-8")
    assert benchmark.page_table(record["cases"]) in text
