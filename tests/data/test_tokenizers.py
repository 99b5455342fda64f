"""Tokenizers lose no byte, whatever the document holds."""

import chex
import numpy as np
import pytest

from ultramem_jax.data import tokenizers
from ultramem_jax.data.tokenizers import EOS_TOKEN, BpeTokenizer, ByteTokenizer

EVERY_BYTE = bytes(range(256))
PROSE = b"the cat sat on the mat, the cat sat on the hat. " * 40
AWKWARD = [
    b"",
    b" ",
    b"\n\n  \t",
    EVERY_BYTE,
    EVERY_BYTE[::-1] * 3,
    "naïve Ωmega 漢字 🙂\r\n".encode(),
    "漢字".encode()[:-1] + b"x",  # a character cut in half
    b"\xed\xa0\x80",  # a surrogate, which UTF-8 forbids
    f"a{EOS_TOKEN}b".encode(),  # the written form of the special token is text like any other
]


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    return BpeTokenizer.train([PROSE, *AWKWARD], vocab_size=300)


def test_byte_ids_are_the_bytes():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(b"A\x00\xff")
    assert ids.tolist() == [65, 0, 255]
    chex.assert_type(ids, np.int32)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.decode([256, 65, 256, 255]) == b"A\xff"


@pytest.mark.parametrize("data", AWKWARD)
def test_round_trip(bpe, data):
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(data)
        chex.assert_type(ids, np.int32)
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode(ids) == data
        assert tokenizer.decode([*ids, tokenizer.eos_id]) == data


def test_bpe_merges_what_is_frequent(bpe):
    # 300 ids = 256 bytes + end of document + 43 merges, enough for the words of PROSE.
    assert bpe.vocab_size == 300 and 0 <= bpe.eos_id < 300
    assert len(bpe.encode(b" the cat")) == 2
    assert len(bpe.encode(PROSE)) < len(PROSE) / 3


def test_bpe_vocabulary_is_smaller_where_there_is_nothing_to_merge():
    # "abab": a+b, then ab+ab.
    assert BpeTokenizer.train([b"abab"], vocab_size=5000).vocab_size == 257 + 2


def test_bpe_survives_its_file(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    loaded = BpeTokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.vocab_size, loaded.eos_id) == (bpe.vocab_size, bpe.eos_id)
    for data in [PROSE, *AWKWARD]:
        chex.assert_trees_all_equal(loaded.encode(data), bpe.encode(data))


def test_bpe_training_is_deterministic(bpe):
    again = BpeTokenizer.train([PROSE, *AWKWARD], vocab_size=300)
    chex.assert_trees_all_equal(again.encode(PROSE), bpe.encode(PROSE))


@pytest.mark.parametrize("piece_bytes", [1, 2, 5, 64])
def test_cutting_long_documents_loses_nothing(bpe, monkeypatch, piece_bytes):
    monkeypatch.setattr(tokenizers, "_PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(tokenizers, "_PIECES_PER_CALL", 3)
    for data in [PROSE, *AWKWARD]:
        assert bpe.decode(bpe.encode(data)) == data


def test_pieces_end_after_lines_or_between_characters(monkeypatch):
    monkeypatch.setattr(tokenizers, "_PIECE_BYTES", 4)
    assert list(tokenizers._pieces(b"a\nbc\ndefghi")) == [b"a\n", b"bc\n", b"defg", b"hi"]
    # "é" is two bytes: it would straddle the cut after four.
    assert list(tokenizers._pieces("abcéd".encode())) == [b"abc", "éd".encode()]


@pytest.mark.parametrize("ids", [[-1], [3, 300]])
def test_ids_outside_the_vocabulary_are_refused(bpe, ids):
    for tokenizer in (ByteTokenizer(), bpe):
        with pytest.raises(ValueError, match="ids must be in"):
            tokenizer.decode(ids)
