"""The cache: what is built is whole, is built once, and is the stream of tokens itself."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import chex
import numpy as np
import pytest

from ultramem_jax import DataConfig, UserError
from ultramem_jax.data import builder
from ultramem_jax.data.builder import RECORD_TOKENS, cache_root, open_records, prepare
from ultramem_jax.data.sources import SPLITS, open_source


@pytest.fixture
def config(tmp_path) -> DataConfig:
    """Random bytes, but no zeros: a training split of two and a half records."""
    data = np.random.default_rng(0).integers(1, 256, int(2.5 * RECORD_TOKENS / 0.9), np.uint8)
    (tmp_path / "corpus.bin").write_bytes(data.tobytes())
    return DataConfig(dataset="text", path=str(tmp_path / "corpus.bin"), cache_dir=str(tmp_path / "cache"))


def folder_config(tmp_path, **fields) -> DataConfig:
    for i in range(60):
        (tmp_path / f"text/{i}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / f"text/{i}.txt").write_bytes(f"file {i} says hello, hello\n".encode() * (i % 7 + 1))
    return DataConfig(
        dataset="text", path=str(tmp_path / "text"), cache_dir=str(tmp_path / "cache"), **fields
    )


def stored_stream(folder, split) -> np.ndarray:
    """Returns the records of a split, end to end, without the padding of the last."""
    built = open_records(folder)
    records = built.as_data_source(split="+".join(built.info.metadata["parts"][split]))
    tokens = np.concatenate([record["tokens"] for record in records])
    size = built.info.metadata["num_tokens"][split]
    assert len(tokens) - RECORD_TOKENS < size <= len(tokens)
    return tokens[:size]


def expected_stream(config, tokenizer, split) -> np.ndarray:
    pieces = [
        np.append(tokenizer.encode(d.data), tokenizer.eos_id) for d in open_source(config).documents(split)
    ]
    return np.concatenate(pieces)


@pytest.mark.parametrize("fields", [{}, {"tokenizer": "bpe", "bpe_vocab_size": 270}])
def test_records_are_the_documents_each_followed_by_one_eos(tmp_path, fields):
    config = folder_config(tmp_path, **fields)
    folder = prepare(config)
    metadata = open_records(folder).info.metadata
    tokenizer = builder.load_tokenizer(config, folder)
    assert metadata["vocab_size"] == tokenizer.vocab_size
    source = open_source(config)
    for split in SPLITS:
        found = stored_stream(folder, split)
        chex.assert_trees_all_equal(found, expected_stream(config, tokenizer, split))
        documents = [d.data for d in source.documents(split)]
        assert tokenizer.decode(found) == b"".join(documents)
        assert metadata["num_documents"][split] == len(documents) == (found == tokenizer.eos_id).sum()
        assert metadata["num_bytes"][split] == sum(map(len, documents))
    assert metadata["corpus_hash"] == source.survey().key


def test_streams_longer_than_a_part_keep_their_order(config, monkeypatch):
    monkeypatch.setattr(builder, "_PART_BYTES", 2 * RECORD_TOKENS)  # one record of uint16
    folder = prepare(config)
    built = open_records(folder)
    assert built.info.metadata["parts"]["train"] == ["train_00000", "train_00001", "train_00002"]
    tokenizer = builder.load_tokenizer(config, folder)
    chex.assert_trees_all_equal(stored_stream(folder, "train"), expected_stream(config, tokenizer, "train"))


def test_ids_beyond_16_bits(config, monkeypatch):
    class WideTokenizer(builder.ByteTokenizer):
        vocab_size = 70_001
        eos_id = 70_000

        def encode(self, data):
            return super().encode(data) + 69_000

    monkeypatch.setattr(builder, "ByteTokenizer", WideTokenizer)
    folder = prepare(config)
    chex.assert_trees_all_equal(
        stored_stream(folder, "train"), expected_stream(config, WideTokenizer(), "train")
    )


def test_built_once_for_every_seq_len_and_anew_for_other_contents(config, monkeypatch, tmp_path, capfd):
    folder = prepare(config)
    assert "tokenizing text" in capfd.readouterr().err
    with monkeypatch.context() as context:
        context.setattr(builder, "_build", lambda *_: pytest.fail("built again"))
        assert prepare(config) == folder
        fields = {"dataset": "text", "path": config.path, "cache_dir": config.cache_dir}
        assert prepare(DataConfig(**fields, seq_len=17, bpe_vocab_size=999)) == folder
    assert not any(capfd.readouterr())
    first = open_records(folder).info.metadata["corpus_hash"]
    Path(config.path).write_bytes(b"something else, and enough of it")
    other = prepare(config)
    assert other != folder and open_records(other).info.metadata["corpus_hash"] != first
    bpe = prepare(DataConfig(**fields, tokenizer="bpe", bpe_vocab_size=300))
    assert bpe not in (folder, other)
    assert prepare(DataConfig(**fields, tokenizer="bpe", bpe_vocab_size=301)) != bpe


def test_only_what_is_needed_stays(config):
    folder = prepare(config)
    assert [p.name for p in folder.iterdir()] == ["packed_tokens"]
    assert {p.suffix for p in folder.parent.iterdir()} == {"", ".lock"}


KILLED = """
import os, signal, sys
from ultramem_jax import DataConfig
from ultramem_jax.data import builder

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

