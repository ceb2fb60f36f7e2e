"""`Decoder`: a program derived to decode, and the memory it decodes with."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from moec import ir
from moec.errors import DataError
from moec.ir import regions
from moec.ir.inputs import Input, factors
from moec.ir.stand_in import on_meta, with_stand_ins, without_stand_ins
from moec.passes.pipeline import cached, fused_decoder
from moec.passes.runner import Runner
from moec.runtime.generation.cache import Cache, Slot

DEFAULT_LENGTH, SMALLEST_LENGTH = 2048, 128


class Decoder:
    """Runs the *cached* program derived from `program`; shares its weights, in eval mode.

    `program`: the derived one, to print and read; `fused`: the same with larger operators, which is what
    runs. `max_positions`: what its tables were made for. `verify`: whether the derivation is proved, as in
    `moec.compile`. `packed`: weights are held a second time, as a CPU reads them fastest, each until it is
    written to. Implements `moec.runtime.generation.decoding.Decoding`.
    """

    def __init__(
        self, program: ir.Program, length: int, *, packed: bool = False, verify: str = "auto"
    ) -> None:
        self.vocabulary = program.source.vocabulary
        self.max_positions: int = length
        self.packed = packed
        self.program = _derived(program, length, verify).eval()
        self.fused = Runner(verify="off").run(self.program.fork(), fused_decoder(packed)).eval()
        self.state = weights_state(program)  # as it is now: joining products moved some weights
        graph = self.program.graph
        self._slots = [_slot(node) for node in _caches(graph.graph)]
        some = next(iter([*graph.parameters(), *graph.buffers()]), None)
        self._device = torch.device("cpu") if some is None else some.device

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._device

    def new_cache(self, rows: int, length: int) -> Cache:
        """Memory for `rows` rows of up to `length` positions; raises `DataError` beyond `max_positions`."""
        if length > self.max_positions:
            raise DataError("cache", f"{length} positions", f"at most {self.max_positions}")
        return Cache(self._slots, rows, length, self._device)

    def step(self, tokens_Bn: Tensor, past_B: Tensor, wanted_Bm: Tensor, cache: Cache, length: int) -> Tensor:
        """Logits [B, m, V]; see `moec.runtime.generation.decoding.Decoding.step`."""
        with torch.inference_mode():  # many small calls, each a third shorter than in no_grad
            views = cache.views(tokens_Bn.shape[0], length)
            logits: Tensor = self.fused.graph(tokens_Bn, past_B, wanted_Bm, *views)
        return logits.clone()  # an ordinary tensor again, which anyone may change


def _derived(program: ir.Program, length: int, verify: str) -> ir.Program:
    """The program that remembers; one on `meta` stays there, and nothing can be proved of it."""
    if not on_meta(program):
        return Runner(verify=verify).run(program.fork(), cached(length))
    return without_stand_ins(Runner(verify="off").run(with_stand_ins(program.fork()), cached(length)))


def decoder_of(
    program: ir.Program,
    known: list[Decoder],
    length: int | None,
    kind: type[Decoder] = Decoder,
    *,
    packed: bool = False,
) -> Decoder:
    """One of `known` that holds `length` positions and is up to date; else a new `kind`, put among them.

    A `packed` one will do where none was asked for.

    Tables are made for a power of two of positions, so that longer and longer requests do not each make their
    own. Raises `DataError` for more positions than the model has.
    """
    limit = program.source.max_positions
    if length is not None and limit is not None and length > limit:
        raise DataError("decoder", f"{length} positions", f"at most {limit}, the model's limit")
    wanted = length or limit or DEFAULT_LENGTH
    known[:] = [one for one in known if one.state == weights_state(program)]
    for one in known:
        if one.max_positions >= wanted and one.packed >= packed:
            return one
    rounded = max(1 << (wanted - 1).bit_length(), SMALLEST_LENGTH)
    known.append(kind(program, rounded if limit is None else min(rounded, limit), packed=packed))
    return known[-1]


def weights_state(program: ir.Program) -> tuple[object, ...]:
    """What a decoder was made from: it changes when any weight lies elsewhere, or positions are written to.

    Tables of positions are copies; all other weights are shared, so what is written to them is seen.
    """
    inside = regions(program.graph, "positions").values()
    tables = [t for region in inside for t in (*region.parameters(), *region.buffers())]
    lie = tuple((t.data_ptr(), t.dtype, t.device) for t in (*program.parameters(), *program.buffers()))
    return (lie, tuple((t.data_ptr(), _version(t)) for t in tables))


def _version(value: Tensor) -> int:
    """How often `value` was written to; tensors of inference mode do not say, and may not be written to."""
    return 0 if value.is_inference() else value._version


def _caches(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"][3:]


def _slot(node: fx.Node) -> Slot:
    given = node.meta["input"]
    assert isinstance(given, Input)
    sizes = [size if isinstance(size, int) else factors(size)[0] for size in given.sizes]
    return Slot(node.name, tuple(sizes), given.sizes.index("L"), given.dtype)
