"""Times prefill and decoding of one model by several programs, in turns."""

import os
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.timing import in_turns
from experiments.open_models.records import FLOAT32, OURS, Speed, same_beginning
from ultramem_jax.accounting import count_parameters
from ultramem_jax.accounting.model import DTYPE_BYTES
from ultramem_jax.errors import UserError
from ultramem_jax.interop import open_models
from ultramem_jax.models.cache import Cache, empty_cache
from ultramem_jax.models.generation import Generator
from ultramem_jax.models.sampling import Sampling
from ultramem_jax.models.serving import prepare_for_decoding
from ultramem_jax.models.transformer import Transformer
from ultramem_jax.tree_types import ArrayTree

WARM_UP = 2
"""Rounds that do not count: they compile, and touch the weights for the first time."""
_REST_SECONDS = 0.3
"""Time between two turns, in which the threads of a library that wait in a loop give up and sleep."""
_CLOSE = 1e-3
"""Largest difference of two float32 programs' logits, over their standard deviation: rounding makes 1e-5."""


class Timed(NamedTuple):
    """Holds one turn of a program."""

    prefill: float
    """Seconds from the prompt to the next token."""
    decode: float
    """Seconds of all tokens after that."""
    tokens: list[int]
    """Greedy tokens, one after the prompt and those that were decoded."""


class Contender(Protocol):
    """Describes a program with one dtype of weights."""

    @property
    def program(self) -> str:
        """Returns the name of the program."""

    @property
    def dtype(self) -> str:
        """Returns the dtype of the weights."""

    @property
    def weight_bytes(self) -> int:
        """Returns the bytes of the weights."""

    def run(self, ids: Sequence[int], new_tokens: int) -> Timed:
        """Reads a prompt, takes the next token, and decodes `new_tokens` more, greedily, at batch 1."""

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Returns the logits (V,) after a prompt."""


class Ours:
    """Times this library, by its `Generator`."""

    program = OURS

    def __init__(
        self,
        path: str | os.PathLike[str],
        dtype: Literal["float32", "bfloat16"],
        positions: int,
        prefill_chunk: int,
    ) -> None:
        """Loads the model.

        Args:
            path: as for `open_models.load`.
            dtype: dtype of weights and computation.
            positions: tokens of prompt and continuation together.
            prefill_chunk: tokens of a prompt that are read at a time.
        """
        self.config, variables = open_models.load(path, dtype)
        self.dtype = dtype
        self.weight_bytes = DTYPE_BYTES[dtype] * count_parameters(self.config).total
        self._variables = prepare_for_decoding(self.config, dict(variables))
        self._generator = Generator(
            self.config,
            self._variables,
            window=positions,
            sampling=Sampling(temperature=0.0),
            prefill_chunk=prefill_chunk,
        )

    def run(self, ids: Sequence[int], new_tokens: int) -> Timed:
        """Reads a prompt and decodes greedily; see `Contender`."""
        begin = time.perf_counter()
        stream = self._generator.stream([ids], new_tokens + 1)
        tokens = [int(next(stream)[0])]
        middle = time.perf_counter()
        tokens += [int(token[0]) for token in stream]
        return Timed(middle - begin, time.perf_counter() - middle, tokens)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Returns the logits (V,) after a prompt that is read at once."""

        def read(variables: dict[str, ArrayTree], cache: Cache, tokens: jax.Array) -> jax.Array:
            counts = jnp.full((1,), tokens.shape[1], jnp.int32)
            model = Transformer(self.config)
            logits, _ = model.apply(variables | {"cache": cache}, tokens, counts=counts, mutable=["cache"])
            return logits[0]

        cache = empty_cache(self.config, 1, len(ids))
        return np.asarray(jax.jit(read)(self._variables, cache, jnp.asarray([ids], jnp.int32)), np.float64)


def race(
    contenders: Sequence[Contender],
    ids: Sequence[int],
    new_tokens: int,
    rounds: int,
    tick: Callable[[], object],
) -> list[Speed]:
    """Times programs in turns: a round runs each of them once.

    Args:
        contenders: the programs. The first one is ours in float32.
        ids: the prompt.
        new_tokens: tokens to decode after it, beside the first.
        rounds: rounds that count, after `WARM_UP` rounds.
        tick: function that is called after every turn.

    Raises:
        UserError: another program computes other logits in float32, so it runs another model.
    """
    ours = contenders[0].logits(ids)
    differences = [_difference(contender.logits(ids), ours) for contender in contenders]
    for contender, difference in zip(contenders, differences, strict=True):
        if contender.dtype == FLOAT32 and difference > _CLOSE:
            raise UserError(
                f"{contender.program}: its float32 logits differ from ours by {difference:.2g} times their "
                f"standard deviation, must be at most {_CLOSE}"
            )
    turns: list[list[Timed]] = [[] for _ in contenders]
    for number, order in in_turns(range(len(contenders)), WARM_UP + rounds):
        for index in order:
            time.sleep(_REST_SECONDS)
            timed = contenders[index].run(ids, new_tokens)
            if number >= WARM_UP:
                turns[index].append(timed)
            tick()
    first = turns[0][0].tokens
    return [
        Speed(
            program=contender.program,
            dtype=contender.dtype,
            weight_bytes=contender.weight_bytes,
            prefill=tuple(timed.prefill for timed in timings),
            decode=tuple(timed.decode for timed in timings),
            difference=difference,
            same_tokens=min(same_beginning(timed.tokens, first) for timed in timings),
        )
        for contender, timings, difference in zip(contenders, turns, differences, strict=True)
    ]


def _difference(logits: np.ndarray, ours: np.ndarray) -> float:
    """Returns the largest difference over the standard deviation of ours."""
    return float(np.abs(logits - ours).max() / np.std(ours))
