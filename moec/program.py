"""`moec.Program`: a compiled program with everything one can do to it.

`ir.Program` is the data passes work on; this adds the verbs that need the upper floors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor, fx

from moec import ir
from moec.errors import PassError
from moec.ir import region_of, regions
from moec.ir.results import tapped_layers
from moec.ir.retarget import on_device
from moec.objective import Objective
from moec.plan import LayerSettings, Plan, Train

if TYPE_CHECKING:
    from moec.cost.cost import Cost
    from moec.cost.reading.operators.attention import Attention
    from moec.cost.reading.routing import Routing
    from moec.decoder import Decoder
    from moec.foresight import Phase
    from moec.local_program import LocalProgram
    from moec.runtime.generation.generate import Generation, Stream
    from moec.runtime.generation.prompts import PromptsLike
    from moec.runtime.generation.request import Options
    from moec.simulation import Simulation


class Program(Objective):
    """A program that can be run, trained, saved and shown; `moec.compile` makes it, `moec.load` reads it
    back."""

    backend: str = "eager"
    _compiled: Callable[[Tensor], Any] | None = None
    _fused: tuple[Program, ...] = ()  # in a tuple: no child of this module
    _tapped: tuple[Program, ...] = ()
    _decoders: list[Decoder] | None = None

    @classmethod
    def of(cls, program: ir.Program, backend: str = "eager") -> Program:
        """The same program with the upper verbs; shares the graph and all weights."""
        made = cls(program.graph, **program._records())
        made.backend = backend
        return made

    def _execute(self, tokens: Tensor) -> Any:
        if self.backend in ("eager", "fused"):
            return self.executed(tokens)
        if self._compiled is None:
            compiled = torch.compile(self.graph, backend=self.backend, fullgraph=True, dynamic=True)
            object.__setattr__(self, "_compiled", compiled)
        assert self._compiled is not None
        return self._compiled(tokens)

    @property
    def executed(self) -> fx.GraphModule:
        """The graph that runs: `graph`, or the fused one over the same weights where the backend says so."""
        if self.backend != "fused":
            return self.graph
        if not self._fused:
            self._fused = (self.fused(verify="off"),)
        graph = self._fused[0].graph
        if graph.training != self.graph.training:
            graph.train(self.graph.training)
        return graph

    def fused(self, verify: str = "auto") -> Program:
        """The same program with fewer, larger operators (stage *fused*), over the same weights.

        Parameters have the same names, so it trains as this one does and loads the same state.
        `explain()` of it says what was fused, what was not, and why. `verify`: as of `moec.compile`.
        """
        from moec.passes.pipeline import fused
        from moec.passes.runner import Runner

        made = Runner(verify=verify).run(self.fork(), fused())
        assert isinstance(made, Program)
        return made.train(self.training)

    def tapped(self, layers: Iterable[int], verify: str = "auto") -> Program:
        """The same program, whose terms hold `"hidden"` too: by layer, what leaves it, x [B, S, D].

        It shares the weights, is kept for the next call, runs by the same backend (compiled or fused for
        itself) and cannot be saved. Raises `PassError` for a layer that is not there, and where the residual
        stream cannot be cut. `verify`: as of `moec.compile`.
        """
        from moec.passes.runner import Runner
        from moec.passes.tap_hidden import TapHidden

        wanted = tuple(sorted(set(layers)))
        made = next((one for one in self.taps if tapped_layers(one.graph) == wanted), None)
        if made is None:
            forked = Runner(verify=verify).run(self.fork(), [TapHidden(wanted)])
            made = self._made_like_this(forked)
            self._tapped = (*self._tapped, made)
        return made if made.training == self.training else made.train(self.training)

    @property
    def taps(self) -> tuple[Program, ...]:
        """The tapped programs over these weights that were made so far; itself where it is one."""
        return (self, *self._tapped) if tapped_layers(self.graph) else self._tapped

    def _made_like_this(self, made: ir.Program) -> Program:
        """A program that passes made of this one, with what passes know nothing of."""
        assert isinstance(made, Program)
        made.backend = self.backend
        return made

    def moe_settings(self) -> Mapping[str, LayerSettings]:
        """The settings of each expert layer, by name; empty for a dense program."""
        found = {}
        for name, module in regions(self.graph, "moe").items():
            region = region_of(module)
            assert region is not None
            known = {
                key: value for key, value in region.settings.items() if key in LayerSettings.model_fields
            }
            found[name] = LayerSettings(**known)
        return found

    def moe_biases(self) -> Mapping[str, Tensor]:
        """The selection biases f32 [E] of the layers balanced by bias; the trainer nudges them in place."""
        return {
            name: module.get_buffer("bias")
            for name, module in regions(self.graph, "moe").items()
            if isinstance(getattr(module, "bias", None), Tensor)
        }

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """As of `nn.Module`, under the user's names; with `assign=True` what is given becomes the weights."""
        try:
            return super().load_state_dict(*args, **options)
        finally:
            self._fused, self._tapped = (), ()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`.to()`, `.cuda()`, …: device constants in the graph follow the weights."""
        super()._apply(fn, recurse)
        self._fused, self._tapped = (), ()  # weights may be other tensors now
        self._decoders = None  # their tables stayed where they were
        some = next(self.parameters(), None)
        if some is not None:
            on_device(self.graph, some.device)
        return self

    # writing

    def generate(
        self,
        tokens: PromptsLike,
        max_new_tokens: int,
        *,
        stream: Stream | None = None,
        **options: Unpack[Options],
    ) -> Tensor | list[Tensor]:
        """Go on from `tokens`, i64 [B, S] or a list of prompts of any lengths, by at most `max_new_tokens`.

        Takes the likeliest token each time, unless a `temperature` is given; further `top_k`, `top_p`,
        `repetition_penalty`, `seed`, `stop`, `mask`, `pad`, `rows`, `chunk`, `keep`: see
        `moec.runtime.generation.request.Options`. `stream(row, token)` is called for every token as it
        comes; a row for which it returns False ends there.

        Gives prompts and new tokens, [B, S + n], or a list of tensors where a list was given. Raises
        `DataError` before any work for what cannot be done, rows longer than the model's limit among it.
        """
        from moec.runtime.generation.generate import finished

        return finished(self.stream(tokens, max_new_tokens, **options), stream)

    def stream(self, tokens: PromptsLike, max_new_tokens: int, **options: Unpack[Options]) -> Generation:
        """The tokens of `generate` as they come: an iterator of events (`id`: the row, `token`, `ended`).

        Rows can be cancelled on the way, `result()` gives what `generate` gives; see
        `moec.runtime.generation.generate.Generation`.
        """
        from moec.runtime.generation.generate import Generation
        from moec.runtime.generation.request import Request

        request = Request.of(
            tokens,
            max_new_tokens,
            vocabulary=self.source.vocabulary,
            max_positions=self.source.max_positions,
            **options,
        )
        return Generation(self.decoder(request.length), request)

    # what others have built on top

    def fingerprint(self) -> str:
        """A hash of the text, the origins and the plan, not of the weights."""
        from moec.runtime.artifact import fingerprint

        return fingerprint(self)

    def explain(self, about: str = "") -> str:
        """What was done to each matrix product, and why not otherwise; `about`: a layer, region, weight or
        glob."""
        from moec.explain import explain

        executed = self._fused[0] if self.backend == "fused" and self.executed else self
        return str(explain(executed, about))

    def cost(
        self,
        phase: Phase = "training",
        routing: Routing | None = None,
        *,
        train: Train | None = None,
        rank: int = 0,
        attention: Attention | None = None,
    ) -> Cost:
        """What this program costs one rank, operator by operator, as expressions in batch, sequence and axes.

        `phase`: a `training` step, a `forward` run, or one step of the `decode`r. `routing`: how tokens are
        dealt out to experts (left out: evenly). `train`: how a step is taken (left out: as the plan says).
        `rank`: of a placed program, whose cost it is; the first holds as much as any other. `attention`: by
        kernels like `flash`, which compute scores again, or by `math`, product by product (left out: as torch
        takes it where the weights lie; on `meta`, as on a GPU). Nothing runs; a
        placed program is partitioned on `meta`. See `moec.cost.Cost`. Raises `CostError` for a routing that
        does not fit.
        """
        from moec.foresight import cost_of

        return cost_of(self, phase, routing, train=train, rank=rank, attention=attention)

    def show(self, path: str | Path, **sizes: int) -> Path:
        """Write a page that shows this program, and before and after of every pass; open it in a browser.

        One HTML file that needs no network and no server. `sizes`: numbers for the letters of FLOPs and bytes
        (`B=8, S=1024`). Atomic; gives the path. Raises `MoecError` where it cannot be written.
        """
        from moec.view.filming import timeline_of
        from moec.view.page import write_page

        return write_page(timeline_of(self, **sizes), path)

    def to_model_explorer(self, path: str | Path, **sizes: int) -> Path:
        """Write a graph collection for Google's model-explorer: one graph for every stage; gives the path.

        `sizes`: as of `show`. Open it with `model-explorer FILE`. Atomic. Raises `MoecError` where it cannot
        be written.
        """
        from moec.view.model_explorer import write_collection

        return write_collection(self, path, **sizes)

    def _repr_html_(self) -> str:
        """What a notebook shows: facts, passes, the text."""
        from moec.view.notebook import notebook_html

        return notebook_html(self)

    def save(self, directory: str | Path) -> Path:
        """Write text, manifest and weights; `moec.load` reads them. Atomic; nothing executable is pickled.

        A placed program is written with the program of its ranks, and its weights in the parts they hold.
        """
        from moec.runtime.artifact import save_program

        if tapped_layers(self.graph):
            raise PassError("program.save", "a program that gives hidden states", "the one it was made from")
        local = None if self.layout is None else self.partition(0)
        return save_program(self, directory, local=local)

    def student(
        self,
        plan: str | Path | Plan | Mapping[str, Any] | None = None,
        *,
        tokens: Tensor | None = None,
        depth: int | None = None,
        keep: Sequence[int] | None = None,
        verify: str = "auto",
    ) -> Program:
        """A program with fewer of this one's layers, over copies of its weights; this one stays as it is.

        `plan`: as of `moec.compile`; its `[student]` says which layers stay (default: this program's plan),
        or `depth` or `keep` does. `tokens` i64 [B, S]: text that importance is measured on. A dense program
        gets the experts of the plan's `[moe]` afterwards; one that has experts keeps them. The text of this
        program is the stage `teacher` of the other: `student.diff("teacher")`. Raises `PlanError` for layers
        that are not there, and `PassError` where layers cannot be told apart or this is the part of a rank.
        """
        from moec.students import student_of

        return student_of(self, plan, tokens=tokens, depth=depth, keep=keep, verify=verify)

    def partition(self, rank: int) -> LocalProgram:
        """The program of one rank: its parts of the weights (copies), its communication in the graph.

        The text is the same for every rank. A program that is not placed has one rank, 0. Raises `PassError`
        for a rank that is not on the mesh.
        """
        from moec.local_program import partition

        return partition(self, rank)

    def simulate(self, tokens: Tensor, targets: Tensor | None = None, **options: Any) -> Simulation:
        """Run all ranks of this placed program in one process, and compare them with it (`moec.simulate`)."""
        from moec.simulate import simulate

        return simulate(self, tokens, targets, **options)

    def decoder(self, length: int | None = None, *, packed: bool = False) -> Decoder:
        """The derived program that decodes rows of up to `length` positions (default: as the model has).

        It shares the weights and is kept for the next call, of `generate` too. `packed`: weights are held a
        second time in the order in which a CPU reads them fastest, each until it is written to. Raises
        `PassError`, naming the operator, where the program cannot be cached, and `DataError` for more
        positions than the model has.
        """
        from moec.decoder import decoder_of

        if self._decoders is None:
            self._decoders = []
        return decoder_of(self, self._decoders, length, self._decoder_class(), packed=packed)

    def _decoder_class(self) -> type[Decoder]:
        from moec.decoder import Decoder

        return Decoder

    def to_dtype(self, dtype: torch.dtype) -> Program:
        """A copy in another floating dtype, casts and constants included."""
        from moec.ir.retarget import in_dtype

        made = Program(in_dtype(self.graph, dtype), **self._records())
        made.backend = self.backend
        return made
