"""Measures how many of the facts of `data.facts` a model holds: accuracy, and bits of knowledge.

asked = facts.queries(facts.Population.parse("0-1000").people(), "statement")
found = recall(Scorer(config, variables, max_length=256), tokenizer, asked)
found.greedy, found.stored_bits, found.bits_per_parameter(num_parameters)
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from ultramem_jax.data.fact_words import ATTRIBUTES
from ultramem_jax.data.facts import Query
from ultramem_jax.data.tokenizers import Tokenizer
from ultramem_jax.errors import at_least, require
from ultramem_jax.models.scoring import Ids, Score

_SCORED_TOGETHER = 1024
"""Queries whose ids and scores are held at a time."""


class PairScorer(Protocol):
    """Describes what `recall` needs of a `Scorer`."""

    @property
    def max_length(self) -> int:
        """Returns the most tokens of a context and its continuation that are read, but for the last one."""

    def score(self, pairs: Iterable[tuple[Ids, Ids]]) -> list[Score]:
        """Returns the score of each context with its continuation, in order."""


class AttributeRecall(NamedTuple):
    """Holds what a model knows of one attribute."""

    num_queries: int
    greedy: float
    """Fraction of the queries whose answer greedy decoding writes, to the full stop."""
    by_likelihood: float
    """Fraction of the queries whose answer is more likely than every other of its choices."""
    nats: float
    """Mean of the answers' negative log-probabilities, with the full stop."""
    stored_bits: float
    """Lower bound of what the model knows of the attribute, in bits; see `Recall.stored_bits`."""


@dataclass(frozen=True)
class Recall:
    """Holds what a model knows, by attribute and over all queries."""

    attributes: dict[str, AttributeRecall]
    """Results of each attribute that was asked for."""

    @property
    def num_queries(self) -> int:
        """Returns the number of queries."""
        return sum(one.num_queries for one in self.attributes.values())

    @property
    def greedy(self) -> float:
        """Returns the fraction of all queries whose answer greedy decoding writes, to the full stop."""
        return self._mean([one.greedy for one in self.attributes.values()])

    @property
    def by_likelihood(self) -> float:
        """Returns the fraction of all queries whose answer is more likely than its other choices."""
        return self._mean([one.by_likelihood for one in self.attributes.values()])

    @property
    def nats(self) -> float:
        """Returns the mean negative log-probability of all answers, each with its full stop."""
        return self._mean([one.nats for one in self.attributes.values()])

    @property
    def stored_bits(self) -> float:
        """Returns a lower bound of the knowledge of values, in bits, over all people that were asked about.

        It is the sum over attributes of max(0, N·log2(D) - L / ln 2), for N people, an attribute of D values,
        and L the nats of all N answers. Without the maximum it is the part on values of the bound of
        Allen-Zhu and Li (arXiv 2404.05405): N·log2(S / e^p), S the product of all D, and p the nats of all
        answers of a person, on average. What differs:

        - Bits of names are not counted: prompts give the names.
        - An attribute counts at least 0, since a code can do without the model for one bit. The maximum is
          not over single answers: it would count guesses that were right and not those that were wrong.
        - The full stop counts into the nats, which only lowers the bound.
        """
        return math.fsum(one.stored_bits for one in self.attributes.values())

    def bits_per_parameter(self, num_parameters: int) -> float:
        """Returns `stored_bits` per parameter, the capacity ratio of Allen-Zhu and Li without names.

        Raises:
            UserError: less than one parameter.
        """
        at_least(1, num_parameters=num_parameters)
        return self.stored_bits / num_parameters

    def _mean(self, values: list[float]) -> float:
        counts = [one.num_queries for one in self.attributes.values()]
        return math.fsum(np.multiply(values, counts)) / self.num_queries


def recall(scorer: PairScorer, tokenizer: Tokenizer, queries: Iterable[Query]) -> Recall:
    """Asks a model for facts.

    Every choice of every query is scored. So `max_choices` of `facts.queries` decides the cost. With one
    choice `by_likelihood` is 1; no other measure needs more.

    Args:
        scorer: a `Scorer` of the model.
        tokenizer: the one that the model was trained with.
        queries: at most one for each attribute of a person, in one form, from `facts.queries`.

    Raises:
        UserError: no queries, or two for one fact; a prompt that would lose its beginning, the name, because
            `max_length` of the scorer is less than it has with its answer.
    """
    found: dict[str, list[tuple[bool, bool, float]]] = {}
    asked: dict[str, set[tuple[int, int]]] = {}
    waiting = iter(queries)
    while group := list(itertools.islice(waiting, _SCORED_TOGETHER)):
        for query in group:
            of_attribute = asked.setdefault(query.attribute, set())
            who = query.person.seed, query.person.index
            fact = f"the {query.attribute} of {query.person.name}"
            require(who not in of_attribute, "queries", fact, "must be asked for once")
            of_attribute.add(who)
        answers = [
            (query.answer, *(other for other in query.choices if other != query.answer)) for query in group
        ]
        pairs = [
            pair_ids(tokenizer, query.prompt, answer)
            for query, of_query in zip(group, answers, strict=True)
            for answer in of_query
        ]
        longest = max(len(prompt) + len(answer) for prompt, answer in pairs) - 1
        allowed = f"must be at least {longest}, or a prompt loses the name that it asks about"
        require(scorer.max_length >= longest, "max_length", scorer.max_length, allowed)
        scores = iter(scorer.score(pairs))
        for query, of_query in zip(group, answers, strict=True):
            right, *others = [next(scores) for _ in of_query]
            likeliest = all(right.total > other.total for other in others)
            found.setdefault(query.attribute, []).append((right.greedy, likeliest, -right.total))
    at_least(1, queries=len(found))
    return Recall({attribute: _of_attribute(attribute, results) for attribute, results in found.items()})


def pair_ids(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids of a prompt, after the tokenizer's `start_ids`, and those of the answer.

    Together they are the ids of the whole text. They are cut where the ids of the prompt alone end, or before
    the first token in which these differ: a token that spans both texts belongs to the answer.
    """
    whole, before = (tokenizer.encode(text.encode()) for text in (prompt + answer, prompt))
    length = min(len(whole), len(before))
    differs = np.append(whole[:length] != before[:length], True)
    cut = int(differs.argmax())
    return np.concatenate([np.array(tokenizer.start_ids, np.int32), whole[:cut]]), whole[cut:]


def _of_attribute(attribute: str, results: list[tuple[bool, bool, float]]) -> AttributeRecall:
    """Returns the measures over results: whether greedy, whether the likeliest choice, and nats."""
    count = len(results)
    greedy, likeliest, nats = (math.fsum(column) for column in zip(*results, strict=True))
    bits = count * math.log2(len(ATTRIBUTES[attribute].values)) - nats / math.log(2)
    # In this order a NaN stays one: a broken model does not look like an ignorant one.
    return AttributeRecall(count, greedy / count, likeliest / count, nats / count, max(bits, 0.0))
