"""Kept gradient memory: reused when nobody can see it, never before."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moec.runtime.ops.buffers import GRADIENTS, KeptBuffers

ops = torch.ops.moec
CPU = torch.device("cpu")
SHAPE = (4, 16, 8)


@pytest.fixture
def buffers() -> KeptBuffers:
    return KeptBuffers(smallest=1)


def take(buffers: KeptBuffers) -> Tensor:
    return buffers.empty(SHAPE, torch.float32, CPU)


def test_a_dropped_tensor_leaves_its_memory_to_the_next(buffers: KeptBuffers) -> None:
    first = take(buffers)
    where = first.data_ptr()
    del first
    second = take(buffers)
    assert second.data_ptr() == where
    assert second.is_contiguous()
    assert (second.shape, second.dtype) == (SHAPE, torch.float32)
    assert not second._is_view()


HOLDERS: dict[str, Callable[[Tensor], object]] = {
    "itself": lambda tensor: tensor,
    "view": lambda tensor: tensor[1:, ::2],
    "detached": lambda tensor: tensor.detach(),
    "numpy": lambda tensor: tensor.numpy()[2:],
    "storage": lambda tensor: tensor.untyped_storage(),
    "dlpack": lambda tensor: tensor.__dlpack__(),
    "grad": lambda tensor: _with_grad(tensor),
    "saved": lambda tensor: (torch.ones(SHAPE, requires_grad=True) * tensor).sum(),
}


def _with_grad(tensor: Tensor) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.zeros(SHAPE))
    parameter.grad = tensor
    return parameter


@pytest.mark.parametrize("kind", HOLDERS)
def test_whoever_holds_the_memory_keeps_it(kind: str, buffers: KeptBuffers) -> None:
    tensor = take(buffers)
    where = tensor.data_ptr()
    holder = HOLDERS[kind](tensor)
    del tensor
    assert take(buffers).data_ptr() != where
    del holder
    again = [take(buffers), take(buffers)]
    assert where in [tensor.data_ptr() for tensor in again]


def test_shared_memory_is_never_reused(buffers: KeptBuffers) -> None:
    take(buffers).share_memory_()
    first = take(buffers)
    assert not first.is_shared()


def test_small_other_device_and_disabled_requests_are_plain(buffers: KeptBuffers) -> None:
    assert KeptBuffers(smallest=1 << 20).empty(SHAPE, torch.float32, CPU).shape == SHAPE
    assert buffers.empty(SHAPE, torch.float32, torch.device("meta")).is_meta
    buffers.enabled = False
    take(buffers)
    assert buffers.num_bytes() == 0


def test_blocks_nobody_asks_for_are_forgotten() -> None:
    buffers = KeptBuffers(smallest=1, patience=3)
    take(buffers)
    for _ in range(5):
        buffers.empty((2, 3), torch.float64, CPU)
    buffers.empty((5, 7), torch.float64, CPU)
    assert buffers.num_bytes() == 48 + 280
    buffers.clear()
    assert buffers.num_bytes() == 0


def test_slack_lets_a_larger_block_serve_and_never_a_much_larger_one() -> None:
    buffers = KeptBuffers(slack=1.25, smallest=1)
    buffers.empty((100,), torch.uint8, CPU)
    for size in (100, 99, 80):
        assert buffers.empty((size,), torch.uint8, CPU).shape == (size,)
        assert buffers.num_bytes() == 100
    buffers.empty((79,), torch.uint8, CPU)
    buffers.empty((101,), torch.uint8, CPU)
    assert buffers.num_bytes() == 280
    exact = KeptBuffers(smallest=1)
    exact.empty((100,), torch.uint8, CPU)
    assert exact.empty((99,), torch.uint8, CPU).untyped_storage().nbytes() == 99


@pytest.fixture
def layer() -> Callable[[], tuple[Tensor, Tensor]]:
    """A grouped linear layer whose weight gradient (1.25 MB) is large enough to be kept."""
    torch.manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(5, 256, 256))
    rows, counts = torch.randn(12, 256), torch.tensor([3, 0, 4, 5, 0])
    GRADIENTS.clear()
    return lambda: (weight, ops.grouped_linear(rows, weight, None, counts).square().sum())


def plain_gradient(layer: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
    GRADIENTS.enabled = False
    weight, loss = layer()
    (gradient,) = torch.autograd.grad(loss, weight)
    GRADIENTS.enabled = True
    return gradient


def test_accumulation_and_both_kinds_of_zero_grad(layer: Callable[[], tuple[Tensor, Tensor]]) -> None:
    needed = plain_gradient(layer)
    for set_to_none in (True, False):
        for steps in (1, 3):
            for _ in range(steps):
                weight, loss = layer()
                loss.backward()
            torch.testing.assert_close(weight.grad, steps * needed)
            torch.optim.SGD([weight]).zero_grad(set_to_none=set_to_none)
    assert GRADIENTS.num_bytes() <= 2 * needed.nbytes


def test_the_gradient_of_the_last_step_is_where_this_step_writes(
    layer: Callable[[], tuple[Tensor, Tensor]],
) -> None:
    places = set()
    for _ in range(4):
        weight, loss = layer()
        loss.backward()
        assert weight.grad is not None
        places.add(weight.grad.data_ptr())
        weight.grad = None
    assert len(places) == 1


def test_retain_graph_and_gradients_kept_aside(layer: Callable[[], tuple[Tensor, Tensor]]) -> None:
    needed = plain_gradient(layer)
    weight, loss = layer()
    gradients = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(3)]
    for gradient in gradients:
        assert torch.equal(gradient, needed)
        gradient.zero_()
    assert len({gradient.data_ptr() for gradient in gradients}) == 3


def test_a_weight_used_twice_adds_both_gradients(layer: Callable[[], tuple[Tensor, Tensor]]) -> None:
    needed = plain_gradient(layer)
    weight, first = layer()
    _, second = layer()
    (first + second).backward()
    torch.testing.assert_close(weight.grad, 2 * needed)


def test_threads_never_share_memory(buffers: KeptBuffers) -> None:
    """Four threads take, fill, and drop at the same time; nobody writes where another still reads."""
    begin, spoiled = threading.Barrier(4), []

    def work(mine: float) -> None:
        held: list[Tensor] = []
        begin.wait()
        for step in range(300):
            held.append(take(buffers).fill_(mine))
            if any(bool((tensor != mine).any()) for tensor in held):
                spoiled.append(mine)
            del held[: step % 3]

    threads = [threading.Thread(target=work, args=(float(index),)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not spoiled
    assert buffers.num_bytes() < 4 * 300 * SHAPE[0] * SHAPE[1] * SHAPE[2] * 4 / 10  # most of it was reused
