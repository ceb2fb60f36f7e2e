"""Text in, batches out: what is read, what is held out, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import DataError
from moec.runtime.corpus import find_texts, standard_library
from moec.runtime.data import TextData, load_text
from moec.runtime.split import split_stream, window_starts

TOKENIZER_TEXT = "the sheep and the goats and the sheep again\n" * 60


def numbered(tmp_path: Path, length: int, sequence: int) -> TextData:
    """Text in which every byte tells its own position, modulo 251 (a prime, so windows look different)."""
    path = tmp_path / "numbers"
    path.write_bytes(bytes(1 + i % 251 for i in range(length)))
    return load_text(path, sequence=sequence)


def tokenizer_file(folder: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TOKENIZER_TEXT], trainer)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


# what is read


def test_the_default_corpus_is_the_standard_library() -> None:
    corpus = standard_library()
    names = {path.name for path in corpus.files}
    assert {"argparse.py", "typing.py"} <= names
    assert sum(path.stat().st_size for path in corpus.files) > 5_000_000
    assert corpus == find_texts() == standard_library()
    assert not any("site-packages" in path.parts for path in corpus.files)


def test_files_folders_and_globs_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.md", ".hidden/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "deep/picture").write_bytes(b"\x89PNG\0\0")
    corpus = find_texts(tmp_path)
    assert [path.name for path in corpus.files] == ["a.txt", "b.txt", "c.md"]
    assert [path.name for path in corpus.skipped] == ["picture"]
    assert [path.name for path in find_texts(f"{tmp_path}/**/*.md", tmp_path).files] == [
        "c.md", "a.txt", "b.txt",
    ]  # fmt: skip


def test_files_are_joined_by_the_separator_and_remembered(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("first text")
    (tmp_path / "b").write_text("second text")
    data = load_text(tmp_path, sequence=4)
    assert bytes(data.tokens_N) == b"first text\0second text"
    assert [data.file_of(index).name for index in (0, 9, 10, 11, 21)] == ["a", "a", "a", "b", "b"]


def test_a_tokenizer_json(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text(TOKENIZER_TEXT)
    (tmp_path / "texts/b.txt").write_text("goats")
    data = load_text(tmp_path / "texts", sequence=6, vocabulary=tokenizer_file(tmp_path))
    assert data.vocabulary.size <= 300
    assert data.vocabulary.separator == 0
    assert len(data.tokens_N) < len(TOKENIZER_TEXT) / 2
    text = data.vocabulary.decode(data.tokens_N.tolist())
    assert text == (TOKENIZER_TEXT + "goats").encode()


# what is held out


@given(
    num_tokens=st.integers(2, 400_000),
    sequence=st.integers(1, 700),
    fraction=st.floats(0.001, 0.999),
)
def test_the_split_covers_the_stream_and_no_window_crosses_it(
    num_tokens: int, sequence: int, fraction: float
) -> None:
    if num_tokens < 2 * (sequence + 1):
        with pytest.raises(DataError, match="one sequence of"):
            split_stream(num_tokens, sequence, fraction)
        return
    split = split_stream(num_tokens, sequence, fraction)
    side = np.zeros(num_tokens, dtype=int)
    for number, stretches in ((1, split.train), (2, split.held_out)):
        for start, stop in stretches:
            assert start + sequence + 1 <= stop <= num_tokens
            assert not side[start:stop].any()
            side[start:stop] = number
        for first in window_starts(stretches, sequence):
            assert (side[first : first + sequence + 1] == number).all()
    assert (side == 0).sum() < sequence + 1  # at most a tail too short for a window is unused


def test_the_held_out_share_is_about_the_fraction() -> None:
    split = split_stream(1_000_000, 256, 0.05)
    share = sum(stop - start for start, stop in split.held_out) / 1_000_000
    assert 0.045 < share < 0.055
    assert len(split.held_out) > 10  # from all over the text


def test_held_out_batches_visit_each_window_once(tmp_path: Path) -> None:
    data = numbered(tmp_path, 3000, 8)
    tokens = torch.cat([tokens for tokens, _ in data.held_out_batches(4)])
    assert len(tokens) == len(data.held_out_starts) == len(tokens.unique(dim=0))
    few = list(data.held_out_batches(2, limit=3))
    assert [side.shape for batch in few for side in batch] == [(2, 8)] * 6
    assert few[0][0][0].tolist() == tokens[0].tolist()
    assert few[-1][0][-1].tolist() == tokens[-1].tolist()


# batches


def test_targets_are_the_tokens_one_further(tmp_path: Path) -> None:
    tokens, targets = numbered(tmp_path, 3000, 8).train_batch(seed=3, position=5, size=4)
    assert tokens.dtype == targets.dtype == torch.int64
    assert tokens.shape == targets.shape == (4, 8)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert torch.equal(targets[:, -1], tokens[:, -1] % 251 + 1)


def test_a_sample_depends_on_seed_and_position_alone(tmp_path: Path) -> None:
    data, again = numbered(tmp_path, 3000, 8), numbered(tmp_path, 3000, 8)
    far = 3 * data.windows_per_epoch - 2
    whole, _ = data.train_batch(seed=1, position=far, size=5)
    ones = [again.train_batch(seed=1, position=far + i, size=1)[0] for i in (3, 0, 4, 1, 2)]
    assert torch.equal(whole[[3, 0, 4, 1, 2]], torch.cat(ones))
    assert not torch.equal(whole, data.train_batch(seed=2, position=far, size=5)[0])


def test_an_epoch_draws_each_window_once_and_never_held_out_text(tmp_path: Path) -> None:
    data = numbered(tmp_path, 3000, 8)
    count = data.windows_per_epoch
    starts = [data._train_start(0, index) for index in range(2 * count)]
    assert len(set(starts[:count])) == len(set(starts[count:])) == count
    assert starts[:count] != starts[count:]
    assert starts[:count] != sorted(starts[:count])
    for start in starts:
        assert any(first <= start and start + 9 <= last for first, last in data.split.train)


def test_the_fingerprint_knows_text_and_sequence(tmp_path: Path) -> None:
    first = numbered(tmp_path, 3000, 8).fingerprint
    assert first == numbered(tmp_path, 3000, 8).fingerprint
    assert first != numbered(tmp_path, 3000, 9).fingerprint
    assert first != numbered(tmp_path, 3001, 8).fingerprint


# what is refused


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "shakespeare.txt").write_text("to be")
    with pytest.raises(DataError, match="no such file or folder") as caught:
        load_text(tmp_path / "shakespear.txt", sequence=4)
    assert caught.value.where.endswith("shakespear.txt")
    assert "'shakespeare.txt'" in caught.value.nearest
    with pytest.raises(DataError, match="a glob that matches no file"):
        load_text(f"{tmp_path}/*.md", sequence=4)


def test_empty_binary_and_short_texts(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"")
    with pytest.raises(DataError, match="empty text"):
        load_text(path, sequence=4)
    path.write_bytes(b"0123456")
    with pytest.raises(DataError, match="7 tokens"):
        load_text(path, sequence=4)
    path.write_bytes(b"ab\0cd" * 9)
    with pytest.raises(DataError, match="binary"):
        load_text(path, sequence=4)
    with pytest.raises(DataError, match="none of them text"):
        load_text(tmp_path, sequence=4)


def test_tokens_outside_the_vocabulary_name_token_file_and_need(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("plain ascii text")
    (tmp_path / "b").write_bytes("naïve".encode())
    data = load_text(tmp_path, sequence=4)
    data.require_vocabulary(256)
    with pytest.raises(DataError, match="token 195, and a model with 128 token values") as caught:
        data.require_vocabulary(128)
    assert caught.value.where.endswith("/b")
    assert "at least 196" in caught.value.needed


def test_bad_tokenizers_and_undecodable_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 " * 20)
    with pytest.raises(DataError, match="byte 0xe9 at offset 3") as caught:
        load_text(tmp_path / "a.txt", sequence=4, vocabulary=tokenizer_file(tmp_path))
    assert caught.value.where.endswith("a.txt")
    with pytest.raises(DataError, match="no such file"):
        load_text(tmp_path / "a.txt", sequence=4, vocabulary=tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer"):
        load_text(tmp_path / "a.txt", sequence=4, vocabulary=tmp_path / "bad.json")
