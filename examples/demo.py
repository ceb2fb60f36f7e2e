"""The main job from end to end: an ordinary GPT becomes a PR-MoE, learns to write Python, and is saved.

`make demo` runs it, on the text of Python's own standard library. Everything on the screen is computed on the
spot; how it is laid out is `demo_screen.py`'s affair.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

import moec
from examples import demo_screen as screen
from examples import gpt
from moec.plan import Plan, Train
from moec.runtime.data import TextData, load_text
from moec.runtime.evaluate import evaluate
from moec.runtime.train import Trainer

PLAN = Path(__file__).with_name("pr_moe.toml")
PROMPT = 'import os\nimport sys\n\n\ndef main(argv):\n    """'
TEMPERATURE = 0.8

Steps = Annotated[int | None, typer.Option(min=1, help="Optimizer steps. Left out: as the plan says.")]
Seconds = Annotated[float | None, typer.Option(min=1.0, help="As many steps as fit into this time.")]
Out = Annotated[Path, typer.Option(help="Each run makes a new folder in this one.")]
Prompt = Annotated[str, typer.Option(help="What the sampled text begins with.")]
Length = Annotated[int, typer.Option(min=1, help="Bytes to sample.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of torch: for a model this small, one will do.")]


def demo(
    steps: Steps = None,
    seconds: Seconds = None,
    out: Out = Path("runs/demo"),
    prompt: Prompt = PROMPT,
    length: Length = 500,
    threads: Threads = 1,  # on a busy machine two took twice as long as one: they wait for each other
) -> None:
    """Compile a GPT into a PR-MoE, train it on Python's standard library, sample from it, save it."""
    console, began = screen.open_console(), time.perf_counter()
    torch.set_num_threads(threads)
    plan = Plan.from_toml(PLAN)
    program = compile_model(console, plan)
    data = load_text(sequence=plan.train.sequence)
    settings = choose_steps(program, plan.train, data, steps, seconds)
    folder = new_folder(out)
    train(console, program, settings, data, folder)
    write_text(console, program, settings, prompt, length)
    saved = save_and_load(console, program, data, folder / "program")
    screen.title(console, "Next", "every command says more with --help")
    screen.next_commands(console, next_commands(saved, folder))
    console.print(f"\nAll of this took {time.perf_counter() - began:.0f} seconds.", highlight=False)


def compile_model(console: Console, plan: Plan) -> moec.Program:
    """The GPT as a PR-MoE, and on the screen: the program before and after, and the records of the way."""
    torch.manual_seed(0)
    model = gpt.small()
    screen.title(console, "An ordinary GPT is compiled", f"examples/gpt.py, by the plan examples/{PLAN.name}")
    began = time.perf_counter()
    program = moec.compile(model, plan=plan)
    screen.sizes(console, program, sum(p.numel() for p in model.parameters()), time.perf_counter() - began)
    screen.title(console, "Before", "program.text('structured'): every part was found by following the data")
    screen.code(console, program.text("structured"))
    screen.title(console, "After", "print(program): the chosen feed-forwards have an expert axis")
    screen.code(console, program.text())
    screen.title(console, "What changed", "program.diff('structured', 'sparse')")
    screen.code(console, program.diff("structured", "sparse"), language="diff")
    screen.title(console, "What became of every matrix product", "program.ledger")
    screen.ledger(console, program.ledger)
    screen.title(console, "What was proved of every rewrite", "program.certificates")
    screen.certificates(console, program, plan)
    return program


