"""A process group whose ranks are threads of one process (`moec.runtime.simulated`).

What torch calls on a group of processes, with a meeting of the threads behind it (`moec.runtime.meetings`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as c10d
from torch.futures import Future

from moec.errors import MeshError
from moec.runtime.meetings import Meetings, Part, sum_name


class ThreadGroup(dist.ProcessGroup):
    """The group of `ranks` along `axis`, as one of them sees it: what torch calls is below, and no more.

    The names of methods and arguments are torch's. Every call returns finished work.
    """

    def __init__(self, axis: str, ranks: tuple[int, ...], rank: int, meetings: Meetings) -> None:
        super().__init__(ranks.index(rank), len(ranks))  # type: ignore[call-arg]
        self._axis, self._ranks, self._rank, self._meetings = axis, ranks, rank, meetings

    def _meet(
        self, kind: str, terms: tuple[object, ...], given: Sequence[Tensor], taken: Sequence[Tensor]
    ) -> dist.Work:
        return self._finish(Part(kind, terms, _detached(given), _detached(taken)))

    def _finish(self, part: Part) -> dist.Work:
        self._meetings.meet(self._axis, self._ranks, self._rank, part)
        future: Future[Any] = Future()
        future.set_result(list(part.taken))
        work: dist.Work = c10d._create_work_from_future(future)  # type: ignore[attr-defined]
        return work

    def _each(self, tensor: Tensor, like: Tensor) -> tuple[Tensor, ...]:
        """The parts of `tensor` by rank, each shaped `like`."""
        return tensor.detach().reshape(len(self._ranks), *like.shape).unbind()

    def getBackendName(self) -> str:
        """What torch calls this kind of group."""
        return "threads"

    def getGroupName(self) -> str:
        """The name of the axis."""
        return self._axis

    @property
    def groupsum_name(self) -> str:
        """The name of the axis."""
        return self._axis

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:  # type: ignore[override]
        """Put the sum (or what `opts` says) of every rank's tensor into the tensors."""
        op = dist.AllreduceOptions() if opts is None else opts
        works = [self._meet("all_reduce", (sum_name(op.reduceOp), *_form(t)), [t], [t]) for t in tensors]
        return works[-1]

    allreduce_coalesced = allreduce

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> dist.Work:  # type: ignore[override]
        """Put every rank's input into a list."""
        pairs = zip(outputs, inputs, strict=True)
        return [self._meet("all_gather", _form(given), [given], taken) for taken, given in pairs][-1]

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        """Put every rank's input one after the other into `output`."""
        return self._meet("all_gather", _form(input), [input], self._each(output, input))

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        """`all_gather_single` of each pair."""
        return [self.all_gather_single(*pair) for pair in zip(outputs, inputs, strict=True)][-1]

    def reduce_scatter(  # type: ignore[override]
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None
    ) -> dist.Work:
        """Put the sum over the ranks of the tensor that is meant for this rank into each output."""
        op = sum_name((dist.ReduceScatterOptions() if opts is None else opts).reduceOp)
        pairs = zip(outputs, inputs, strict=True)
        return [self._meet("reduce_scatter", (op, *_form(taken)), given, [taken]) for taken, given in pairs][
            -1
        ]

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        """`reduce_scatter` of the parts of `input`, which lie one after the other."""
        return self.reduce_scatter([output], [list(self._each(input, output))], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        """`reduce_scatter_single` of each pair."""
        return [self.reduce_scatter_single(*pair, opts) for pair in zip(outputs, inputs, strict=True)][-1]

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int] | None,
        input_split_sizes: list[int] | None,
        opts: Any = None,
    ) -> dist.Work:
        """Send the rows of `input` to the ranks, and put what they send into `output`; no sizes mean equal
        ones."""
        sends, receives = self._rows(input, input_split_sizes), self._rows(output, output_split_sizes)
        terms = (input.dtype, tuple(input.shape[1:]))
        given, taken = _detached([input]), _detached([output])
        return self._finish(Part("all_to_all", terms, given, taken, sends, receives))

    def _rows(self, tensor: Tensor, sizes: list[int] | None) -> tuple[int, ...]:
        rows, ranks = tensor.shape[0], len(self._ranks)
        made = tuple(sizes) if sizes else (rows // ranks,) * ranks
        if len(made) != ranks or sum(made) != rows:
            found, where = f"{rows} rows, cut into {list(made)}", f"axis {self._axis}, all_to_all"
            raise MeshError(f"rank {self._rank}, {where}", found, f"{ranks} sizes that add up to the rows")
        return made

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:  # type: ignore[override]
        """Put the tensors of the root into everyone's."""
        root = (dist.BroadcastOptions() if opts is None else opts).rootRank
        works = [self._meet("broadcast", (f"root {root}", *_form(t)), [t], [t]) for t in tensors]
        return works[-1]

    def barrier(self, opts: Any = None) -> dist.Work:
        """Wait for every rank."""
        return self._meet("barrier", (), [], [])


def _form(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    return tensor.dtype, tuple(tensor.shape)


def _detached(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.detach() for tensor in tensors)
