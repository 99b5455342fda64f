"""Writes continuations of prompts to standard output while they are generated, and times them."""

import os
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np

from ultramem_jax.data import Tokenizer
from ultramem_jax.models.generation import ENDED, Generator, continue_texts, stream_texts


def write_continuations(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    num_tokens: int,
    seed: int = 0,
    *,
    special: bool = False,
) -> str:
    """Writes prompts with their continuations to standard output, and returns a line on speed.

    The continuation of a single prompt is written piece by piece. Several prompts are one batch: each
    finished text is written under its prompt, in order.

    Args:
        generator: a generator of `text_generator`.
        tokenizer: the tokenizer of the model.
        prompts: texts to continue, as one batch.
        num_tokens: tokens to add to each prompt, at most.
        seed: seed of the sampling.
        special: see `stream_texts`.

    Returns:
        A line that says how many tokens there were and how long they took.
    """
    timed = _Timed(generator)
    if len(prompts) == 1:
        write(prompts[0])
        for (piece,) in stream_texts(timed, tokenizer, prompts, num_tokens, seed, special=special):
            write(piece)
        write("\n")
    else:
        texts = continue_texts(timed, tokenizer, prompts, num_tokens, seed, special=special)
        shown = (f"{prompt!r}:\n{prompt}{text}\n" for prompt, text in zip(prompts, texts, strict=True))
        write("\n".join(shown))
    return timed.summary()


def write(text: str) -> None:
    """Writes to standard output at once, with `?` for characters that its encoding lacks.

    Raises:
        SystemExit: the reader of the output has gone, as `head` does after its lines; nothing is left to do.
    """
    out = sys.stdout
    encoding = out.encoding or "utf-8"
    try:
        out.write(text.encode(encoding, errors="replace").decode(encoding))
        out.flush()
    except BrokenPipeError:
        # Python flushes once more when it exits. With a closed pipe that would print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        raise SystemExit(0) from None


_COMPILING = 3
"""Tokens of a sequence until all programs are compiled.

The first token comes from reading the prompt, the second from a step. After a prompt that fills the window,
the second token comes from reading the prompt again, and the third from a step.
"""


class _Timed:
    """Wraps a generator, and counts and times the tokens that it yields."""

    def __init__(self, generator: Generator):
        self._generator = generator
        self._counts: list[int] = []
        self._times = [time.perf_counter()]

    def stream(
        self, prompts: Sequence[Sequence[int] | np.ndarray], num_tokens: int, seed: int = 0
    ) -> Iterator[np.ndarray]:
        """Yields the tokens of `Generator.stream`."""
        for tokens in self._generator.stream(prompts, num_tokens, seed):
            self._times.append(time.perf_counter())
            self._counts.append(int((tokens != ENDED).sum()))
            yield tokens

    def summary(self) -> str:
        """Returns a line with tokens and seconds of the stream that was read, and the rate once compiled."""
        tokens, rest = sum(self._counts), sum(self._counts[_COMPILING:])
        seconds = self._times[-1] - self._times[0]
        if not rest:
            return f"{tokens} tokens in {seconds:.1f} s with compiling"
        first = self._times[_COMPILING] - self._times[0]
        rate = rest / max(seconds - first, 1e-9)
        how = f"{first:.1f} s with compiling, then {rate:.1f} tokens per second"
        return f"{tokens} tokens in {seconds:.1f} s: {how}"
