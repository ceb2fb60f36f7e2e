"""A program: one graph, the weights it runs on, and the record of how both came to be.

`Program` is what passes take and return. `moec.Program` adds the verbs that need the upper floors (training
loss, saving, generating, drawing).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from moec.errors import DataError, PassError, VerifyError, nearest

from .certificate import Certificate
from .diff import diff_text
from .graphs import fork
from .ledger import Ledger
from .origins import Origins
from .placement import Layout
from .region import region_of, regions
from .student_diff import student_diff
from .text import program_text


@dataclass(frozen=True)
class Tokenizer:
    """Which tokenizer made the tokens that a program was trained on: its name (`bytes`, or a path as it was
    given) and a digest of what it does."""

    name: str
    digest: str


@dataclass(frozen=True)
class Source:
    """What is known of the model a program was captured from.

    `vocabulary`: size of the last dim of the logits. `max_positions`: longest sequence, None when unbounded.
    `aliases`: tied parameters, other name → the name kept. `unused`: state of the model that its forward
    never reads, kept so that a dense state dict is complete. `notes`: remarks of the capture. `tokenizer`:
    that of the text it was trained on, None where nothing is known of it.
    """

    name: str
    vocabulary: int
    dtype: torch.dtype = torch.float32
    max_positions: int | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None


class Program(nn.Module):
    """A decoder as a readable graph: `program(tokens [B, S] i64) → logits [B, S, V]`.

    Holds `graph` (its only child), `stage`, `source`, `plan`, `origins`, `ledger`, `certificates` and
    `stages`,
    a snapshot of the graph after every pass. Snapshots share all weights with the program. Parameters keep
    the user's names wherever they are untouched (`named_parameters`, `state_dict`). `texts` holds the text of
    stages that are not there as graphs: those of a program that was loaded. `layout`: how the program lies on
    a mesh of ranks, from the stage *placed* on; `rank`: whose part of it this is, None for the whole.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        *,
        source: Source,
        origins: Origins,
        ledger: Ledger | None = None,
        stage: str = "captured",
        certificates: tuple[Certificate, ...] = (),
        snapshots: Mapping[str, fx.GraphModule] | None = None,
        plan: Any = None,
        texts: Mapping[str, str] | None = None,
        layout: Layout | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        self.graph = graph
        self.source, self.origins, self.stage, self.plan = source, origins, stage, plan
        self.layout, self.rank = layout, rank
        self.ledger = Ledger() if ledger is None else ledger  # one without rows is false, and may hold notes
        self.certificates = certificates
        self._snapshots = dict(snapshots or {})
        self.texts = dict(texts or {})
        self.register_load_state_dict_pre_hook(_to_structural_names)

    def fork(self) -> Program:
        """A copy whose graph may be rewritten freely; weights are shared, records are immutable."""
        return type(self)(fork(self.graph), **self._records())

    def _records(self) -> dict[str, Any]:
        return {
            "source": self.source, "origins": self.origins, "ledger": self.ledger, "stage": self.stage,
            "certificates": self.certificates, "snapshots": self._snapshots, "plan": self.plan,
            "texts": self.texts, "layout": self.layout, "rank": self.rank,
        }  # fmt: skip

    def with_snapshot(self, *names: str) -> Program:
        """Remember the present graph under `names` (a pass, and the stage it completes)."""
        kept = fork(self.graph)
        self._snapshots = {**self._snapshots, **dict.fromkeys(names, kept)}
        return self

    # running

    def run(self, tokens: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Logits [B, S, V] and the loss terms of the expert layers (empty for a dense program)."""
        self._check(tokens)
        out = self._execute(tokens)
        return out if isinstance(out, tuple) else (out, {})

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, S, V] for tokens [B, S] (i64)."""
        return self.run(tokens)[0]

    def _execute(self, tokens: Tensor) -> Any:
        return self.graph(tokens)

    def _check(self, tokens: Tensor) -> None:
        if tokens.dim() != 2 or tokens.is_floating_point() or tokens.numel() == 0:
            found = f"{str(tokens.dtype).removeprefix('torch.')} {list(tokens.shape)}"
            raise DataError("program(tokens)", found, "integers [B, S], with B and S at least 1")
        limit = self.source.max_positions
        if limit is not None and tokens.shape[1] > limit:
            raise DataError(
                "program(tokens)", f"{tokens.shape[1]} positions", f"at most {limit}, the model's limit"
            )

    # weights, under the user's names

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Like `nn.Module.named_parameters`, with the user's name for every untouched parameter."""
        for name, value in super().named_parameters("", recurse, remove_duplicate):
            yield _join(prefix, self._public(name)), value

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Like `nn.Module.named_buffers`, with the user's name for every untouched buffer."""
        for name, value in super().named_buffers("", recurse, remove_duplicate):
            yield _join(prefix, self._public(name)), value

    def state_dict(
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """Like `nn.Module.state_dict`, with the user's names; a tied tensor appears once."""
        named = super().state_dict(*args, prefix="", keep_vars=keep_vars)
        destination = {} if destination is None else destination
        destination.update({prefix + self._public(name): value for name, value in named.items()})
        return destination

    def _public(self, name: str) -> str:
        return self.origins.public_name(name.removeprefix("graph."))

    def num_parameters(self, active: bool = False) -> int:
        """Number of parameters, tied ones once; `active=True` counts only the experts one token uses."""
        total = sum(p.numel() for p in self.parameters())
        return total - self._idle_parameters() if active else total

    def _idle_parameters(self) -> int:
        idle, seen = 0, set[int]()
        for module in regions(self.graph, "moe").values():
            region = region_of(module)
            assert region is not None
            for name in region.settings["expert_parameters"]:
                value = module.get_parameter(name)
                if id(value) not in seen:
                    seen.add(id(value))
                    idle += value.numel() // region.settings["experts"] * region.settings["idle_experts"]
        return idle

    def expert_parameter_names(self) -> set[str]:
        """Names (as in `named_parameters`) of the parameters that have a leading expert axis."""
        return {name for name, origin in self.origins.items() if origin.experts}

    def to_dense_state_dict(self, strict: bool = True) -> dict[str, Tensor]:
        """The source model's state dict, rebuilt from this program.

        Every rewrite whose origin is reversible is undone: untouched weights, experts split from one
        feed-forward, copies that still agree. Raises `VerifyError` naming the parameters that training or the
        plan made irreversible; with `strict=False` they are left out.
        """
        dense: dict[str, Tensor] = dict(self.source.unused)
        lost: dict[str, str] = {}
        tensors = {name.removeprefix("graph."): value for name, value in nn.Module.state_dict(self).items()}
        for name, origin in self.origins.items():
            if origin.source is None or name not in tensors:
                continue
            value = origin.restore(tensors[name].detach())
            known = dense.get(origin.source)
            if value is None or (known is not None and not torch.equal(known, value)):
                lost[origin.source] = name
            dense.setdefault(origin.source, value) if value is not None else None
        dense = {name: value for name, value in dense.items() if name not in lost}
        if lost and strict:
            raise _irreversible(lost)
        return dense | {alias: dense[name] for alias, name in self.source.aliases.items() if name in dense}

    # reading

    @property
    def stages(self) -> dict[str, fx.GraphModule]:
        """Pass or stage name → a runnable GraphModule, tokens → logits (from `collect_terms` on: with
        terms)."""
        return dict(self._snapshots)

    def text(self, stage: str | None = None) -> str:
        """The program as Python that runs: now, or after a pass or at a stage (unknown: `PassError`)."""
        if stage is None:
            return program_text(self.graph, *self._title())
        if stage in self._snapshots:
            return program_text(self._snapshots[stage], f"{self.source.name} · {stage}")
        if stage in self.texts:
            return self.texts[stage]
        names = list(dict.fromkeys([*self._snapshots, *self.texts]))
        known = ", ".join(names) or "this program remembers none"
        raise PassError(f"stage {stage!r}", "no stage of that name", known, nearest(stage, names))

    def diff(self, before: str, after: str | None = None) -> str:
        """What changed between two stages (`after`: the program as it is now), repeated changes folded.

        `teacher` is the program that a student was made from: its layers are paired by where they come from.
        """
        if before == "teacher" and after is None:
            return student_diff(self.text(before), self.text(), self.origins, self.stage)
        return diff_text(self.text(before), self.text(after), before, after or self.stage)

    def _title(self) -> list[str]:
        """What stands above the text: the model, the stage, the size, the expert layers."""
        total, active = self.num_parameters(), self.num_parameters(active=True)
        size = f"{total:,} parameters" + (f", {active:,} active" if active != total else "")
        unmarked = "tokens: dim 0 over data; weights and other dims without a mark: whole on every rank"
        mesh = [] if self.layout is None else [str(self.layout.mesh), unmarked]
        return [f"{self.source.name} · {self.stage} · {size}", *self.expert_layers(), *mesh]

    def expert_layers(self) -> list[str]:
        """`10 × 32 experts, 1 active` for the expert layers of each size."""
        layers = [region_of(module) for module in regions(self.graph, "moe").values()]
        sizes = Counter((r.settings["experts"], r.settings["idle_experts"]) for r in layers if r is not None)
        return [f"{count} × {n} experts, {n - idle} active" for (n, idle), count in sizes.items()]

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"<Program {self.source.name} · {self.stage} · {self.num_parameters():,} parameters>"


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _to_structural_names(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Rename the user's names of a state dict back to structural ones, in place (a load_state_dict hook)."""
    assert isinstance(module, Program)
    for name in list(nn.Module.state_dict(module)):
        public = prefix + module._public(name)
        if public in state:
            state[prefix + name] = state[public]
    structural = {prefix + name for name in nn.Module.state_dict(module)}
    for name in list(nn.Module.state_dict(module)):
        public = prefix + module._public(name)
        if public not in structural:
            state.pop(public, None)
    for name in {*module.source.aliases, *module.source.unused}:
        if prefix + name not in structural:
            state.pop(
                prefix + name, None
            )  # tied names and what the forward never reads: nothing to load into


def _irreversible(lost: dict[str, str]) -> VerifyError:
    shown = ", ".join(f"{source} (now {name})" for source, name in list(lost.items())[:4])
    more = f" and {len(lost) - 4} more" if len(lost) > 4 else ""
    return VerifyError(
        "to_dense_state_dict",
        f"no dense value for {shown}{more}",
        "rewrites that can be undone: untouched or split weights, or expert copies that are still equal",
        "to_dense_state_dict(strict=False) leaves them out",
    )
