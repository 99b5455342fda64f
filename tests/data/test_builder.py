"""The cache: what is built is whole, is built once, and is the stream of tokens itself."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import chex
import numpy as np
import pytest

from tests.data.trained_tokenizers import byte_level, sentencepiece
from ultramem_jax import DataConfig, UserError
from ultramem_jax.data import builder, load_corpus, open_tokenizer
from ultramem_jax.data.builder import cache_root, prepare
from ultramem_jax.data.pre_tokenizers import PRE_TOKENIZERS
from ultramem_jax.data.sources import SPLITS, open_source
from ultramem_jax.data.token_files import open_tokens, read_description, tokens_path


@pytest.fixture
def config(tmp_path) -> DataConfig:
    """Random bytes, but no zeros: a training split of 10,000."""
    data = np.random.default_rng(0).integers(1, 256, 11_112, np.uint8)
    (tmp_path / "corpus.bin").write_bytes(data.tobytes())
    return DataConfig(dataset="text", path=str(tmp_path / "corpus.bin"), cache_dir=str(tmp_path / "cache"))


def folder_config(tmp_path, **fields) -> DataConfig:
    for i in range(60):
        (tmp_path / f"text/{i}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / f"text/{i}.txt").write_bytes(f"file {i} says hello, hello\n".encode() * (i % 7 + 1))
    return DataConfig(
        dataset="text", path=str(tmp_path / "text"), cache_dir=str(tmp_path / "cache"), **fields
    )


def expected_stream(config, tokenizer, split) -> np.ndarray:
    pieces = [
        np.append(tokenizer.encode(d.data), tokenizer.eos_id) for d in open_source(config).documents(split)
    ]
    return np.concatenate(pieces)


@pytest.mark.parametrize("fields", [{}, {"tokenizer": "bpe", "bpe_vocab_size": 270}])
def test_tokens_are_the_documents_each_followed_by_one_eos(tmp_path, fields):
    config = folder_config(tmp_path, **fields)
    folder = prepare(config)
    description = read_description(folder)
    tokenizer = builder.load_tokenizer(config, folder)
    assert description["vocab_size"] == tokenizer.vocab_size
    source = open_source(config)
    for split in SPLITS:
        found = open_tokens(folder, split)
        chex.assert_trees_all_equal(found, expected_stream(config, tokenizer, split))
        documents = [d.data for d in source.documents(split)]
        assert tokenizer.decode(found) == b"".join(documents)
        assert description["num_documents"][split] == len(documents) == (found == tokenizer.eos_id).sum()
        assert description["num_bytes"][split] == sum(map(len, documents))
    assert description["corpus_hash"] == source.survey().key


def test_documents_begin_and_end_as_the_tokenizer_of_a_file_says(tmp_path):
    sentencepiece().save(str(tmp_path / "tokenizer.json"))
    config = folder_config(tmp_path, tokenizer=str(tmp_path / "tokenizer.json"))
    corpus = load_corpus(config)
    tokenizer = open_tokenizer(tmp_path)
    assert corpus.tokenizer.fingerprint == tokenizer.fingerprint
    assert tokenizer.start_ids == (1,) and tokenizer.eos_id == 2
    for split in SPLITS:
        documents = [d.data for d in open_source(config).documents(split)]
        expected = [i for data in documents for i in (1, *tokenizer.encode(data), 2)]
        found = open_tokens(corpus.folder, split)
        assert found.tolist() == expected
        assert tokenizer.decode(found) == b"".join(documents)
        assert corpus.num_bytes[split] == sum(map(len, documents))


def test_a_corpus_belongs_to_the_contents_of_the_tokenizers_file(tmp_path, monkeypatch):
    file = tmp_path / "tokenizer.json"
    byte_level(PRE_TOKENIZERS["gpt-2"]).save(str(file))
    config = folder_config(tmp_path, tokenizer=tmp_path)  # the folder, as a path
    first, kept = prepare(config), open_tokenizer(file)
    moved = dataclasses.replace(config, tokenizer=str(file.rename(tmp_path / "moved.json")))
    monkeypatch.setattr(builder, "_build", lambda *_: pytest.fail("built again"))
    assert prepare(moved) == first == load_corpus(config, kept).folder
    monkeypatch.undo()
    byte_level(PRE_TOKENIZERS["smollm"]).save(str(tmp_path / "moved.json"))
    assert prepare(moved) != first


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (
            "byte",
            r"data\.tokenizer = 'byte': no such file; must be 'bytes', 'bpe', a tokenizer\.json, a folder",
        ),
        ("no/tokenizer.json", r"data\.tokenizer = 'no/tokenizer\.json': no such file"),
        ("", r"data\.tokenizer = '': must be 'bytes', 'bpe' or a file"),
    ],
)
def test_a_tokenizer_that_is_nowhere(config, tokenizer, message):
    with pytest.raises(UserError, match=message):
        prepare(dataclasses.replace(config, tokenizer=tokenizer))
    assert not Path(config.cache_dir).exists()


@pytest.mark.parametrize(
    "damage",
    ["short", "long", "gone", "no description", "half a description", "a wrong type", "a missing split"],
)
def test_damaged_files_get_one_line(config, damage):
    folder = prepare(config)
    path = tokens_path(folder, "train")
    if damage == "gone":
        path.unlink()
    elif damage == "no description":
        (folder / "corpus.json").unlink()
    elif damage == "half a description":
        (folder / "corpus.json").write_text('{"corpus_hash": "x"}')
    elif damage in ("a wrong type", "a missing split"):
        numbers = [] if damage == "a wrong type" else {}
        (folder / "corpus.json").write_text(json.dumps(read_description(folder) | {"num_tokens": numbers}))
    else:
        path.write_bytes(path.read_bytes()[:-1] if damage == "short" else path.read_bytes() + b"x")
    with pytest.raises(UserError, match=f"delete the folder {folder}, and it is made again"):
        open_tokens(folder, "train")


def test_what_a_folder_holds_is_on_disk_before_its_name(config, monkeypatch):
    calls, rename, fsync = [], os.rename, os.fsync

    def note_rename(old, new):
        calls.append(sorted(path.name for path in old.iterdir()))
        rename(old, new)

    def note_fsync(descriptor):
        calls.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "rename", note_rename)
    monkeypatch.setattr(os, "fsync", note_fsync)
    folder = prepare(config)
    *synced, names = calls
    assert set(synced) == {path.stat().st_ino for path in (folder, *(folder / name for name in names))}


def test_a_split_without_documents_is_empty(tmp_path):
    (tmp_path / "x").write_bytes(b"a" * 10)  # 95 % of ten bytes are nine, as are 90 %
    config = DataConfig(dataset="text", path=str(tmp_path / "x"), cache_dir=str(tmp_path / "c"))
    chex.assert_shape(open_tokens(prepare(config), "validation"), (0,))


def test_training_on_text_needs_no_tfds(config):
    code = (
        "import sys; sys.modules.update(tensorflow_datasets=None, tensorboardX=None)\n"
        "from ultramem_jax.config import DataConfig\n"
        "from ultramem_jax.data import load_corpus\n"
        "from ultramem_jax.training import loop\n"
        f"config = DataConfig(dataset='text', path={config.path!r}, cache_dir={config.cache_dir!r})\n"
        "corpus = load_corpus(config)\n"
        "print(len(corpus.source('train')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "39", done.stderr


def test_ids_beyond_16_bits(config, monkeypatch):
    class WideTokenizer(builder.ByteTokenizer):
        vocab_size = 70_001
        eos_id = 70_000
        start_ids = (70_000,)

        def encode(self, data):
            return super().encode(data) + 69_000

    monkeypatch.setattr(builder, "ByteTokenizer", WideTokenizer)
    folder = prepare(config)
    chex.assert_trees_all_equal(
        open_tokens(folder, "train"), expected_stream(config, WideTokenizer(), "train")
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
    first = read_description(folder)["corpus_hash"]
    Path(config.path).write_bytes(b"something else, and enough of it")
    other = prepare(config)
    assert other != folder and read_description(other)["corpus_hash"] != first
    bpe = prepare(DataConfig(**fields, tokenizer="bpe", bpe_vocab_size=300))
    assert bpe not in (folder, other)
    assert prepare(DataConfig(**fields, tokenizer="bpe", bpe_vocab_size=301)) != bpe


def test_only_what_is_needed_stays(config):
    folder = prepare(config)
    files = ["corpus.json", "test.tokens", "train.tokens", "validation.tokens"]
    assert sorted(p.name for p in folder.iterdir()) == files
    assert {p.suffix for p in folder.parent.iterdir()} == {"", ".lock"}


KILLED = """
import os, signal, sys
from tests.data.trained_tokenizers import byte_level, sentencepiece
from ultramem_jax import DataConfig
from ultramem_jax.data import builder, load_corpus, open_tokenizer

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
elif WHERE == "before the description":
    builder.write_description = die
else:
    builder.os.rename = die
builder.prepare(DataConfig(dataset="text", path=sys.argv[1], cache_dir=sys.argv[2]))
"""


@pytest.mark.parametrize("where", ["while tokenizing", "before the description", "before the rename"])
def test_a_killed_build_is_not_taken_for_whole(config, where):
    command = [sys.executable, "-c", KILLED, config.path, config.cache_dir, where]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert [p.suffix for p in Path(config.cache_dir).iterdir() if p.is_dir()] == [".incomplete"]
    folder = prepare(config)
    tokenizer = builder.load_tokenizer(config, folder)
    for split in SPLITS:
        chex.assert_trees_all_equal(open_tokens(folder, split), expected_stream(config, tokenizer, split))
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