def choose_steps(
    program: moec.Program, settings: Train, data: TextData, steps: int | None, seconds: float | None
) -> Train:
    """`settings` with another number of steps: the one given, or as many as fit into `seconds`."""
    if seconds is not None:
        steps = max(1, int(seconds / _seconds_per_step(program, settings, data)))
    if steps is None:
        return settings
    warmup = min(settings.warmup, steps // 10)
    return Train(**{**settings.model_dump(), "steps": steps, "warmup": warmup})


def _seconds_per_step(program: moec.Program, settings: Train, data: TextData) -> float:
    """The time of one forward and backward; it leaves weights and gradients as they were."""
    tokens, targets = data.train_batch(settings.seed, 0, settings.batch)
    took = []
    for _ in range(3):
        began = time.perf_counter()
        torch.autograd.grad(program.loss(tokens, targets), list(program.parameters()))
        took.append(time.perf_counter() - began)
    return min(took)


def new_folder(out: Path) -> Path:
    """The first of `out/1`, `out/2`, … that is not there yet."""
    number = 1
    while (out / str(number)).exists():
        number += 1
    return out / str(number)


def train(console: Console, program: moec.Program, settings: Train, data: TextData, folder: Path) -> None:
    """Train, with the progress on the screen; then what the experts do, on text held out from training."""
    tokens = settings.steps * settings.batch * settings.sequence
    size = f"{len(data.tokens_N) / 1e6:.1f} MB of Python's standard library ({len(data.spans)} files)"
    screen.title(console, "Training", f"{settings.steps} steps, {tokens:,} bytes of {size}")
    before = evaluate(program, data, settings, batches=settings.eval_batches)
    result = Trainer(program, settings, data, folder, console=console).run()
    after = result.final
    if after is None or result.interrupted:  # Ctrl-C ends the training, not the demo
        after = evaluate(program, data, settings, batches=settings.eval_batches)
    screen.learned(console, before, after, result.tokens_per_second)
    screen.title(console, "Which experts the held-out text went to", "rows of each expert, of each layer")
    screen.load(console, after.counts)


def write_text(console: Console, program: moec.Program, settings: Train, prompt: str, length: int) -> None:
    """Sample from the program, byte by byte."""
    screen.title(console, "A sample", f"{length} bytes after the prompt, at temperature {TEMPERATURE}")
    tokens = list(prompt.encode())[-settings.sequence :]
    # The model sees one sequence: when that is full, the second half of it is where the text goes on from.
    keep = settings.sequence // 2
    (text,) = program.generate([tokens], length, temperature=TEMPERATURE, keep=keep)
    new = bytes(text[len(tokens) :].tolist())
    screen.sample(console, prompt, prompt + new.decode("utf-8", errors="replace"))


def save_and_load(console: Console, program: moec.Program, data: TextData, folder: Path) -> Path:
    """Save, load, and hold the loaded program to giving the same logits, bit for bit."""
    saved = program.eval().save(folder)
    loaded = moec.load(saved)
    tokens, _ = next(data.held_out_batches(4))
    with torch.no_grad():
        same = torch.equal(program(tokens), loaded(tokens))
    if not same:
        raise RuntimeError(f"the program loaded from {saved} gives other logits than the one that was saved")
    screen.title(console, "Saved", f"{saved}: text and safetensors, and nothing in it is run by loading it")
    screen.files(console, saved)
    console.print("loaded again: the same logits, bit for bit")
    return saved


def next_commands(saved: Path, folder: Path) -> dict[str, str]:
    """Commands that work as they stand here, and what each is for."""
    beside = Path(sys.executable).with_name("moec")
    moec_ = _as_typed(beside) if beside.exists() else "python -m moec"
    longer = f"--steps 10000 --out {folder}-longer"
    return {
        f"{moec_} show {saved}": "read the program again",
        f"{moec_} diff {saved} captured canonical": "what one spelling for everything means",
        f"{moec_} explain {saved} moe_1": "what became of a layer, and where it was written",
        f'{moec_} generate {saved} --prompt "class " --temperature 0.8': "let it write",
        f"{moec_} train examples/gpt.py:small --plan examples/{PLAN.name} {longer}": "let it learn more",
        f"{moec_} plans pr_moe": "a plan of the paper's size",
    }


def _as_typed(path: Path) -> str:
    """A path as one would type it: short where it is below the current folder."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def main() -> None:
    """Run `demo` from the command line."""
    typer.run(demo)


if __name__ == "__main__":
    main()
