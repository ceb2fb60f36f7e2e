"""The table of products, its kernels, and packed weights."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from moec.errors import OperatorError
from moec.runtime.ops import products
from moec.runtime.ops.packed import PackedWeights, can_pack
from moec.runtime.ops.products import KERNELS, SMALLEST, choice, choices, multiply, product
from moec.testing.tolerances import error_of, tolerance_of

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"
)
SHAPES = [(1, 320, 1100), (2, 320, 1000), (4, 320, 1000), (16, 65, 1100), (64, 100, 1024), (100, 200, 300)]


def case(rows: int, width: int, depth: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w, b = torch.randn(rows, depth), torch.randn(width, depth) / depth**0.5, torch.randn(width)
    x, w, b = x.to(dtype), w.to(dtype), b.to(dtype)
    return x, w, b, x.double() @ w.double().t() + b.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_the_product(kernel: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, w, b, needed = case(*shape, dtype)
    for found in (KERNELS[kernel](x, w, b), KERNELS[kernel](x, w, None) + b):
        assert error_of(found, needed) <= tolerance_of(dtype)
        assert found.is_contiguous()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_product_and_multiply_agree_whatever_is_transposed(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    x, w, b, needed = case(*shape, dtype)
    for left in (x, x.t().contiguous().t()):
        for right in (w, w.t().contiguous().t()):
            out = torch.empty_like(needed, dtype=dtype)
            multiply(left, right, b, out)
            assert error_of(out, needed) <= tolerance_of(dtype)
            assert torch.equal(product(left, right, b), out)


@needs_onednn
def test_the_table() -> None:
    names = {
        shape: choice(*shape, torch.float32).name
        for shape in [(1, 4096, 1024), (2, 4096, 1024), (3, 4096, 1024), (2, 1024, 4096), (16, 1024, 4096),
                      (16, 4096, 512), (128, 2048, 512), (8, 8, 8)]
    }  # fmt: skip
    assert list(names.values()) == [
        "onednn", "mm turned", "onednn", "onednn", "onednn turned", "onednn", "onednn", "mm"
    ]  # fmt: skip
    assert choice(1, 4096, 1024, torch.bfloat16).name == "mm"
    assert choice(1, 4096, 1024, torch.bfloat16, packed=True).name == "packed"
    assert choice(1, SMALLEST // 64, 64, torch.float32).name == "onednn"
    assert choice(1, SMALLEST // 64 - 1, 64, torch.float32).name == "mm"
    assert all(choice(*shape, torch.float32).reason for shape in names)


@needs_onednn
def test_the_table_in_one_line() -> None:
    assert choices(4096, 512, torch.float32) == (
        "rows from 1: onednn, 2: mm turned, 3: onednn, 4: mm turned, 5: onednn"
    )
    assert choices(1024, 4096, torch.float32).endswith("64: onednn turned, 65: onednn")
    assert choices(1024, 4096, torch.bfloat16) == "mm"
    assert choices(1024, 4096, torch.float32, packed=True) == "packed"


def test_without_onednn_everything_is_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_HAS_ONEDNN", False)
    assert {choice(rows, 4096, 1024, torch.float32).name for rows in (1, 2, 16, 128)} == {"mm"}


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_packed_weights_give_the_same_product(rows: int, dtype: torch.dtype) -> None:
    kept = PackedWeights()
    weight = torch.randn(3, 96, 200).to(dtype)
    assert kept.keep(weight)
    parts = kept.find(weight)
    assert parts is not None
    x = torch.randn(rows, 200).to(dtype)
    for part, plain in zip(parts, weight, strict=True):
        needed = x.double() @ plain.double().t()
        assert error_of(product(x, plain, None, part), needed) <= tolerance_of(dtype)
    assert kept.num_bytes() >= weight.nbytes


@needs_onednn
def test_what_is_written_to_is_packed_no_more() -> None:
    kept = PackedWeights()
    weight = torch.randn(96, 200)
    kept.keep(weight)
    weight.mul_(2)
    assert kept.find(weight) is None
    kept.keep(weight)
    assert kept.find(weight.clone()) is None
    weight.data = torch.randn(96, 200)
    assert kept.find(weight) is None


@needs_onednn
def test_pieces_of_a_weight_are_written_to() -> None:
    kept, whole = PackedWeights(), torch.randn(6, 8)
    first, second = torch.empty(4, 8), torch.empty(2, 8)
    first.data, second.data = whole.split([4, 2])
    for piece in (first, second):
        kept.consists_of(whole, [first, second])
        kept.keep(whole)
        assert kept.find(whole) is not None
        with torch.no_grad():
            piece.mul_(2)
        assert kept.find(whole) is None
    kept.keep(whole)
    second.data = torch.randn(2, 8)
    assert kept.find(whole) is None
    kept.keep(whole)
    del first, piece
    gc.collect()
    assert kept.find(whole) is None


@needs_onednn
def test_packed_weights_die_with_their_source() -> None:
    kept = PackedWeights()
    weight = torch.randn(96, 200)
    kept.keep(weight)
    del weight
    gc.collect()
    assert kept.num_bytes() == 0


def test_what_cannot_be_packed() -> None:
    kept = PackedWeights()
    assert not kept.keep(torch.randn(4, 4, dtype=torch.float64))
    assert not can_pack(torch.empty(4, 4, device="meta"))
    with pytest.raises(OperatorError, match=r"a weight \[4\]"):
        kept.keep(torch.randn(4))
    with torch.inference_mode():
        inference = torch.randn(4, 4)
    with pytest.raises(OperatorError, match="inference mode"):
        kept.keep(inference)


def test_the_sides_are_exchanged_only_where_weights_lie_in_rows() -> None:
    w = torch.randn(1100, 65).t()
    assert products._kernel(torch.randn(16, 1100), w).name in ("onednn", "mm")
