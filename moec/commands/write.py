"""`moec generate`: a program goes on from a prompt, and the text is shown as it comes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from moec.commands.programs import program_of
from moec.commands.tokenizer import known_tokenizer, open_tokenizer
from moec.errors import DataError
from moec.program import Program
from moec.runtime.generation.generate import Generation
from moec.runtime.generation.request import Options
from moec.runtime.generation.text_stream import TextStream
from moec.runtime.vocabulary import Vocabulary

USUAL = 200  # new tokens, where the command line does not say and the program has room


@dataclass(frozen=True)
class Writing:
    """What `moec generate` is asked for. `prompt` "-": standard input. `new` None: `USUAL`, or as many as
    there is room for. `nproc`: ranks to be started here."""

    model: str
    plan: str | None
    prompt: str
    new: int | None
    stop: Sequence[str]
    tokenizer: str | None
    trust: bool
    options: Options
    nproc: int | None = None


@dataclass(frozen=True)
class Opening:
    """The prompt: as it was given, and as tokens of the vocabulary `words`."""

    text: bytes
    words: Vocabulary
    tokens: list[int]


def write(asked: Writing) -> None:
    """Print the prompt and the text behind it, piece by piece; it ends with a line break."""
    opening = opening_of(asked, given_prompt(asked))
    program = program_of(asked.model, asked.plan, trust=asked.trust)
    show_text(begin(program, opening, asked), opening, asked.stop)


def given_prompt(asked: Writing) -> bytes:
    """The prompt that was typed, or what standard input says."""
    return sys.stdin.buffer.read() if asked.prompt == "-" else asked.prompt.encode()


def opening_of(asked: Writing, prompt: bytes) -> Opening:
    """Read the prompt, and refuse what needs no program to be refused."""
    if "" in asked.stop:
        raise DataError("--stop", "an empty text", "at least one character")
    words = open_tokenizer(asked.tokenizer, known_tokenizer(asked.model, trust=asked.trust))
    tokens = [int(token) for token in words.encode(prompt, "--prompt")]
    if not tokens:
        raise DataError("--prompt", "an empty prompt", "at least one character")
    return Opening(prompt, words, tokens)


def show_text(generation: Generation, opening: Opening, stops: Sequence[str]) -> None:
    """Print `opening` and the text of a generation up to the first of `stops`, as it comes."""
    words, last = opening.words, ""
    text = until(pieces(generation, words.stream(opening.tokens), words.separator), stops)
    for piece in chain([opening.text.decode("utf-8", "replace")], text):
        last = _show(piece) or last
    if not last.endswith("\n"):
        print()
    generation.close()


def begin(program: Program, opening: Opening, asked: Writing) -> Generation:
    """The generation that is asked for; nothing is written yet."""
    words, tokens = opening.words, opening.tokens
    require_known(program, words, tokens)
    end = words.separator
    known = end is not None and end < program.source.vocabulary
    try:
        new = _room(program, tokens, asked.options) if asked.new is None else asked.new
        options: Options = {**asked.options, "stop": end if known else None}
        return program.stream([tokens], new, **options)
    except DataError as error:
        raise _in_words_of_the_door(error) from error


def _room(program: Program, tokens: list[int], options: Options) -> int:
    limit = program.source.max_positions
    endless = limit is None or options.get("keep") is not None
    return USUAL if endless or limit is None else max(1, min(USUAL, limit - len(tokens)))


def _in_words_of_the_door(error: DataError) -> DataError:
    """The same error, options spelled as they are typed."""
    found, needed, better = error.found, error.needed, error.nearest
    for name in ("max_new_tokens", "repetition_penalty", "temperature", "top_k", "top_p"):
        option = "--" + name.replace("_", "-")
        found, needed, better = (text.replace(name, option) for text in (found, needed, better))
    return DataError(f"moec {error.where}", found, needed, better)


def pieces(generation: Generation, stream: TextStream, separator: int | None) -> Iterator[str]:
    """The text of a generation of one row, as it comes."""
    for event in generation:
        if event.token != separator:
            yield stream.push(event.token)
    yield stream.rest()


def until(texts: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
    """The pieces up to the end of the first of `stops` that stands in them, wherever pieces are cut."""
    most = max(map(len, stops), default=1)
    tail = ""  # what came just before, where a stop may have begun
    for text in texts:
        seen = tail + text
        ends = [seen.index(stop) + len(stop) for stop in stops if stop in seen]
        if ends:
            yield text[: min(ends) - len(tail)]
            return
        yield text
        tail = seen[len(seen) - most + 1 :] if most > 1 else ""


def require_known(program: Program, words: Vocabulary, tokens: Sequence[int]) -> None:
    """Tokens of the prompt that the model has no embedding for are an error of the tokenizer, told here."""
    size = program.source.vocabulary
    if max(tokens) >= size:
        found = f"token {max(tokens)} of '{words.name}', and a model of {size} tokens"
        raise DataError("--prompt", found, "the --tokenizer that the model was trained with")


def _show(piece: str) -> str:
    """Print a piece at once. What would steer a terminal is shown as �, a pipe gets the text as it is."""
    if sys.stdout.isatty():
        piece = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in piece)
    sys.stdout.write(piece)
    sys.stdout.flush()
    return piece
