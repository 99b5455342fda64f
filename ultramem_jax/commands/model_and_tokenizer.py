"""Holds the model of a command: a run's, or an open one, with its tokenizer."""

from typing import NamedTuple

from ultramem_jax.config import ModelConfig
from ultramem_jax.data import Tokenizer
from ultramem_jax.errors import require
from ultramem_jax.training.restore import LoadedModel
from ultramem_jax.tree_types import ArrayTree


class GivenModel(NamedTuple):
    """Holds the model of a command."""

    config: ModelConfig
    variables: dict[str, ArrayTree]
    tokenizer: Tokenizer
    max_length: int
    """Context in tokens. Of a run, the length in training; of an open model, the longest that it was made
    for, but at most 1,024."""
    title: str
    """Name of the model, for a line of output."""
    run: LoadedModel | None
    """The run, if it is one."""

    def length(self, asked: int | None) -> int:
        """Returns the context in tokens: what `--seq_len` asks for, or else `max_length`.

        Raises:
            UserError: it is longer than in the training of a run, or than an open model was made for.
        """
        most = self.max_length if self.run is not None else self.config.max_length
        if asked and most:
            require(asked <= most, "--seq_len", asked, f"must be at most {most}, what the model reads")
        return asked or self.max_length
