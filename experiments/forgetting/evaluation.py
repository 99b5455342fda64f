"""Measures what a model knows: new facts, facts taught before, and text that has nothing to do with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from experiments.forgetting.records import Point
from ultramem_jax.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from ultramem_jax.data import ByteTokenizer, Tokenizer, load_corpus
from ultramem_jax.data.facts import Person, queries
from ultramem_jax.models.fact_recall import recall
from ultramem_jax.models.scoring import Scorer
from ultramem_jax.training.evaluation import Evaluator
from ultramem_jax.tree_types import ArrayTree


@dataclass(frozen=True)
class Sizes:
    """Says how much is read for a measurement."""

    batches: int
    """Batches of text."""
    batch_size: int
    seq_len: int
    """Tokens of context, of text and of facts."""


class FactEvaluator:
    """Measures models of one shape, by programs that are compiled once."""

    def __init__(
        self,
        config: ModelConfig,
        variables: dict[str, ArrayTree],
        tokenizer: Tokenizer,
        text: DataConfig,
        sizes: Sizes,
    ):
        """Prepares the measurements.

        Args:
            config: the model's config.
            variables: variables of such a model.
            tokenizer: its tokenizer.
            text: dataset and path of the text, whose validation split is read.
            sizes: how much is read.
        """
        self._tokenizer, self._sizes = tokenizer, sizes
        self._scorer = Scorer(config, variables, max_length=sizes.seq_len, batch_size=16)
        train = TrainConfig(batch_size=sizes.batch_size)
        kind = "bytes" if isinstance(tokenizer, ByteTokenizer) else "the tokenizer at hand"
        data = DataConfig(text.dataset, text.path, tokenizer=kind, seq_len=sizes.seq_len)
        self._evaluate = Evaluator(RunConfig(config, data, train), load_corpus(data, tokenizer))

    def of_task(self, new: Sequence[Person], before: Sequence[Person]) -> "TaskEvaluator":
        """Returns the evaluation of a task.

        Args:
            new: people that are taught.
            before: people that were taught before.
        """
        return TaskEvaluator(self, new, before)

    def known(
        self, step: int, variables: dict[str, ArrayTree], new: Sequence[Person], before: Sequence[Person]
    ) -> Point:
        """Returns what a model knows after some steps; people are those of `of_task`."""
        scorer = self._scorer.with_variables(variables)
        asked = {
            "new": queries(new, "statement", max_choices=1),
            "held out": queries(new, "held_out_statement", max_choices=1),
            "before": queries(before, "statement", max_choices=1),
        }
        found = {name: recall(scorer, self._tokenizer, of) for name, of in asked.items()}
        loss = self._evaluate(variables, batches=self._sizes.batches)
        return Point(
            step=step,
            learned=found["new"].greedy,
            learned_held_out=found["held out"].greedy,
            learned_nats=found["new"].nats,
            kept=found["before"].greedy,
            kept_nats=found["before"].nats,
            bits_per_byte=loss.bits_per_byte,
        )

    def greedy(self, variables: dict[str, ArrayTree], people: Sequence[Person]) -> float:
        """Returns the share of the facts of people that greedy decoding completes exactly."""
        asked = queries(people, "statement", max_choices=1)
        return recall(self._scorer.with_variables(variables), self._tokenizer, asked).greedy


class TaskEvaluator(NamedTuple):
    """Measures what a model knows in the course of a task."""

    evaluator: FactEvaluator
    new: Sequence[Person]
    """People that are taught."""
    before: Sequence[Person]
    """People that were taught before."""

    def learned(self, variables: dict[str, ArrayTree]) -> float:
        """Returns the share of the new facts that greedy decoding completes exactly."""
        return self.evaluator.greedy(variables, self.new)

    def point(self, step: int, variables: dict[str, ArrayTree]) -> Point:
        """Returns all that is measured after a step."""
        return self.evaluator.known(step, variables, self.new, self.before)