WHERE = sys.argv[3]
if WHERE == "while tokenizing":
    count, encode = 0, builder.ByteTokenizer.encode
    def dies_at_the_second(self, data):
        global count
        count += 1
        return encode(self, data) if count < 2 else die()
    builder.ByteTokenizer.encode = dies_at_the_second
elif WHERE == "while packing":
    generate = builder.PackedTokens._generate_examples
    builder.PackedTokens._generate_examples = lambda self, split, k: (
        generate(self, split, k) if split == "train" else die()
    )
else:
    builder.os.rename = die
builder.prepare(DataConfig(dataset="text", path=sys.argv[1], cache_dir=sys.argv[2]))
"""


@pytest.mark.parametrize("where", ["while tokenizing", "while packing", "before the rename"])
def test_a_killed_build_is_not_taken_for_whole(config, where):
    command = [sys.executable, "-c", KILLED, config.path, config.cache_dir, where]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert [p.suffix for p in Path(config.cache_dir).iterdir() if p.is_dir()] == [".incomplete"]
    folder = prepare(config)
    tokenizer = builder.load_tokenizer(config, folder)
    for split in SPLITS:
        chex.assert_trees_all_equal(stored_stream(folder, split), expected_stream(config, tokenizer, split))
    assert {p.suffix for p in folder.parent.iterdir()} == {"", ".lock"}


def test_a_failed_build_leaves_nothing(config, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(builder, "_build", full)
    with pytest.raises(UserError, match=r"data\.cache_dir = '.*': must be a folder .*: No space left"):
        prepare(config)
    assert [p.suffix for p in Path(config.cache_dir).iterdir()] == [".lock"]


def test_cache_dir_that_is_a_file(config, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"data\.cache_dir = '.*file': must be a folder that can be written"):
        prepare(DataConfig(dataset="text", path=config.path, cache_dir=str(tmp_path / "file")))


def test_bpe_without_a_training_split(tmp_path):
    (tmp_path / "x").write_bytes(b"a")  # 0 of 1 byte is the first 90 %
    with pytest.raises(UserError, match=r"data\.tokenizer = 'bpe': must be 'bytes'"):
        prepare(
            DataConfig(
                dataset="text", path=str(tmp_path / "x"), cache_dir=str(tmp_path / "c"), tokenizer="bpe"
            )
        )


def test_cache_root(monkeypatch):
    monkeypatch.setenv("ULTRAMEM_CACHE", "/somewhere")
    assert cache_root(DataConfig()) == Path("/somewhere")
    assert cache_root(DataConfig(cache_dir="/here")) == Path("/here")
    monkeypatch.delenv("ULTRAMEM_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_root(DataConfig()) == Path("/home/someone/.cache/ultramem_jax")
    assert cache_root(DataConfig(cache_dir="~/c")) == Path(os.environ["HOME"]) / "c"
