"""Sequences tile the stream, windows count each target once, batches are a function of seed and step,
positions survive a checkpoint."""

import itertools
import types

import chex
import grain.checkpoint
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ultramem_jax import DataConfig, UserError
from ultramem_jax.data import SequenceSource, eval_batches, load_corpus, train_iterator

S = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    data = np.random.default_rng(0).integers(1, 256, 20_000, np.uint8)
    (folder / "corpus.bin").write_bytes(data.tobytes())
    return folder


def load(folder, seq_len=S, file="corpus.bin"):
    path, cache = str(folder / file), str(folder / "cache")
    return load_corpus(DataConfig(dataset="text", path=path, cache_dir=cache, seq_len=seq_len))


@pytest.fixture(scope="module")
def corpus(folder):
    return load(folder)


def batches(iterator, count) -> np.ndarray:
    """The next `count` batches, (count, batch, S + 1)."""
    return np.stack([batch["tokens"] for batch in itertools.islice(iterator, count)])


def stream(folder, split) -> np.ndarray:
    data = np.frombuffer((folder / "corpus.bin").read_bytes(), np.uint8).astype(np.int32)
    start, end = {"train": (0, 18_000), "validation": (18_000, 19_000), "test": (19_000, 20_000)}[split]
    return np.append(data[start:end], 256)


def test_counts(corpus):
    assert corpus.num_bytes == {"train": 18_000, "validation": 1000, "test": 1000}
    assert corpus.num_tokens == {"train": 18_001, "validation": 1001, "test": 1001}
    assert corpus.seq_len == S and corpus.tokenizer.vocab_size == 257 and len(corpus.corpus_hash) == 64


@pytest.mark.parametrize("seq_len", [2, 31, 32, 1000, 4096, 8197])
def test_sequences_tile_the_stream(folder, seq_len):
    source = load(folder, seq_len).source("train")
    tokens = stream(folder, "train")
    assert len(source) == (len(tokens) - 1) // seq_len
    inputs = np.concatenate([source[i][:-1] for i in range(len(source))])
    targets = np.concatenate([source[i][1:] for i in range(len(source))])
    # Every token from the first on is an input once and its successor a target once; fewer than S targets
    # remain.
    chex.assert_trees_all_equal(inputs, tokens[: len(inputs)])
    chex.assert_trees_all_equal(targets, tokens[1 : len(targets) + 1])
    assert len(tokens) - 1 - len(targets) < seq_len
    chex.assert_type(source[0], np.int32)
    chex.assert_shape(source[0], (seq_len + 1,))


def test_a_split_of_exactly_one_sequence(folder):
    source = load(folder, 1000).source("test")
    assert len(source) == 1
    chex.assert_trees_all_equal(source[0], stream(folder, "test"))
    for i in (-1, 1):
        with pytest.raises(IndexError, match=f"sequence {i} of 1"):
            source[i]


def test_every_epoch_is_another_permutation(corpus):
    source = corpus.source("train")
    n = len(source)  # 562
    every = {row.tobytes(): i for i, row in enumerate(source.read(range(n)))}
    seen = batches(train_iterator(corpus, 1, seed=3), 3 * n)[:, 0]
    order = np.array([every[row.tobytes()] for row in seen]).reshape(3, n)
    for epoch in order:
        assert sorted(epoch) == list(range(n))
    for one, other in itertools.combinations([*order, np.arange(n)], 2):
        # Two random permutations agree in one position on average.
        assert (one == other).sum() < 10


def test_batches_run_on_over_the_end_of_an_epoch(corpus):
    one = batches(train_iterator(corpus, 1, seed=3), 600)[:, 0]
    chex.assert_trees_all_equal(batches(train_iterator(corpus, 100, seed=3), 6).reshape(600, S + 1), one)


def test_order_depends_only_on_the_seed(corpus, folder):
    first = batches(train_iterator(corpus, 4, seed=0), 5)
    chex.assert_trees_all_equal(batches(train_iterator(load(folder), 4, seed=0), 5), first)
    for seed in (1, 2**40):
        assert not (batches(train_iterator(corpus, 4, seed=seed), 5) == first).all()


def test_neighbouring_seeds_share_no_epoch(corpus):
    n = len(corpus.source("train"))
    second_epoch = batches(train_iterator(corpus, 1, seed=0), 2 * n)[n:]
    assert (batches(train_iterator(corpus, 1, seed=1), n) == second_epoch).all(axis=(1, 2)).sum() < 10


