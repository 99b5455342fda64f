"""A run that goes on is compared with its checkpoint, and says what differs."""

import json
import logging
import os
import shutil
from dataclasses import replace

import chex
import pytest

from tests.support.small_run import files
from ultramem_jax import UserError
from ultramem_jax.data import BpeTokenizer, load_corpus
from ultramem_jax.training.continuing import _jumps, check_corpus, corpus_identity
from ultramem_jax.training.loop import train
from ultramem_jax.training.restore import load_model

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def bpe(config):
    """One step with a tokenizer of 280 ids, in a model that has room for more."""
    data = replace(config.data, tokenizer="bpe", bpe_vocab_size=280)
    return replace(
        config,
        model=replace(config.model, vocab_size=300, memories={}),
        data=data,
        train=replace(config.train, steps=1),
    )


@pytest.fixture(scope="module")
def trained(bpe, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("bpe")
    train(bpe, workdir, progress=False)
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def refused(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def another_tokenizer(bpe):
    text = b"quite another text of pairs that are merged in quite another order " * 50
    return BpeTokenizer.train([text], bpe.data.bpe_vocab_size)


# ---- the identity of a corpus


def test_a_tokenizer_of_another_size_is_refused(bpe, workdir):
    other = replace(bpe, data=replace(bpe.data, bpe_vocab_size=270))
    before = files(workdir)
    with pytest.raises(UserError) as error:
        train(other, workdir, progress=False)
    refused(error, "'bpe' of 270 ids", "'bpe' of 280 ids", "data.bpe_vocab_size", str(workdir))
    assert files(workdir) == before


def test_a_cache_that_another_library_tokenized_is_refused(bpe, workdir, tmp_path, monkeypatch):
    """The same text, size and settings; only the merges are others."""
    made = another_tokenizer(bpe)
    monkeypatch.setattr(BpeTokenizer, "train", lambda *_: made)
    other = replace(bpe, data=replace(bpe.data, cache_dir=str(tmp_path / "cache")))
    corpus, loaded = load_corpus(other.data), load_model(workdir)
    assert corpus.corpus_hash == loaded.corpus["corpus_hash"]
    assert corpus.tokenizer.vocab_size == 280
    before = files(workdir)
    with pytest.raises(UserError) as error:
        train(other, workdir, progress=False)
    refused(error, "the tokenizer of this corpus", "'bpe' of 280 ids", "was trained with")
    assert files(workdir) == before
    with pytest.raises(UserError, match="the tokenizer of this corpus"):
        check_corpus(loaded.corpus, corpus, workdir)


def test_other_tokens_of_the_same_text_are_refused(bpe):
    corpus = load_corpus(bpe.data)
    then = corpus_identity(corpus)
    check_corpus(then, corpus, "run")
    check_corpus({"corpus_hash": then["corpus_hash"]}, corpus, "run")  # as old versions wrote it
    fewer = then["num_tokens"] | {"train": then["num_tokens"]["train"] - 1}
    with pytest.raises(UserError, match="it was tokenized in another way"):
        check_corpus(then | {"num_tokens": fewer}, corpus, "run")


def test_a_cache_whose_tokenizer_was_exchanged_is_refused(bpe, tmp_path):
    data = replace(bpe.data, cache_dir=str(tmp_path / "cache"))
    path = load_corpus(data).folder / "tokenizer.json"
    another_tokenizer(bpe).save(path)
    with pytest.raises(UserError, match="must be the tokenizer that the tokens beside it were made with"):
        load_corpus(data)
    path.write_text("")
    with pytest.raises(UserError) as error:
        load_corpus(data)
    refused(error, str(path), "must be a tokenizer of byte-level BPE", "delete the folder")


# ---- the tokenizer's file

HARM = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_text(""),
    "garbage": lambda path: path.write_bytes(b"\x00\xff{]"),
    "of another kind": lambda path: path.write_text('{"model": {"type": "WordLevel", "vocab": {}}}'),
    "cut off": lambda path: path.write_text(path.read_text()[:-100]),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("harm", HARM.values(), ids=list(HARM))
def test_a_lost_tokenizer_is_an_error_to_read_and_written_again_by_training(bpe, workdir, harm, caplog):
    path = workdir / "tokenizer.json"
    before = path.read_bytes()
    harm(path)
    with pytest.raises(UserError) as error:
        load_model(workdir)
    refused(error, str(path), "tokenizer of byte-level BPE", "writes it anew")
    train(bpe, workdir, progress=False)
    assert "it is written again" in caplog.text
    assert path.read_bytes() == before
    chex.assert_trees_all_equal(load_model(workdir).tokenizer.encode(b"memory"), _ids(bpe, b"memory"))


def _ids(bpe, data):
    return load_corpus(bpe.data).tokenizer.encode(data)


def test_a_folder_in_place_of_the_tokenizer_is_named(bpe, workdir):
    path = workdir / "tokenizer.json"
    path.unlink()
    path.mkdir()
    for act in (lambda: load_model(workdir), lambda: train(bpe, workdir, progress=False)):
        with pytest.raises(UserError) as error:
            act()
        refused(error, f"{path}: must be a file", "remove it")


def test_another_tokenizer_in_the_runs_folder_is_refused(bpe, workdir):
    path = workdir / "tokenizer.json"
    another_tokenizer(bpe).save(path)
    before = files(workdir)
    for act in (lambda: load_model(workdir), lambda: train(bpe, workdir, progress=False)):
        with pytest.raises(UserError) as error:
            act()
        refused(error, f"the tokenizer of {path}", "was trained with")
    assert files(workdir) == before


def test_a_fingerprint_is_that_of_the_merges(bpe, tmp_path):
    tokenizer = load_corpus(bpe.data).tokenizer
    assert tokenizer.fingerprint != another_tokenizer(bpe).fingerprint
    # As versions of the library before 0.20 write merges, and as others may indent and sort.
    tree = json.loads(tokenizer._backend.to_str())
    assert isinstance(tree["model"]["merges"][0], list)
    tree["model"]["merges"] = [" ".join(merge) for merge in tree["model"]["merges"]]
    (tmp_path / "old.json").write_text(json.dumps(tree, indent=3, sort_keys=True))
    assert BpeTokenizer.load(tmp_path / "old.json").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(normalizer={"type": "Lowercase"}),
        lambda t: t["pre_tokenizer"].update(add_prefix_space=True),
        lambda t: t.update(pre_tokenizer=None),
        lambda t: t["model"].update(dropout=0.9),
        lambda t: t["model"]["merges"].pop(),
    ],
)
def test_a_fingerprint_is_that_of_all_that_makes_ids(bpe, tmp_path, change):
    tokenizer = load_corpus(bpe.data).tokenizer
    tree = json.loads(tokenizer._backend.to_str())
    change(tree)
    (tmp_path / "changed.json").write_text(json.dumps(tree))
    assert BpeTokenizer.load(tmp_path / "changed.json").fingerprint != tokenizer.fingerprint


