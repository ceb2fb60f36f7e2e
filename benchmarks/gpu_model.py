"""The paper's 350M+PR-MoE-32/64 on a GPU, end to end: a training step, and decoding, as `moec.compile` makes
it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import moec
from benchmarks.gpu_clock import Run, attempt
from benchmarks.gpu_decode import replayed
from examples.gpt import GPT, GPTConfig
from moec.plan import Plan

PAPER = GPTConfig(vocab=50257, seq=2048, layers=24, width=1024, heads=16, dropout=0.0)
TINY = GPTConfig(vocab=97, seq=8, layers=2, width=16, heads=2, dropout=0.0)


def plan_of(run: Run) -> dict[str, Any]:
    """The shipped plan, dropless, as inference is in the paper."""
    sections = Plan.resolve("pr_moe").model_dump(exclude_unset=True)
    sections["moe"] |= {"capacity_factor": "dropless", "random_token_selection": False}
    if run.dry:
        sections["moe"] |= {"experts": 3}
        for override in sections["moe"]["override"]:
            override["experts"] = 5
    return sections


def compiled(run: Run, device: torch.device) -> moec.Program:
    """The program, compiled on `device` in the run's dtype."""
    model = GPT(TINY if run.dry else PAPER).to(device, run.dtype)
    return moec.compile(model, plan=plan_of(run), verify="off").to(run.device)


def compiled_somewhere(run: Run, record: dict[str, Any]) -> moec.Program:
    """Compiled where it will run, which is faster; on the CPU where that fails, and `record` has the
    reason."""
    attempt("compiled_on_device", lambda: compiled(run, run.device), record)
    made = record.pop("compiled_on_device")
    if isinstance(made, moec.Program):
        return made
    record["not_compiled_on_device"] = made["failed"]
    return compiled(run, torch.device("cpu"))


def train(program: moec.Program, config: GPTConfig, run: Run) -> dict[str, float]:
    """Milliseconds of a step (forward, backward, fused AdamW) of the fused program and of the plain one."""
    rows = 2 if run.dry else 4
    tokens = torch.randint(0, config.vocab, (rows, config.seq), device=run.device)
    record = {"tokens": float(tokens.numel())}
    for name, one in (("fused", program.fused()), ("plain", program)):
        run.demand(0.0 if run.dry else 30.0, f"training step, {name}")
        step = training_step(one.train(), tokens)
        seconds = run.seconds(step, 6.0)
        record[f"{name}_ms"] = seconds * 1e3
        record[f"{name}_tokens_per_s"] = tokens.numel() / seconds
        _, record[f"{name}_peak_gb"] = run.memory(step)
    return record


def training_step(program: moec.Program, tokens: Tensor) -> Callable[[], None]:
    """One step, from gradients set to None."""
    optimizer = torch.optim.AdamW(program.parameters(), lr=1e-4, fused=tokens.is_cuda)

    def step() -> None:
        optimizer.zero_grad()
        program.loss(tokens).backward()
        optimizer.step()

    return step


@torch.no_grad()
def generate(program: moec.Program, config: GPTConfig, run: Run, gb_per_s: float) -> dict[str, Any]:
    """Milliseconds a token for 1 and 64 rows at half the positions, in a CUDA graph and without one."""
    decoder, length = program.eval().fused().decoder(config.seq), config.seq
    record: dict[str, Any] = {}
    for rows in (1, 2 if run.dry else 64):
        run.demand(0.0 if run.dry else 10.0, f"decoding of {rows} rows")
        cache = decoder.new_cache(rows, length)
        tokens = torch.randint(0, config.vocab, (rows, 1), device=run.device)
        past, wanted = torch.full((rows,), length // 2, device=run.device), torch.zeros_like(tokens)

        step = partial(decoder.step, tokens, past, wanted, cache, length)
        graph = run.seconds(replayed(step, run), 2.0)
        eager = graph if run.dry else run.seconds(step, 2.0)
        found = {"ms_a_token": graph * 1e3, "ms_without_graph": eager * 1e3, "tokens_per_s": rows / graph}
        if rows == 1:  # several rows read other experts too
            found["of_bandwidth"] = active_bytes(program) / graph / 1e9 / gb_per_s
        record[f"B{rows}"] = found
    return record


def active_bytes(program: moec.Program) -> float:
    """Bytes of the parameters that one token uses."""
    size = next(program.parameters()).element_size()
    return float(program.num_parameters(active=True)) * size


def model(run: Run) -> dict[str, Any]:
    """Compile, train and decode."""
    run.demand(0.0 if run.dry else 90.0, "the whole model")
    record: dict[str, Any] = {}
    started = run.left()
    program, config = compiled_somewhere(run, record), TINY if run.dry else PAPER
    record |= {"parameters": program.num_parameters(), "compile_seconds": started - run.left()}
    attempt("decode", lambda: generate(program, config, run, run.bandwidth()["read"]), record)
    attempt("train", lambda: train(program, config, run), record)
    return record