@pytest.mark.parametrize("steps", [0, 3, 150])  # an epoch has 140.5 batches
def test_resume_equals_uninterrupted(corpus, folder, tmp_path, steps):
    uninterrupted = train_iterator(corpus, 4, seed=7)
    batches_before = [next(uninterrupted) for _ in range(steps)]
    assert len(batches_before) == steps and uninterrupted.get_state()["next_index"] == steps
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(steps, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(uninterrupted)))
        manager.wait_until_finished()
        expected = batches(uninterrupted, 20)
        resumed = train_iterator(load(folder), 4, seed=7)
        next(resumed)
        manager.restore(steps, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed)))
    chex.assert_trees_all_equal(batches(resumed, 20), expected)


@pytest.mark.parametrize("rows", [[0, 1, 2], [3, 4, 5], [5], [0, 2, 5]])
def test_processes_share_every_batch(corpus, rows):
    whole = batches(train_iterator(corpus, 6, seed=5), 100)
    share = batches(train_iterator(corpus, 6, 5, np.array(rows)), 100)
    chex.assert_trees_all_equal(share, whole[:, rows])


def test_position_survives_other_processes(corpus):
    second_half = train_iterator(corpus, 6, 5, np.array([3, 4, 5]))
    batches(second_half, 11)
    one = train_iterator(corpus, 6, 5)
    one.set_state(second_half.get_state())
    chex.assert_trees_all_equal(batches(one, 3)[:, 3:], batches(second_half, 3))


def test_a_process_reads_only_its_own_rows(corpus, monkeypatch):
    read = []

    class Counting:  # a source of its own: iterators of earlier tests may still be prefetching from theirs
        seq_len = S

        def __len__(self):
            return 100

        def read(self, indices):
            read.append(len(indices))
            return np.zeros((len(indices), S + 1), np.int32)

        def new_targets(self, indices):
            read.append(len(indices))
            return np.ones((len(indices), S), bool)

    monkeypatch.setattr("ultramem_jax.data.pipeline.Corpus.source", lambda *_: Counting())
    next(train_iterator(corpus, 6, 5, np.array([2, 3])))
    next(iter(eval_batches(corpus, "validation", 6, rows=np.array([2, 3]))))
    assert set(read) == {2}


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [4, 5, 6, 7], [1, 6]])
def test_processes_share_every_batch_of_an_evaluation(corpus, rows):
    shares = list(eval_batches(corpus, "validation", 8, rows=np.array(rows), stride=21))
    whole = list(eval_batches(corpus, "validation", 8, stride=21))
    assert len(shares) == len(whole)
    for share, batch in zip(shares, whole, strict=True):
        for name in ("tokens", "mask"):
            chex.assert_trees_all_equal(share[name], batch[name][rows])


def test_fewer_sequences_than_a_batch(folder):
    corpus = load(folder, 8000)
    source = corpus.source("train")
    assert len(source) == 2
    for batch in batches(train_iterator(corpus, 5, seed=0), 4):
        assert {row.tobytes() for row in batch} == {source[0].tobytes(), source[1].tobytes()}


def test_one_sequence(folder):
    corpus = load(folder, 18_000)
    batch = next(train_iterator(corpus, 3, seed=0))["tokens"]
    chex.assert_trees_all_equal(batch, np.tile(stream(folder, "train"), (3, 1)))


@pytest.mark.parametrize(("batch_size", "masked"), [(1, 0), (8, 1), (31, 0), (40, 9)])
def test_evaluation_covers_every_sequence_once(corpus, batch_size, masked):
    # (1001 - 1) // 32 = 31 sequences; the last batch is filled up to the batch size.
    found = list(eval_batches(corpus, "validation", batch_size))
    mask = np.concatenate([batch["mask"] for batch in found])
    tokens = np.concatenate([batch["tokens"] for batch in found])
    chex.assert_type(mask, np.float32)
    chex.assert_type(tokens, np.int32)
    chex.assert_shape([batch["tokens"] for batch in found], (batch_size, S + 1))
    chex.assert_trees_all_equal(mask, np.repeat([[1.0], [0.0]], [31, masked], axis=0) * np.ones(S))
    chex.assert_trees_all_equal(tokens[:31], corpus.source("validation").read(range(31)))
    assert not tokens[31:].any()


def test_limited_evaluation_is_spread_over_the_split(corpus):
    found = np.concatenate([batch["tokens"] for batch in eval_batches(corpus, "validation", 2, limit=2)])
    # Four of 31 sequences: floor(k * 31 / 4).
    chex.assert_trees_all_equal(found, corpus.source("validation").read([0, 7, 15, 23]))
    everything = list(eval_batches(corpus, "validation", 8, limit=1000))
    assert sum(batch["mask"].sum() for batch in everything) == 31 * S