# ---- settings that may change


def test_each_changed_field_is_said_and_how_rates_jump(config, tmp_path, caplog):
    model = replace(config.model, memories={})
    short = replace(config, model=model, train=replace(config.train, steps=2, eval_every=0))
    train(short, tmp_path, progress=False)
    changed = dict(steps=4, learning_rate=5e-3, b1=0.8, weight_decay=0.0)
    longer = replace(short, train=replace(short.train, **changed))
    with caplog.at_level(logging.INFO):
        train(longer, tmp_path, progress=False)
    lines = caplog.messages
    for name, then, now in (
        ("steps", 2, 4),
        ("learning_rate", 0.01, 0.005),
        ("b1", 0.9, 0.8),
        ("weight_decay", 0.1, 0.0),
    ):
        assert f"train.{name} = {now} from step 3 on, {then} before" in lines
    assert len([line for line in lines if "before" in line]) == len(changed)
    jump = "the learning rate jumps from 0.001 in step 2 to 0.00162 in step 3 (×1.62)"
    assert jump in lines
    # By hand: the cosine ended on a tenth of the peak. Of four steps one is warm-up, and step 3 is two thirds
    # down the cosine: 0.005·(0.1 + 0.9·(1 + cos(2π/3))/2) = 0.001625. The rate of tables fell from 10 to 1
    # times that in two steps; in four it is after two thirds of the way at 10 - 9·2/3 = 4 times.
    with_memory = [replace(run, model=config.model) for run in (short, longer)]
    of_tables = "the learning rate of tables jumps from 0.001 in step 2 to 0.0065 in step 3 (×6.5)"
    assert _jumps(*with_memory, 2) == [jump, of_tables]


def test_nothing_is_said_of_changes_that_are_refused(bpe, workdir, caplog):
    other = replace(bpe, model=replace(bpe.model, mlp_dim=32), train=replace(bpe.train, b1=0.5))
    with caplog.at_level(logging.INFO), pytest.raises(UserError, match=r"model\.mlp_dim is 16 there"):
        train(other, workdir, progress=False)
    assert "before" not in caplog.text


def test_a_run_extended_to_twice_its_steps_says_by_how_much_its_rates_jump(config):
    done = replace(config, train=replace(config.train, steps=1000))
    assert _jumps(done, done, 500) == []
    twice = replace(done, train=replace(done.train, steps=2000))
    dense, tables = _jumps(done, twice, 1000)
    assert dense.endswith("in step 1001 (×5.56)") and tables.endswith("in step 1001 (×30.6)")


def test_a_finished_run_started_again_says_so(bpe, workdir, caplog):
    with caplog.at_level(logging.INFO):
        result = train(bpe, workdir, progress=False)
    assert result.finished and f"already finished: step 1 of {workdir}" in caplog.messages
