"""Which tokenizer a command reads text with: the one that is asked for, and that its program knows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moec.commands.programs import in_words_of_the_door
from moec.errors import DataError
from moec.ir.program import Tokenizer
from moec.local_program import LocalProgram
from moec.models import is_saved_program
from moec.program import Program
from moec.runtime.manifest import read_manifest
from moec.runtime.vocabulary import Vocabulary, open_vocabulary

BYTES = "bytes"


def known_tokenizer(name: str, *, trust: bool = False) -> Tokenizer | None:
    """The tokenizer of the text that the saved program `name` was trained on; reads its manifest alone.

    None for a model, and for a program of which nothing is known.
    """
    if not is_saved_program(name):
        return None
    with in_words_of_the_door():
        known = read_manifest(Path(name), trust=trust).source.tokenizer
    return None if known is None else Tokenizer(known.name, known.digest)


def open_tokenizer(asked: str | None, known: Tokenizer | None, whose: str = "the program") -> Vocabulary:
    """The vocabulary `asked` for; left out, the `known` one of a program, or bytes.

    Raises `DataError` when it is not there, or is another than the one known: its tokens would mean other
    words.
    """
    if asked is None and known is not None and known.name != BYTES and not Path(known.name).is_file():
        found = f"none, and {known.name}, with which {whose} was trained, is not there"
        raise DataError("--tokenizer", found, "that tokenizer", "--tokenizer FILE")
    words = open_vocabulary(asked or (known.name if known else BYTES))
    if known is not None and words.digest != known.digest:
        found = f"'{words.name}' ({words.digest[:12]})"
        needed = f"'{known.name}' ({known.digest[:12]}), with which {whose} was trained"
        raise DataError("--tokenizer", found, needed, f"--tokenizer {known.name}")
    return words


def record_tokenizer(program: Program, words: Vocabulary) -> None:
    """Note in `program` that it was trained on text in these words."""
    program.source = replace(program.source, tokenizer=Tokenizer(words.name, words.digest))
    if isinstance(program, LocalProgram):
        record_tokenizer(program.whole, words)  # what is saved of a part tells of the whole
