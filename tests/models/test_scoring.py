"""Scores against their definition: the log-softmax of a full pass, in float64, for every token alone."""

import jax
import numpy as np
import pytest

from tests.support.drawn import variables_of
from ultramem_jax.config import ModelConfig
from ultramem_jax.errors import UserError
from ultramem_jax.models import Transformer, scoring
from ultramem_jax.models.scoring import Scorer
from ultramem_jax.presets import families

WINDOW = 24
CONFIG = ModelConfig(
    vocab_size=40,
    embed_dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    mlp_dim=16,
    memories={
        # Both look at earlier tokens: by the query's convolution, and by n-grams of ids.
        "memory": families.ultramem(
            placement="1:1", num_keys=8, top_m=4, num_heads=2, key_dim=8, value_dim=8, query_conv_width=3
        ),
        "ngrams": families.engram(placement="before@1", heads_per_order=2, rows_per_head=(50,), value_dim=4),
    },
)
FULL_PASS = jax.jit(Transformer(CONFIG).apply)


@pytest.fixture(scope="module")
def variables():
    drawn = variables_of(CONFIG, seed=3)
    # Larger embeddings make confident predictions, so that the likeliest tokens are no near ties.
    drawn["params"]["embedding"] = drawn["params"]["embedding"] * 5
    return drawn


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    """Reads in chunks of 4 and 8 tokens, with caches of 16, 32 and more positions."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"_LONGEST_CHUNK": 8, "_SHORTEST_CHUNK": 4, "_FEWEST_POSITIONS": 16}.items():
            patch.setattr(scoring, name, value)
        yield


@pytest.fixture(scope="module")
def scorer(variables):
    return Scorer(CONFIG, variables, max_length=WINDOW, batch_size=3)


def _log_softmax(variables, ids):
    """(L, V) float64, of the token after each of up to WINDOW ids. Zeros follow, which the ids do not see."""
    padded = np.zeros((1, WINDOW), np.int32)
    padded[0, : len(ids)] = ids
    logits = np.asarray(FULL_PASS(variables, padded)[0], np.float64)[: len(ids)]
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - (logits.max(-1, keepdims=True))
    )


def _expected(variables, context, continuation):
    """Scores each piece of WINDOW tokens after the context that fits."""
    values, greedy = [], True
    for first in range(0, len(continuation), WINDOW):
        piece = continuation[first : first + WINDOW]
        ids = [*context, *continuation[: first + len(piece)]][-WINDOW - 1 :]
        found = _log_softmax(variables, ids[:-1])[-len(piece) :]
        values += [found[i, token] for i, token in enumerate(piece)]
        greedy &= found.argmax(-1).tolist() == list(piece)
    return values, greedy


def _ids(length, seed):
    return np.random.default_rng(seed).integers(0, 40, length).tolist()


def _pairs():
    shared, long = _ids(13, 0), _ids(20, 1)
    return [
        (shared, _ids(3, 2)),
        (shared, _ids(1, 3)),
        (long, _ids(4, 4)),  # fits exactly: the last token is not read
        ([7], _ids(24, 5)),
        (shared, _ids(9, 6)),
        (long, _ids(11, 7)),  # the context is cut
        ([7], []),
        (shared, _ids(3, 2)),  # equal to the first
        ([7], _ids(1, 8)),
        (_ids(90, 9), _ids(2, 10)),
        ([1, 2], _ids(61, 11)),  # three pieces
        (shared, _ids(1, 12)),
        (_ids(4, 13), _ids(5, 14)),
        ([5], [6, 6]),
    ]


def _assert_equal(variables, pairs, scores):
    assert len(scores) == len(pairs)
    for (context, continuation), score in zip(pairs, scores, strict=True):
        values, greedy = _expected(variables, context, continuation)
        np.testing.assert_allclose(score.log_probabilities, values, rtol=1e-5, atol=1e-5)
        assert score.log_probabilities.shape == (len(continuation),)
        assert score.total == pytest.approx(sum(values), rel=1e-5, abs=1e-9)
        assert score.greedy is greedy


def test_scores_are_those_of_full_passes(variables, scorer):
    pairs = _pairs()
    _assert_equal(variables, pairs, scorer.score(pairs))


def test_a_continuation_is_greedy_if_every_token_is_the_likeliest(variables, scorer):
    context, likeliest = [3, 9, 30], []
    for _ in range(10):
        likeliest.append(int(_log_softmax(variables, [*context, *likeliest])[-1].argmax()))
    others = [[*likeliest[:k], (likeliest[k] + 1) % 40, *likeliest[k + 1 :]] for k in (0, 4, 9)]
    scores = scorer.score([(context, ids) for ids in [likeliest, *others, likeliest[:1], likeliest[:6]]])
    assert [score.greedy for score in scores] == [True, False, False, False, True, True]


def test_equal_pairs_are_scored_once_and_a_context_of_several_choices_is_read_once(scorer, monkeypatch):
    read = {"_read_context": [], "_read_pieces": []}
    for name, calls in read.items():
        function = getattr(scorer, name)
        monkeypatch.setattr(
            scorer, name, lambda *args, f=function, calls=calls: calls.append(args[-2]) or f(*args)
        )
    contexts = [_ids(16, seed) for seed in range(2)]
    pairs = [(context, [choice, *ends]) for context in contexts for choice in range(3) for ends in ([], [9])]
    totals = [score.total for score in scorer.score(pairs + pairs)]
    assert totals[: len(pairs)] == totals[len(pairs) :]
    assert len(set(totals)) == len(pairs)
    assert len(read["_read_context"]) == 2  # chunks of 8 tokens, of both contexts together
    assert len(read["_read_pieces"]) == 3  # those of two tokens; single tokens need only the contexts


def test_scores_come_as_they_are_computed_long_contexts_first(scorer):
    pairs = [([1], [2]), (_ids(9, 0), [3]), (_ids(20, 1), [4])]
    stream = scorer.stream([*pairs, (_ids(14, 2), [5]), ([1], [])])
    assert [index for index, _ in stream] == [4, 2, 3, 1, 0]


def test_logits_of_a_chunk_fit_into_their_limit(variables, monkeypatch):
    monkeypatch.setattr(scoring, "LOGITS_BYTES", 4 * 3 * 40 * 3)
    limited = Scorer(CONFIG, variables, max_length=WINDOW, batch_size=3)
    shapes = []
    read = limited._read_pieces
    limited._read_pieces = lambda *args: shapes.append(args[2].shape) or read(*args)
    pairs = _pairs()[:2]
    _assert_equal(variables, pairs, limited.score(pairs))
    assert set(shapes) == {(3, 2)}  # the largest power of two of which the logits fit


def test_few_programs_are_compiled(scorer):
    scorer.score([(_ids(n, n), _ids(1 + 5 * n % 23, n)) for n in range(1, WINDOW)])
    # Chunks of 4 or 8 tokens, and caches of 16 or 32 positions, or of 64 where both are long.
    assert scorer._read_context._cache_size() <= 5
    assert scorer._read_pieces._cache_size() <= 5


def test_scores_of_other_variables_need_no_other_programs(variables, scorer):
    pairs = _pairs()[:4]
    scorer.score(pairs)
    programs = scorer._read_context._cache_size(), scorer._read_pieces._cache_size()
    other = variables_of(CONFIG, seed=4)
    _assert_equal(other, pairs, scorer.with_variables(other).score(pairs))
    assert (scorer._read_context._cache_size(), scorer._read_pieces._cache_size()) == programs
    _assert_equal(variables, pairs, scorer.score(pairs))


BAD = {
    "an empty context": (
        dict(),
        [([1], [2]), ([], [2])],
        "pairs[1], tokens of its context = 0",
        "at least 1",
    ),
    "an id too large": (dict(), [([1], [40])], "continuation = '40 to 40'", "[0, 40)"),
    "a negative id": (dict(), [([-1, 3], [4])], "context = '-1 to 3'", "[0, 40)"),
    "no window": (dict(max_length=0), [], "max_length = 0", "at least 1"),
    "no batch": (dict(batch_size=0), [], "batch_size = 0", "at least 1"),
    "another dtype": (dict(cache_dtype="int8"), [], "cache_dtype 'int8'", "bfloat16"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_gets_one_line_that_says_what_is_allowed(variables, case):
    options, pairs, *said = BAD[case]
    with pytest.raises(UserError) as error:
        Scorer(CONFIG, variables, **{"max_length": WINDOW, **options}).stream(pairs)
    message = str(error.value)
    assert "\n" not in message and all(words in message for words in said), message
