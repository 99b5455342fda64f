"""Runs with the tokenizer of a file: they keep a copy of it, load without the file, and continue."""

import logging
import pathlib
import shutil
from dataclasses import replace

import numpy as np
import pytest

from tests.data.trained_tokenizers import EOS, byte_level, sentencepiece
from ultramem_jax import UserError
from ultramem_jax.data import load_corpus, open_tokenizer
from ultramem_jax.data.pre_tokenizers import PRE_TOKENIZERS
from ultramem_jax.models.generation import ENDED, stream_texts
from ultramem_jax.training.evaluation import Evaluator
from ultramem_jax.training.loop import train
from ultramem_jax.training.restore import kept_tokenizer, load_model

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def file_config(config, tmp_path_factory):
    """Two steps with a tokenizer that begins documents and puts a blank before them."""
    path = tmp_path_factory.mktemp("model") / "tokenizer.json"
    sentencepiece().save(str(path))
    return replace(
        config,
        model=replace(config.model, vocab_size=400, memories={}),
        data=replace(config.data, tokenizer=path),
        train=replace(config.train, steps=2, checkpoint_every=1),
    )


@pytest.fixture(scope="module")
def trained(file_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("file")
    train(file_config, workdir, progress=False)
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def lost(file_config):
    """The file is not there."""
    path = file_config.data.tokenizer
    moved = shutil.move(path, path + ".moved")
    yield
    shutil.move(moved, path)


@pytest.mark.usefixtures("lost")
def test_the_model_loads_without_the_file(file_config, workdir):
    loaded = load_model(workdir)
    tokenizer = loaded.tokenizer
    assert (tokenizer.start_ids, tokenizer.eos_id) == ((1,), 2)
    assert tokenizer.decode(tokenizer.encode(b"memory slot")) == b"memory slot"
    assert tokenizer.fingerprint == loaded.corpus["tokenizer_hash"]
    # The folder is that of any published tokenizer.
    assert open_tokenizer(workdir).fingerprint == tokenizer.fingerprint
    # And with the copy, the corpus and an evaluation need the file no more either.
    corpus = load_corpus(file_config.data, kept_tokenizer(file_config.data, workdir))
    assert corpus.corpus_hash == loaded.corpus["corpus_hash"]
    assert np.isfinite(Evaluator(loaded.config, corpus)(loaded.variables, batches=1).bits_per_byte)
    with pytest.raises(UserError, match=r"data\.tokenizer = .*: no such file") as error:
        load_corpus(file_config.data)
    assert "\n" not in str(error.value)


def test_a_kept_tokenizer_is_only_for_a_lost_file(file_config, workdir, tmp_path):
    assert kept_tokenizer(file_config.data, workdir) is None
    elsewhere = replace(file_config.data, tokenizer="no/such/file")
    assert kept_tokenizer(elsewhere, workdir) is not None
    assert kept_tokenizer(elsewhere, tmp_path) is None
    assert kept_tokenizer(replace(elsewhere, tokenizer="bpe"), workdir) is None


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_run_continues_and_mends_its_copy(file_config, workdir, name, caplog):
    (workdir / name).write_text("{")
    with pytest.raises(UserError, match=r"must be .*; remove it if it is there") as error:
        load_model(workdir)
    assert "\n" not in str(error.value)
    with caplog.at_level(logging.WARNING):
        train(file_config, workdir, progress=False)
    assert "it is written again" in caplog.text
    loaded = load_model(workdir)
    assert loaded.step == 2 and loaded.tokenizer.eos_id == 2


def test_a_file_with_other_contents_is_refused(file_config, workdir):
    path = pathlib.Path(file_config.data.tokenizer)
    kept = path.read_bytes()
    try:
        byte_level(PRE_TOKENIZERS["gpt-2"]).save(str(path))
        with pytest.raises(UserError, match=r"is 'model\d*/tokenizer\.json' of \d+ ids .* not the one that"):
            train(replace(file_config, model=replace(file_config.model, vocab_size=500)), workdir)
    finally:
        path.write_bytes(kept)


class _Fixed:
    """Yields given ids, and keeps the prompts."""

    def __init__(self, ids):
        self._ids = ids

    def stream(self, prompts, num_tokens, seed):
        self.prompts = [list(prompt) for prompt in prompts]
        return (np.array([i] * len(prompts), np.int32) for i in [*self._ids, ENDED])


def test_a_text_begins_without_the_blank_that_the_tokenizer_adds(workdir):
    tokenizer = load_model(workdir).tokenizer
    ids = tokenizer.encode(b"the cat").tolist()
    generator = _Fixed(ids)
    pieces = list(stream_texts(generator, tokenizer, ["", "on"], 9))
    assert ["".join(of_text) for of_text in zip(*pieces, strict=True)] == ["the cat", " the cat"]
    assert generator.prompts == [[1], [1, *tokenizer.encode(b"on")]]


def test_prompts_may_have_special_tokens(tmp_path):
    backend = byte_level(PRE_TOKENIZERS["llama-bpe"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer, eos = open_tokenizer(tmp_path), backend.token_to_id(EOS)
    generator = _Fixed([])
    list(stream_texts(generator, tokenizer, [f"a{EOS}", f"{EOS}a"], 1, special=True))
    (a,) = tokenizer.encode(b"a")
    assert generator.prompts == [[eos, a, eos], [eos, a]]
    list(stream_texts(generator, tokenizer, [f"{EOS}a"], 1))
    assert generator.prompts == [[eos, *tokenizer.encode(f"{EOS}a".encode())]]
    assert generator.prompts[0].count(eos) == 1