def of_tokens(count, seq_len):
    """A corpus whose splits have that many tokens, 0, 1, 2 and so on."""
    tokens = np.arange(count, dtype=np.int32)
    source = lambda _, stride: SequenceSource(tokens, seq_len, stride)  # noqa: E731
    return types.SimpleNamespace(source=source)


def test_a_sliding_window_counts_every_target_once():
    rng = np.random.default_rng(0)
    for _ in range(300):
        seq_len = int(rng.integers(2, 12))
        stride = int(rng.choice([1, rng.integers(1, seq_len + 1), seq_len]))
        count = seq_len + 1 + int(rng.choice([0, rng.integers(0, 60)]))
        size = int(rng.integers(1, 9))
        found = eval_batches(of_tokens(count, seq_len), "validation", size, stride=stride)
        assert len(list(found)) == len(found)
        counted = []
        for batch in found:
            for tokens, mask in zip(batch["tokens"], batch["mask"], strict=True):
                if not mask.any():
                    assert not tokens.any()  # it fills up the last batch
                    continue
                chex.assert_trees_all_equal(tokens, np.arange(tokens[0], tokens[0] + seq_len + 1))
                targets = tokens[1:][mask == 1]
                counted += targets.tolist()
                # The token before a target is the last of its context.
                assert tokens[0] == 0 or targets[0] - tokens[0] > seq_len - stride
        # The first token is no target; fewer targets than the stride remain.
        assert counted == list(range(1, len(counted) + 1))
        assert 0 <= count - 1 - len(counted) < stride


def test_windows_by_hand():
    # Seven targets, windows of four that advance by two; the last target is in none.
    (batch,) = eval_batches(of_tokens(8, 4), "validation", 3, stride=2)
    chex.assert_trees_all_equal(batch["tokens"], np.array([[0, 1, 2, 3, 4], [2, 3, 4, 5, 6], [0] * 5]))
    chex.assert_trees_all_equal(batch["mask"], np.array([[1, 1, 1, 1], [0, 0, 1, 1], [0] * 4]))


def test_limited_windows_are_spread_over_the_split():
    found = list(eval_batches(of_tokens(50, 4), "validation", 2, limit=2, stride=3))
    # Four of 1 + (49 - 4) // 3 = 16 windows: every fourth.
    chex.assert_trees_all_equal(np.concatenate([b["tokens"] for b in found])[:, 0], np.array([0, 12, 24, 36]))
    chex.assert_trees_all_equal(
        np.concatenate([b["mask"] for b in found]),
        np.array([[1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]),
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda c: c.source("valid"),
            "unknown split 'valid': did you mean 'validation'? known are test, train, validation",
        ),
        (lambda c: train_iterator(c, 0, 0), "train.batch_size = 0: must be at least 1"),
        (lambda c: eval_batches(c, "test", 0), "train.batch_size = 0: must be at least 1"),
        (lambda c: eval_batches(c, "test", 1, -1), "train.eval_batches = -1: must be at least 0"),
        (lambda c: eval_batches(c, "test", 1, stride=0), "--stride = 0: must be in [1, 32]"),
        (lambda c: c.source("test", 33), "--stride = 33: must be in [1, 32], the length of a sequence"),
    ],
)
def test_bad_arguments(corpus, call, message):
    with pytest.raises(UserError) as caught:
        call(corpus)
    assert message in str(caught.value)


@pytest.mark.parametrize("rows", [[], [3, 4], [-1, 0], [2, 1], [1, 1]])
def test_rows_that_are_not_of_the_batch(corpus, rows):
    with pytest.raises(ValueError, match=r"must be rising numbers in \[0, 4\)"):
        train_iterator(corpus, 4, 0, np.array(rows))


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.source("validation"),
        lambda c: eval_batches(c, "validation", 1),
    ],
)
def test_a_split_shorter_than_a_sequence(folder, call):
    corpus = load(folder, 1001)
    assert len(corpus.source("train")) == 17  # the longer split still works
    with pytest.raises(UserError) as caught:
        call(corpus)
    assert str(caught.value) == (
        "data.seq_len = 1001: a sequence needs seq_len + 1 tokens, "
        "the validation split of this corpus has 1,001"
    )


def test_an_empty_split(folder):
    (folder / "tiny").write_bytes(b"0123456789")  # 9 / 0 / 1 bytes: 95 % of 10 is 9.5
    corpus = load(folder, 2, "tiny")
    assert corpus.num_tokens == {"train": 10, "validation": 0, "test": 2}
    with pytest.raises(UserError, match=r"data\.path: no text .* falls into its validation split"):
        corpus.source("validation")
    assert corpus.tokenizer.decode(next(train_iterator(corpus, 1, 0))["tokens"][0]) in b"0123456789"
