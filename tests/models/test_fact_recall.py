"""Recall against generation, against its definition in float64, and of models that know all or nothing."""

import math

import numpy as np
import pytest

from tests.support.drawn import variables_of
from ultramem_jax.config import ModelConfig
from ultramem_jax.data import BpeTokenizer, ByteTokenizer
from ultramem_jax.data.fact_words import ATTRIBUTES
from ultramem_jax.data.facts import Population, queries
from ultramem_jax.errors import UserError
from ultramem_jax.models import fact_recall
from ultramem_jax.models.fact_recall import pair_ids, recall
from ultramem_jax.models.generation import continue_texts, text_generator
from ultramem_jax.models.sampling import Sampling
from ultramem_jax.models.scoring import Score, Scorer

TOKENIZER = ByteTokenizer()
CONFIG = ModelConfig(vocab_size=257, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=16)
WINDOW, LENGTH = 128, 12


@pytest.fixture(scope="module")
def people():
    return list(Population(0, 12, seed=4).people())


@pytest.fixture(scope="module")
def variables():
    drawn = variables_of(CONFIG, seed=1)
    # Larger embeddings, so that the likeliest tokens are no near ties; only letters and the like are written.
    embedding = drawn["params"]["embedding"] * 5
    drawn["params"]["embedding"] = embedding.at[127:].set(0).at[:32].set(0)
    return drawn


class _Fake:
    """Gives an answer the log-probability that a function of the texts decides, at its first token."""

    max_length = 1024

    def __init__(self, log_probability):
        self._log_probability = log_probability

    def score(self, pairs):
        return [self._one(*pair) for pair in pairs]

    def _one(self, context, answer):
        assert context[0] == TOKENIZER.eos_id
        total = self._log_probability(TOKENIZER.decode(context).decode(), TOKENIZER.decode(answer).decode())
        return Score(np.array([total] + [0.0] * (len(answer) - 1), np.float32), total == 0)


def _truth(asked):
    return {(query.prompt, query.answer) for query in asked}


def test_knows_everything(people):
    asked = list(queries(people, "question", max_choices=10))
    right = _truth(asked)
    found = recall(_Fake(lambda prompt, answer: 0.0 if (prompt, answer) in right else -9.0), TOKENIZER, asked)
    assert found.num_queries == 60 and found.greedy == found.by_likelihood == 1 and found.nats == 0
    assert found.stored_bits == pytest.approx(12 * 46.591623671891114, rel=1e-12)
    assert found.bits_per_parameter(100) == found.stored_bits / 100
    assert list(found.attributes) == list(ATTRIBUTES)
    assert {one.num_queries for one in found.attributes.values()} == {12}
    assert found.attributes["major"].stored_bits == pytest.approx(12 * math.log2(100), rel=1e-12)


def test_knows_nothing(people):
    asked = list(queries(people, "statement", max_choices=10))
    choices = {query.prompt: len(ATTRIBUTES[query.attribute].values) for query in asked}
    # All values are as likely: not even by likelihood is there a right answer.
    even = recall(_Fake(lambda prompt, answer: -math.log(choices[prompt])), TOKENIZER, asked)
    assert even.greedy == even.by_likelihood == 0
    assert even.stored_bits == pytest.approx(0, abs=1e-4)  # log-probabilities are float32
    worse = recall(_Fake(lambda prompt, answer: -30.0), TOKENIZER, asked)
    assert worse.stored_bits == 0 and worse.nats == pytest.approx(30, rel=1e-6)


def test_measures_equal_their_definitions(people):
    asked = list(queries(people, "held_out_statement", max_choices=7))
    rng = np.random.default_rng(0)
    values = {
        (query.prompt, answer): float(
            rng.choice([0.0, -1.5, -40.0]) if query.attribute != "employer" else -99.0
        )
        for query in asked
        for answer in query.choices
    }
    found = recall(_Fake(lambda *texts: values[texts]), TOKENIZER, asked)
    nats = np.array([-values[query.prompt, query.answer] for query in asked])
    likeliest = [
        all(
            values[query.prompt, query.answer] > values[query.prompt, other]
            for other in query.choices
            if other != query.answer
        )
        for query in asked
    ]
    assert 0 < sum(likeliest) < len(asked)
    assert found.nats == pytest.approx(nats.mean(), rel=1e-6)
    assert found.greedy == pytest.approx(np.mean(nats == 0), rel=1e-12)
    assert found.by_likelihood == pytest.approx(np.mean(likeliest), rel=1e-12)
    bits = 0.0
    for number, (attribute, of) in enumerate(ATTRIBUTES.items()):
        those = nats[number :: len(ATTRIBUTES)]
        expected = max(0.0, len(those) * np.log2(len(of.values)) - those.sum() / np.log(2))
        bits += expected
        one = found.attributes[attribute]
        assert one.stored_bits == pytest.approx(expected, rel=1e-5)
        assert one.nats == pytest.approx(those.mean(), rel=1e-6)
    assert (
        found.stored_bits == pytest.approx(bits, rel=1e-5) and found.attributes["employer"].stored_bits == 0
    )
    # Allen-Zhu and Li's N·log2(S / e^p), of the attributes that count.
    counted = [one for one in found.attributes if found.attributes[one].stored_bits > 0]
    product = math.prod(len(ATTRIBUTES[one].values) for one in counted)
    mean = sum(
        nats[number :: len(ATTRIBUTES)].mean() for number, one in enumerate(ATTRIBUTES) if one in counted
    )
    assert found.stored_bits == pytest.approx(12 * math.log2(product / math.exp(mean)), rel=1e-5)


