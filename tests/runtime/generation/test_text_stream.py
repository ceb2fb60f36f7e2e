"""Text that comes token by token is the text of all tokens, and no part of it is taken back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from moec.runtime.vocabulary import ByteVocabulary, TokenizerVocabulary, Vocabulary

CORPUS = ["def wörld(): return '€' * 3 # hello hello wörld — 你好"] * 9


def byte_pairs() -> Tokenizer:
    """Byte-level, as GPT-2's: a character may take several tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def pieces() -> Tokenizer:
    """With ▁ for spaces and bytes as a last resort, as Llama's: the first word of a text loses its space."""
    words = ["▁", "▁hello", "h", "e", "l", "o", "▁w", "ö", "r", "d"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    table = {word: place for place, word in enumerate(["<unk>", "</s>", *bytes_, *words])}
    made = Tokenizer(models.BPE(table, [], unk_token="<unk>", byte_fallback=True))
    made.add_special_tokens(["</s>"])
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Vocabulary]:
    made: dict[str, Vocabulary] = {"bytes": ByteVocabulary()}
    for name, tokenizer in (("byte pairs", byte_pairs()), ("pieces", pieces())):
        path: Path = tmp_path_factory.mktemp("tokenizers") / f"{name}.json"
        tokenizer.save(str(path))
        made[name] = TokenizerVocabulary(path)
    return made


texts = st.text("de f(wörld€ —你好🙂\n", max_size=20)


@pytest.mark.parametrize("name", ["bytes", "byte pairs", "pieces"])
@given(text=texts, split=st.integers(0, 12))
def test_a_text_comes_whole(name: str, text: str, split: int, vocabularies: dict[str, Vocabulary]) -> None:
    words = vocabularies[name]
    tokens = [int(token) for token in words.encode(text.encode())]
    split = min(split, len(tokens))
    stream = words.stream(tokens[:split])
    told = [*map(stream.push, tokens[split:]), stream.rest()]
    whole, prompt = (words.decode(part).decode("utf-8", "replace") for part in (tokens, tokens[:split]))
    if not prompt.endswith("�"):  # a prompt is text, so it does not end within a character
        assert "".join(told) == whole.removeprefix(prompt)
        assert told[-1] == ""


def test_half_a_character_waits(vocabularies: dict[str, Vocabulary]) -> None:
    stream = vocabularies["bytes"].stream()
    assert [stream.push(byte) for byte in "€x".encode()] == ["", "", "€", "x"]
    assert (stream.push(0xE2), stream.rest()) == ("", "�")


def test_a_wrong_byte_is_shown_and_what_follows_too(vocabularies: dict[str, Vocabulary]) -> None:
    stream = vocabularies["bytes"].stream()
    assert "".join(map(stream.push, b"a\xffb\xe2c")) + stream.rest() == "a�b�c"


def test_special_tokens_have_no_text(vocabularies: dict[str, Vocabulary]) -> None:
    words = vocabularies["byte pairs"]
    tokens, end = [int(token) for token in words.encode(b"hello")], words.separator
    assert end is not None
    stream = words.stream()
    assert "".join(stream.push(token) for token in [*tokens, end, *tokens]) + stream.rest() == "hellohello"


@pytest.mark.parametrize("name", ["byte pairs", "pieces"])
def test_what_stays_incomplete_is_told_at_the_end(name: str, vocabularies: dict[str, Vocabulary]) -> None:
    words = vocabularies[name]
    tokens = [int(token) for token in words.encode("d🙂".encode())]
    stream = words.stream()
    told = "".join(map(stream.push, tokens[:-1]))
    assert told + stream.rest() == words.decode(tokens[:-1]).decode()
    assert "�" not in told
