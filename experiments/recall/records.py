"""Holds what the experiment measures, as JSON keeps it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultramem_jax.models.fact_recall import Recall
from ultramem_jax.reporting.records import keep_record, kept_record


@dataclass(frozen=True)
class Answers:
    """Holds how a model answered the queries of one form."""

    num_queries: int
    greedy: float
    """Fraction of the queries that greedy decoding answers exactly."""
    nats: float
    """Mean negative log-probability of the answers."""
    stored_bits: float
    """Lower bound of what the model knows, see `Recall.stored_bits`."""

    @classmethod
    def of(cls, found: Recall) -> "Answers":
        """Returns the sums of a `Recall`."""
        return cls(found.num_queries, found.greedy, found.nats, found.stored_bits)


@dataclass(frozen=True)
class Run:
    """Holds one run: a system of one size, which was trained and then asked."""

    system: str
    size: int
    """Sparse parameters, in multiples of the dense model's parameters; 0 for the dense model."""
    shape: str
    """Shape of the model, in words."""
    rate: float
    """Peak of the learning rate."""
    seed: int
    dense_parameters: int
    """Parameters that are not sparse, with embeddings."""
    sparse_parameters: int
    """Parameters of tables or experts."""
    flops: int
    """FLOPs of a token, as `baselines.matching` counts them."""
    statements: Answers
    """Statements in templates that were trained, of all people."""
    held_out: Answers
    """Statements in templates that no text has, of all people."""
    questions: Answers
    """Questions about people about whom no text asks a question."""
    validation_bits: float | None
    """Bits per byte of the validation split: biographies in templates that no text has; None: not finite."""
    tokens_per_second: float | None
    """Tokens per second of training; None if it was not measured."""

    @property
    def parameters(self) -> int:
        """Returns the count of all parameters."""
        return self.dense_parameters + self.sparse_parameters

    @property
    def bits_per_parameter(self) -> float:
        """Returns the stored bits divided by all parameters."""
        return self.statements.stored_bits / self.parameters

    @property
    def bits_per_sparse_parameter(self) -> float | None:
        """Returns the stored bits divided by the sparse parameters; None if there are none."""
        return self.statements.stored_bits / self.sparse_parameters if self.sparse_parameters else None

    @classmethod
    def of(cls, tree: dict[str, Any]) -> "Run":
        """Returns the run of a record, as JSON keeps it."""
        answers = {form: Answers(**tree[form]) for form in ("statements", "held_out", "questions")}
        return cls(**tree | answers)


@dataclass(frozen=True)
class Study:
    """Holds all measurements, what they were made on, and where."""

    environment: dict[str, str]
    """Strings from `describe_environment()`."""
    training: str
    """How all runs were trained, in words."""
    people: int
    all_bits: float
    """Bits of all values of all people."""
    tunings: list[Run]
    """Runs by which the rate of each system was chosen."""
    runs: list[Run]
    """Runs at the chosen rates, over seeds."""
    diverged: list[str]
    """Names and seeds of those whose loss did not stay finite."""

    def share(self, run: Run) -> float:
        """Returns the share of all bits that the model of a run holds."""
        return run.statements.stored_bits / self.all_bits

    def save(self, path: Path) -> Path:
        """Writes the study as JSON, completely or not at all.

        Raises:
            UserError: the file cannot be written.
        """
        return keep_record(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Study":
        """Reads a file that `save` wrote.

        Raises:
            UserError: the file cannot be read, or is not a study.
        """
        with kept_record(path, "a study of recall") as read:
            return cls(
                dict(read["environment"]),
                str(read["training"]),
                int(read["people"]),
                float(read["all_bits"]),
                [Run.of(run) for run in read["tunings"]],
                [Run.of(run) for run in read["runs"]],
                list(read["diverged"]),
            )