def test_a_window_that_would_cut_names_off_is_refused(people):
    asked = list(queries(people, "statement", max_choices=1))
    short = _Fake(lambda prompt, answer: 0.0)
    longest = max(len(query.prompt + query.answer) for query in asked)  # in bytes, with the id of the start
    short.max_length = longest - 1
    with pytest.raises(UserError, match=rf"max_length = {longest - 1}: must be at least {longest}, or a pr"):
        recall(short, TOKENIZER, asked)
    short.max_length = longest
    assert recall(short, TOKENIZER, asked).greedy == 1


def test_a_model_that_is_not_finite_is_not_one_that_knows_nothing(people):
    asked = queries(people, "statement", max_choices=2)
    found = recall(_Fake(lambda prompt, answer: math.nan), TOKENIZER, asked)
    assert math.isnan(found.stored_bits) and math.isnan(found.nats)


def test_more_queries_than_are_held_at_a_time(people, monkeypatch):
    monkeypatch.setattr(fact_recall, "_SCORED_TOGETHER", 7)

    def log_probability(prompt, answer):
        return -len(prompt + answer) / 100

    together = [recall(_Fake(log_probability), TOKENIZER, queries(people, "question", max_choices=3))]
    monkeypatch.undo()
    together.append(recall(_Fake(log_probability), TOKENIZER, queries(people, "question", max_choices=3)))
    assert together[0] == together[1] and together[0].num_queries == 60


def test_one_choice_leaves_the_other_measures(people):
    def log_probability(prompt, answer):
        return -len(prompt) / 100

    many, one = (
        recall(_Fake(log_probability), TOKENIZER, queries(people, "statement", max_choices=n))
        for n in (20, 1)
    )
    assert one.stored_bits == many.stored_bits and one.nats == many.nats
    assert one.by_likelihood == 1 and many.by_likelihood == 0  # all choices are as likely


def test_greedy_accuracy_is_that_of_generated_texts(people, variables):
    asked = list(queries(people[:2], "question", max_choices=4))
    generator = text_generator(
        CONFIG, variables, TOKENIZER, window=WINDOW, sampling=Sampling(temperature=0.0), prefill_chunk=WINDOW
    )
    written = continue_texts(generator, TOKENIZER, [query.prompt for query in asked], LENGTH)
    # Half of the answers are what the model writes, some of them shorter; others differ in the last letter.
    answers = []
    for number, text in enumerate(written):
        cut = text[: LENGTH - number]
        answers.append(cut if number % 2 == 0 else cut[:-1] + ("a" if cut[-1] != "a" else "b"))
    asked = [
        query._replace(answer=answer, choices=(*query.choices, answer))
        for query, answer in zip(asked, answers, strict=True)
    ]
    expected = [text.startswith(query.answer) for text, query in zip(written, asked, strict=True)]
    assert sum(expected) == 5
    found = recall(Scorer(CONFIG, variables, max_length=WINDOW, batch_size=4), TOKENIZER, asked)
    assert found.greedy == 0.5
    for number, attribute in enumerate(ATTRIBUTES):
        assert found.attributes[attribute].greedy == np.mean([expected[number], expected[number + 5]])


def _tokenizer():
    texts = [text.encode() for _, text in Population(0, 40).texts("train")]
    return BpeTokenizer.train(texts, 600)


def test_ids_of_prompt_and_answer_are_those_of_the_text(people):
    for tokenizer in (TOKENIZER, _tokenizer()):
        for query in queries(people, "statement", max_choices=1):
            prompt, answer = pair_ids(tokenizer, query.prompt, query.answer)
            assert prompt[0] == tokenizer.eos_id
            whole = tokenizer.encode((query.prompt + query.answer).encode())
            np.testing.assert_array_equal(np.concatenate([prompt[1:], answer]), whole)
            # A blank belongs to the word after it, so nothing spans prompt and answer.
            assert tokenizer.decode(answer).decode() == query.answer


def test_token_that_spans_prompt_and_answer_belongs_to_the_answer():
    tokenizer = BpeTokenizer.train([b"birthplace birthplace birthplace"], 300)
    prompt, answer = pair_ids(tokenizer, "the birth", "place.")
    assert tokenizer.decode(prompt) + tokenizer.decode(answer) == b"the birthplace."
    np.testing.assert_array_equal(np.append(prompt[1:], answer), tokenizer.encode(b"the birthplace."))
    assert tokenizer.decode(answer) == b" birthplace."


def test_wrong_arguments(people):
    asked = list(queries(people[:1], "question", max_choices=1))
    scorer = _Fake(lambda *_: 0.0)
    with pytest.raises(UserError, match=r"^queries = 0: must be at least 1"):
        recall(scorer, TOKENIZER, [])
    with pytest.raises(UserError, match=r"^queries = 'the birth_date of .*': must be asked for once"):
        recall(scorer, TOKENIZER, asked + asked[:1])
    with pytest.raises(UserError, match=r"^num_parameters = 0: must be at least 1"):
        recall(scorer, TOKENIZER, asked).bits_per_parameter(0)
